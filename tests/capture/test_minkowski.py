"""Captured networks of compat.minkowski equal the eager ones."""

from contextlib import nullcontext as _nothing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compat.minkowski as ME
import tritonspconv as ts
from compat.minkowski._errors import MinkowskiError
from compat.minkowski.modules.resnet_block import BasicBlock
from tests._back_end import every_back_end
from tritonspconv.capture import CaptureOverflow
from tritonspconv.coords.row_tensor import RowTensor, RowwiseError, plain
from tritonspconv.models.minkowski import mink_unet

EXTENT, LOWEST = 24, -9


@pytest.fixture(autouse=True)
def _on(device: torch.device):
    """Make modules and tensors on each device in turn."""
    with device:
        yield


def scene(n: int, seed: int = 0, channels: int = 4, samples: int = 2, extent: int = EXTENT):
    """Return features and coordinates of ``n`` distinct sites in all samples; some are negative."""
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)
    cells = torch.randperm(samples * extent**3, generator=generator, device="cpu")[:n]
    coords = torch.stack(torch.unravel_index(cells, (samples, *(extent,) * 3)), dim=1).int()
    coords[:, 1:] += LOWEST
    # The first rows belong to each sample in turn.
    coords[:samples, 0] = torch.arange(samples, device="cpu")[:n]
    coords = torch.unique(coords, dim=0)
    coords = coords[torch.randperm(len(coords), generator=generator, device="cpu")]
    feats = torch.randn(len(coords), channels, generator=generator, device="cpu")
    return feats.to(device), coords.to(device)


class ResNet(nn.Module):
    """A classifier: strided blocks, local and global pools, a broadcast, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ME.MinkowskiConvolution(4, 8, 3, dimension=3),
            ME.MinkowskiBatchNorm(8),
            ME.MinkowskiReLU(inplace=True),
            ME.MinkowskiMaxPooling(2, 2, dimension=3),
        )
        side = nn.Sequential(
            ME.MinkowskiConvolution(8, 12, 1, 2, dimension=3), ME.MinkowskiBatchNorm(12)
        )
        self.blocks = nn.Sequential(
            BasicBlock(8, 8, dimension=3), BasicBlock(8, 12, 2, downsample=side, dimension=3)
        )
        self.squeeze, self.broadcast = ME.MinkowskiGlobalAvgPooling(), ME.MinkowskiBroadcast()
        self.pools = nn.ModuleList([ME.MinkowskiGlobalMaxPooling(), ME.MinkowskiGlobalSumPooling()])
        self.head = ME.MinkowskiLinear(12, 5)

    def forward(self, feats, coords):
        x = self.blocks(self.stem(ME.SparseTensor(feats, coords)))
        scale = self.broadcast(x, self.squeeze(x))
        x = ME.SparseTensor(
            x.F * scale.F.sigmoid(),
            coordinate_map_key=x.coordinate_map_key,
            coordinate_manager=x.coordinate_manager,
        )
        return [self.head(pool(x)).F for pool in self.pools], x


class Segmentor(nn.Module):
    """MinkUNet14 with few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mink_unet(ME, depth=14, num_classes=5, channel_divisor=8)

    def forward(self, feats, coords):
        return self.net(ME.SparseTensor(feats, coords))


NETWORKS = {"classifier": ResNet, "segmentor": Segmentor}


@pytest.fixture(params=NETWORKS)
def networks(request) -> tuple[nn.Module, nn.Module]:
    """Two equal networks."""
    torch.manual_seed(0)
    first, second = NETWORKS[request.param](), NETWORKS[request.param]()
    second.load_state_dict(first.state_dict())
    return first, second


def flat(result) -> list[torch.Tensor]:
    """Return the tensors of a result, coordinates last."""
    if isinstance(result, ME.SparseTensor):
        return [result.F, result.C]
    heads, x = result
    return [*heads, x.F, x.C]


