"""What every test may count on."""

import pytest
import torch


@pytest.mark.parametrize("turn", [1, 2])
def test_a_test_starts_on_one_thread_whatever_the_last_one_set(turn):
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)


def test_unwritten_memory_holds_no_number_that_passes_for_a_result():
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int32).abs() > 2**30).all()
