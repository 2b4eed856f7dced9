"""A few hundred random layers and mistakes. scripts/tools/fuzz.py runs more of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import _fuzz, _hostile


@pytest.mark.parametrize("kind", _fuzz.CHECKS)
def test_valid_layers_are_right(device, kind):
    draw, check = _fuzz.CHECKS[kind]
    rows = []

    @settings(max_examples=60)
    @given(draw())
    def is_right(drawn):
        rows.append(check(drawn, device))

    is_right()
    assert sum(n > 1 for n in rows) >= len(rows) / 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mistakes_are_refused_in_words_and_leave_no_trace(device):
    expected, refused = _hostile.sentinel(str(device)), []

    @settings(max_examples=200)
    @given(st.sampled_from(_fuzz.mistakes()))
    def is_refused(mistake):
        refused.append(_fuzz.check_mistake(mistake, device, expected))

    is_refused()
    assert sum(refused) >= len(refused) / 2