def check_equal(got, expected) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(flat(got), flat(expected), strict=True):
        assert ours.shape == theirs.shape
        assert not isinstance(ours, RowTensor)
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(ours, theirs)


# A whole window of coarse cells: no other scene reaches more sites with as many rows.
HEADROOM = 8


def test_any_call_equals_eager(networks) -> None:
    net, eager = (module.eval() for module in networks)
    with torch.no_grad():
        captured = ts.capture(
            net, *scene(300), coords=1, capacities=[90, 300], headroom=HEADROOM, on_overflow="raise"
        )

        @settings(max_examples=15)
        @given(n=st.integers(2, 300), seed=st.integers(0, 99))
        def is_equal(n, seed):
            before = captured.replays
            check_equal(captured(*scene(n, seed)), eager(*scene(n, seed)))
            assert captured.replays == before + 1

        is_equal()


def test_a_call_leaves_no_trace_in_the_next(networks) -> None:
    """The results stay equal after calls that do not fit the graph."""
    net, eager = (module.eval() for module in networks)
    with torch.no_grad():
        captured = ts.capture(net, *scene(100), coords=1, headroom=HEADROOM)
        first = captured(*scene(70, 1))
        far, (feats, coords) = scene(40, 2), scene(70, 1)
        far[1][3, 2] = 1000
        with pytest.warns(RuntimeWarning, match="coordinates lie outside the box"):
            check_equal(captured(*far), eager(*far))
        repeated = coords.clone()
        repeated[5] = repeated[4]
        check_equal(captured(feats, repeated), eager(feats, repeated))
        for ours, again in zip(flat(first), flat(captured(feats, coords)), strict=True):
            assert torch.equal(ours, again)
    assert captured.replays == 2
    assert [*captured.eager_calls] == [
        "coordinates lie outside the box", "input rows repeat each other"
    ]  # fmt: skip


def test_training_equals_eager(networks) -> None:
    net, eager = (module.train() for module in networks)
    captured = ts.capture(net, *scene(250), coords=1, headroom=HEADROOM, on_overflow="raise")
    for n, seed in ((250, 1), (200, 2)):
        for model, run in ((net, captured), (eager, eager)):
            model.zero_grad()
            *heads, _ = flat(run(*scene(n, seed)))
            sum(head.square().mean() for head in heads).backward()
        named = dict(eager.named_parameters())
        for name, parameter in net.named_parameters():
            scale = named[name].grad.abs().max().item()
            torch.testing.assert_close(
                parameter.grad, named[name].grad, rtol=1e-3, atol=1e-3 * scale + 1e-5
            )
        for ours, theirs in zip(net.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class TestBox:
    """The box of the coordinates: of the example with a margin, or given."""

    @staticmethod
    def run(feats, coords):
        return ME.SparseTensor(feats, coords).F

    def test_a_margin_is_half_the_extent(self) -> None:
        _, coords = example = torch.ones(2, 1), torch.tensor([[0, 0, 0], [0, 9, 9]]).int()
        captured = ts.capture(self.run, *example, coords=1)
        for shift, fits in ((5, True), (-5, True), (6, False), (-6, False)):
            before = captured.replays
            moved = coords.clone()
            moved[:, 1] += shift
            if fits:
                captured(example[0], moved)
            else:
                with pytest.warns(RuntimeWarning) if not captured.eager_calls else _nothing():
                    captured(example[0], moved)
            assert captured.replays == before + fits

    def test_a_given_box(self) -> None:
        feats, coords = scene(60)
        captured = ts.capture(self.run, feats, coords, coords=1, box=((-50,) * 3, (70,) * 3))
        coords = coords.clone()
        coords[7, 1:] = torch.tensor([70, -50, 70])
        captured(feats, coords)
        assert captured.replays == 1
        coords[7, 3] = 71
        with pytest.warns(RuntimeWarning, match="outside the box"):
            captured(feats, coords)

    def test_a_box_in_input_units(self) -> None:
        """At tensor stride 2 a cell is two units; other tensor strides run eagerly."""

        def run(feats, coords):
            return ME.SparseTensor(feats, coords, tensor_stride=2).C

        feats, coords = scene(60)
        coords[:, 1:] *= 2
        captured = ts.capture(run, feats, coords, coords=1, box=((-20,) * 3, (30,) * 3))
        assert torch.equal(captured(feats, coords), coords)
        odd = coords.clone()
        odd[3, 2] += 1
        with pytest.warns(RuntimeWarning, match="outside the box"):
            assert torch.equal(captured(feats, odd), odd)

    def test_wrong_boxes(self) -> None:
        example = scene(60)
        for box, text in (
            (((0,) * 3, (20,) * 3), "Choose a box with room"),
            (((-50,) * 2, (70,) * 2), "box must have 3 axes"),
            (((9,) * 3, (0,) * 3), "a lower and an upper corner"),
        ):
            with pytest.raises(ValueError, match=text):
                ts.capture(self.run, *example, coords=1, box=box)


def test_a_pool_of_other_samples_runs_eagerly() -> None:
    pool = ME.MinkowskiGlobalAvgPooling()

    def run(feats, coords):
        return pool(ME.SparseTensor(feats, coords)).F

    captured = ts.capture(run, *scene(60), coords=1)
    feats, coords = scene(60, 3)
    coords[:, 0] = 1
    coords = torch.unique(coords, dim=0)
    with pytest.warns(RuntimeWarning, match="other samples occur"):
        got = captured(feats[: len(coords)], coords)
    torch.testing.assert_close(got, feats[: len(coords)].mean(0, keepdim=True))
    feats, coords = scene(60)
    coords[coords[:, 0] == 1, 0] = 2
    with pytest.raises(MinkowskiError, match=r"samples \[0, 2\] alone"):
        ts.capture(run, feats, coords, coords=1)


@every_back_end
def test_a_sparse_tensor_as_argument_and_padded_results() -> None:
    net = nn.Sequential(
        ME.MinkowskiConvolution(4, 6, 3, stride=2, dimension=3), ME.MinkowskiReLU()
    ).eval()
    with torch.no_grad():
        captured = ts.capture(net, ME.SparseTensor(*scene(80)), rows="padded", headroom=HEADROOM)
        x = ME.SparseTensor(*scene(90, 1))
        got, expected = captured(x), net(x)
    n = len(expected)
    assert isinstance(got.F, RowTensor)
    assert got.tensor_stride == expected.tensor_stride
    torch.testing.assert_close(plain(got.F)[:n], expected.F)
    assert torch.equal(plain(got.C)[:n], expected.C)
    assert (plain(got.F)[n:] == 0).all()
    assert (plain(got.C)[n:, 0] == -1).all()


def test_a_sparse_tensor_of_another_tensor_stride() -> None:
    feats, coords = scene(60)
    coarse = coords * torch.tensor([1, 2, 2, 2]).int()
    conv = ME.MinkowskiConvolution(4, 6, 3, dimension=3)
    with torch.no_grad():
        captured = ts.capture(conv, ME.SparseTensor(feats, coords))
        with pytest.raises(ValueError, match=r"grid must .*\[1, 1, 1\], got .*\[2, 2, 2\]"):
            captured(ME.SparseTensor(feats, coarse, tensor_stride=2))
        captured(ME.SparseTensor(feats, coords))
    assert captured.replays == 1


def test_no_rows() -> None:
    conv = ME.MinkowskiConvolution(4, 6, 3, stride=2, dimension=3)
    with torch.no_grad():
        captured = ts.capture(
            lambda feats, coords: conv(ME.SparseTensor(feats, coords)), *scene(30), coords=1,
            modules=[conv],
        )  # fmt: skip
        feats, coords = scene(30)
        got = captured(feats[:0], coords[:0])
    assert captured.replays == 1
    assert got.F.shape == (0, 6)
    assert got.C.shape == (0, 4)


def test_results_go_on_eagerly() -> None:
    """A result has a coordinate manager of its own, and layers on it make new maps."""
    first = ME.MinkowskiConvolution(4, 6, 3, stride=2, dimension=3)
    behind = nn.Sequential(
        ME.MinkowskiConvolution(6, 6, 3, dimension=3), ME.MinkowskiGlobalMaxPooling()
    )
    with torch.no_grad():
        captured = ts.capture(
            lambda feats, coords: first(ME.SparseTensor(feats, coords)), *scene(80), coords=1,
            modules=[first],
        )  # fmt: skip
        got = behind(captured(*scene(70, 1)))
        expected = behind(first(ME.SparseTensor(*scene(70, 1))))
    assert captured.replays == 1
    torch.testing.assert_close(got.F, expected.F)
    assert torch.equal(got.C, expected.C)


def test_sites_that_each_reach_their_own() -> None:
    """A transposed layer without an encoder makes a fixed number of sites for each row."""
    layer = ME.MinkowskiGenerativeConvolutionTranspose(4, 3, 2, stride=(2, 2, 2), dimension=3)

    def run(feats, coords):
        return layer(ME.SparseTensor(feats, coords, tensor_stride=2))

    def even(n: int, seed: int):
        feats, coords = scene(n, seed)
        coords[:, 1:] *= 2
        return feats, coords

    with torch.no_grad():
        captured = ts.capture(run, *even(50, 0), coords=1, modules=[layer], on_overflow="raise")
        for n in (50, 20):
            check_equal(captured(*even(n, 1)), run(*even(n, 1)))


class TestRefused:
    """An operation that needs the values of coordinates is refused, with its line."""

    @pytest.mark.parametrize(
        ("step", "text"),
        [
            (lambda x, y: x + y, "comparison of the coordinates"),
            (lambda x, y: ME.MinkowskiUnion()(x, y), "union of coordinates"),
            (lambda x, y: x.decomposed_features, "list of the rows of each sample"),
            (lambda x, y: ME.MinkowskiPruning()(x, x.F[:, 0] > 0), "nonzero"),
            (lambda x, y: x.dense(), "aminmax"),
            (lambda x, y: x.features_at_coordinates(x.C.float()), "new_tensor|search|__getitem__"),
        ],
    )
    def test_steps(self, step, text: str) -> None:
        def run(feats, coords):
            x = ME.SparseTensor(feats, coords)
            y = ME.SparseTensor(feats, coords, coordinate_manager=x.coordinate_manager)
            return step(x, y)

        with pytest.raises(RowwiseError, match=rf"({text}).*test_minkowski.py:\d+"):
            ts.capture(run, *scene(20), coords=1)

    def test_examples_that_repeat(self) -> None:
        feats, coords = scene(20)
        coords[3] = coords[2]
        with pytest.raises(MinkowskiError, match="the example's coordinates repeat"):
            ts.capture(TestBox.run, feats, coords, coords=1)

    def test_shared_managers(self) -> None:
        ME.set_sparse_tensor_operation_mode(ME.SparseTensorOperationMode.SHARE_COORDINATE_MANAGER)
        try:
            with pytest.raises(MinkowskiError, match="cannot share a coordinate manager"):
                ts.capture(TestBox.run, *scene(20), coords=1)
        finally:
            ME.clear_global_coordinate_manager()
            ME.set_sparse_tensor_operation_mode(
                ME.SparseTensorOperationMode.SEPARATE_COORDINATE_MANAGER
            )

    def test_overflow_may_raise(self) -> None:
        captured = ts.capture(TestBox.run, *scene(20), coords=1, on_overflow="raise")
        feats, coords = scene(20)
        coords[0, 1] = 999
        with pytest.raises(CaptureOverflow, match="outside the box"):
            captured(feats, coords)
