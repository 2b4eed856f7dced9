"""Captured functions equal the eager ones: CUDA graphs on a GPU, padded rows on a CPU."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv.capture import CaptureOverflow, _captured
from tritonspconv.capture._results import Outputs
from tritonspconv.coords.row_tensor import RowTensor, RowwiseError, plain

SHAPE = (9, 24, 20)


@pytest.fixture(autouse=True)
def _on(device: torch.device):
    """Make modules and tensors on each device in turn."""
    with device:
        yield


def scene(n: int, channels: int = 4, seed: int = 0, batch_size: int = 2):
    """Return features and coordinates of ``n`` distinct sites, on the default device."""
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)
    cells = batch_size * SHAPE[0] * SHAPE[1] * SHAPE[2]
    cells = torch.randperm(cells, generator=generator, device="cpu")[:n]
    coords = torch.stack(torch.unravel_index(cells, (batch_size, *SHAPE)), dim=1).int()
    feats = torch.randn(n, channels, generator=generator, device="cpu")
    return feats.to(device), coords.to(device)


def replace_feature(x, features):
    return x.replace_feature(features)


class BasicBlock(spconv.SparseModule):
    """A residual block as detection code bases write it."""

    def __init__(self, channels: int, key: str) -> None:
        super().__init__()
        self.conv1 = spconv.SubMConv3d(channels, channels, 3, padding=1, bias=True, indice_key=key)
        self.bn1 = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)
        self.relu = nn.ReLU()
        self.conv2 = spconv.SubMConv3d(channels, channels, 3, padding=1, bias=True, indice_key=key)
        self.bn2 = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = replace_feature(out, self.bn1(out.features))
        out = replace_feature(out, self.relu(out.features))
        out = self.conv2(out)
        out = replace_feature(out, self.bn2(out.features))
        out = replace_feature(out, out.features + identity.features)
        return replace_feature(out, self.relu(out.features))


class Backbone(nn.Module):
    """An encoder over a ``batch_dict``, with an inverse layer and a dense view at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = spconv.SparseSequential(
            spconv.SubMConv3d(4, 8, 3, padding=1, bias=False, indice_key="stem"),
            nn.BatchNorm1d(8),
            nn.ReLU(),
        )
        self.block = BasicBlock(8, "stem")
        self.down = spconv.SparseSequential(
            spconv.SparseConv3d(8, 12, 3, stride=2, padding=1, bias=False, indice_key="down"),
            nn.BatchNorm1d(12),
            nn.ReLU(),
        )
        self.pool = spconv.SparseMaxPool3d(2, 2, indice_key="pool")
        self.up = spconv.SparseInverseConv3d(12, 8, 3, indice_key="down")

    def forward(self, batch_dict):
        x = spconv.SparseConvTensor(
            features=batch_dict["voxel_features"],
            indices=batch_dict["voxel_coords"].int(),
            spatial_shape=SHAPE,
            batch_size=batch_dict["batch_size"],
        )
        x = self.block(self.stem(x))
        y = self.down(x)
        z = self.pool(y).dense()
        batch_dict["bev"] = z.flatten(1, 2)
        batch_dict["point_features"] = torch.cat([self.up(y).features, x.features], dim=1)
        batch_dict["encoded"] = y
        return batch_dict


def batch(n: int, seed: int = 0):
    feats, coords = scene(n, seed=seed)
    return {
        "voxel_features": feats,
        "voxel_coords": coords,
        "batch_size": 2,
        "frame_id": object(),
    }


@pytest.fixture(params=[False, True], ids=["eval", "train"])
def net(request) -> nn.Module:
    torch.manual_seed(0)
    return Backbone().train(request.param)


def test_a_batch_dict_network_equals_eager_with_other_coordinates(net: nn.Module) -> None:
    eager = copy.deepcopy(net)
    captured = ts.capture(net, batch(150), coords="voxel_coords", capacities=[100, 400])
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), eager.buffers(), strict=True))
    for seed, n in enumerate([150, 40, 399, 100, 7]):
        ours, theirs = batch(n, seed), batch(n, seed)
        theirs["frame_id"] = ours["frame_id"]
        got, expected = captured(ours), eager(theirs)
        assert got["frame_id"] is ours["frame_id"]
        assert got["voxel_features"] is ours["voxel_features"]
        for name in ("bev", "point_features"):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)
        for name in ("features", "indices"):
            torch.testing.assert_close(
                getattr(got["encoded"], name), getattr(expected["encoded"], name),
                rtol=1e-5, atol=1e-5,
            )  # fmt: skip
        for ours_buffer, buffer in zip(net.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(ours_buffer, buffer)
    assert captured.replays == 5
    assert not captured.eager_calls


def test_gradients_equal_eager(net: nn.Module) -> None:
    eager = copy.deepcopy(net)
    example = batch(150)
    example["voxel_features"].requires_grad_()
    captured = ts.capture(net, example, coords="voxel_coords", capacities=[300])
    with pytest.raises(ValueError, match=r"voxel_features.*must be as in the example"):
        captured(batch(150))
    for seed, n in enumerate([150, 60, 290]):
        ours, theirs = batch(n, seed), batch(n, seed)
        ours["voxel_features"].requires_grad_()
        theirs["voxel_features"].requires_grad_()
        for model, run, given in ((net, captured, ours), (eager, eager, theirs)):
            model.zero_grad()
            out = run(given)
            weights = torch.linspace(-1, 1, out["point_features"].shape[1])
            (out["bev"].square().mean() + (out["point_features"] * weights).mean()).backward()
        for ours_parameter, parameter in zip(net.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours_parameter.grad, parameter.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            ours["voxel_features"].grad, theirs["voxel_features"].grad, rtol=1e-4, atol=1e-6
        )


def test_the_engines_own_layers_and_padded_results() -> None:
    net = nn.Sequential(
        ts.nn.SubMConv3d(4, 6, 3), ts.nn.BatchNorm(6), ts.nn.ReLU(),
        ts.nn.SparseConv3d(6, 5, 2, stride=2), ts.nn.MaxPool3d(3, stride=2, padding=1),
    ).eval()  # fmt: skip

    def tensor(n: int, seed: int) -> ts.SparseTensor:
        feats, coords = scene(n, seed=seed)
        return ts.SparseTensor(feats, coords, spatial_shape=SHAPE, batch_size=2)

    with torch.no_grad():
        captured = ts.capture(net, tensor(80, 0), rows="padded", capacities=[120])
        got, expected = captured(tensor(100, 1)), net(tensor(100, 1))
    n = expected.num_rows
    assert isinstance(got.feats, RowTensor)
    assert int(got.sites.count) == n
    torch.testing.assert_close(plain(got.feats)[:n], expected.feats)
    assert torch.equal(plain(got.coords)[:n], expected.coords)
    assert (plain(got.feats)[n:] == 0).all()
    assert (plain(got.coords)[n:, 0] == -1).all()


def test_tensors_that_a_function_made_are_no_arguments_and_no_numbers() -> None:
    given, made = torch.ones(2), torch.ones(2)
    tree = {"given": given, "made": made, "shape": [9, 24]}
    assert Outputs(tree, {id(given): ("x", given)}).tensors() == {"['made']": made}


def test_empty_input_is_a_result() -> None:
    net = Backbone().eval()
    with torch.no_grad():
        captured = ts.capture(net, batch(50), coords="voxel_coords", on_overflow="raise")
        got = captured(batch(0))
    assert got["point_features"].shape == (0, 16)
    assert (got["bev"] == 0).all()


class TestOverflow:
    def test_too_many_rows(self) -> None:
        net = Backbone().eval()
        with torch.no_grad():
            captured = ts.capture(net, batch(50), coords="voxel_coords", capacities=[60])
            with pytest.warns(RuntimeWarning, match="61 rows are more than the largest capacity"):
                got = captured(batch(61))
            assert torch.equal(got["bev"], net(batch(61))["bev"])
            captured(batch(62))
        # The counter does not grow with every number of rows.
        assert captured.eager_calls == {"rows are more than the largest capacity, 60": 2}

    def test_too_many_sites_of_a_strided_layer_leave_no_trace(self) -> None:
        net = Backbone().train()
        clustered = batch(300)
        sites = torch.cartesian_prod(torch.zeros(1), *map(torch.arange, (6.0, 7.0, 7.0)))
        clustered["voxel_coords"] = sites.int()
        clustered["voxel_features"] = torch.randn(len(sites), 4)
        eager = copy.deepcopy(net)
        captured = ts.capture(net, clustered, coords="voxel_coords")
        scattered = batch(len(sites), seed=3)
        with pytest.warns(RuntimeWarning, match="strided layer 1 reaches more than"):
            got = captured(dict(scattered))
        expected = eager(dict(scattered))
        torch.testing.assert_close(got["bev"], expected["bev"])
        for ours, theirs in zip(net.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_repeated_rows_are_reported(self) -> None:
        net = Backbone().eval()
        repeated = batch(50)
        repeated["voxel_coords"][1] = repeated["voxel_coords"][0]
        with torch.no_grad():
            captured = ts.capture(net, batch(50), coords="voxel_coords", on_overflow="raise")
            with pytest.raises(CaptureOverflow, match="input rows repeat each other"):
                captured(repeated)


class TestRefused:
    """The capture refuses code that would count padding, and names its line."""

    @pytest.mark.parametrize(
        ("step", "function"),
        [
            (lambda x: x.features.mean(0), "mean"),
            (lambda x: x.features[x.indices[:, 0] == 0], "__getitem__"),
            (lambda x: x.features.sum(), "sum"),
            (lambda x: x.indices[:, 0].unique(), "unique"),
        ],
    )
    def test_steps_over_rows(self, step, function: str) -> None:
        conv = spconv.SubMConv3d(4, 4, 3, indice_key="a")

        def run(x):
            return step(conv(x))

        feats, coords = scene(20)
        x = spconv.SparseConvTensor(feats, coords, list(SHAPE), 2)
        with pytest.raises(RowwiseError, match=rf"{function}.*test_capture.py:\d+: .*step|lambda"):
            ts.capture(run, x)

    def test_a_value_that_cannot_be_compared(self) -> None:
        def run(batch_dict):
            return batch_dict["frame_id"].upper()

        with pytest.raises(TypeError, match="frame_id"):
            ts.capture(run, batch(20), coords="voxel_coords")

    def test_another_batch_size(self) -> None:
        with torch.no_grad():
            captured = ts.capture(Backbone().eval(), batch(20), coords="voxel_coords")
            with pytest.raises(ValueError, match=r"batch_size.*expected 2, got 3"):
                captured({**batch(20), "batch_size": 3})

    def test_a_sparse_tensor_in_another_grid(self) -> None:
        """In another grid, rows could lie outside, or the dense shape would differ."""
        other = [extent + 1 for extent in SHAPE]
        feats, coords = scene(30)
        conv = spconv.SubMConv3d(4, 4, 3).eval()
        own = ts.nn.SubMConv3d(4, 4, 3).eval()
        with torch.no_grad():
            captured = ts.capture(conv, spconv.SparseConvTensor(feats, coords, list(SHAPE), 2))
            for shape, batch_size in ((list(SHAPE), 3), (other, 2)):
                with pytest.raises(ValueError, match=r"\.grid must be as in the example"):
                    captured(spconv.SparseConvTensor(feats, coords, shape, batch_size))
            captured = ts.capture(
                own, ts.SparseTensor(feats, coords, spatial_shape=SHAPE, batch_size=2)
            )
            for shape, batch_size in ((SHAPE, 3), (other, 2), (None, None)):
                with pytest.raises(ValueError, match=r"\.grid must be as in the example"):
                    captured(
                        ts.SparseTensor(feats, coords, spatial_shape=shape, batch_size=batch_size)
                    )
            captured(ts.SparseTensor(feats, coords, spatial_shape=SHAPE, batch_size=2))
        assert captured.replays == 1

    def test_another_mode_or_moved_parameters(self) -> None:
        net = Backbone().eval()
        with torch.no_grad():
            captured = ts.capture(net, batch(20), coords="voxel_coords")
            net.train()
            with pytest.raises(RuntimeError, match="train / eval mode"):
                captured(batch(20))
            net.eval().double().float()
            with pytest.raises(RuntimeError, match="moved to other memory"):
                captured(batch(20))

    def test_options(self) -> None:
        with pytest.raises(ValueError, match="rows must be one of"):
            ts.capture(Backbone(), batch(20), coords="voxel_coords", rows="all")
        with pytest.raises(ValueError, match="headroom must be at least 1"):
            ts.capture(Backbone(), batch(20), coords="voxel_coords", headroom=0.5)
        with pytest.raises(ValueError, match="capacities must be"):
            ts.capture(Backbone(), batch(20), coords="voxel_coords", capacities=[])
        with pytest.raises(ValueError, match="exactly one argument must be 'coords'"):
            ts.capture(Backbone(), batch(20), coords="coords")


def test_cross_entropy_of_points_equals_eager() -> None:
    torch.manual_seed(1)
    net = Backbone().train()
    head = nn.Linear(16, 3)
    eager_net, eager_head = copy.deepcopy(net), copy.deepcopy(head)

    def loss_of(net, head):
        def run(batch_dict, target):
            return F.cross_entropy(head(net(batch_dict)["point_features"]), target)

        return run

    def labelled(n: int, seed: int):
        return batch(n, seed), torch.arange(n) % 3

    captured = ts.capture(
        loss_of(net, head), *labelled(90, 0), coords="voxel_coords", capacities=[200],
        modules=[net, head],
    )  # fmt: skip
    for seed, n in enumerate([90, 150]):
        got = captured(*labelled(n, seed))
        expected = loss_of(eager_net, eager_head)(*labelled(n, seed))
        torch.testing.assert_close(got, expected)
        got.backward()
        expected.backward()
    for ours, theirs in zip(head.parameters(), eager_head.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.AdamW(
        # The bias in front of a norm has a gradient of rounding errors, which Adam would enlarge.
        parameters,
        lr=0.01,
        eps=1e-3,
        capturable=True,
    ),
}


class TestStep:
    """A whole training step: loss, gradients, optimiser."""

    @staticmethod
    def loss_of(net: nn.Module, head: nn.Module):
        def run(batch_dict, target):
            return F.cross_entropy(head(net(batch_dict)["point_features"]), target)

        return run

    @staticmethod
    def labelled(n: int, seed: int):
        return batch(n, seed), torch.arange(n) % 3

    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_parameters_move_as_in_eager_steps(self, kind: str, device: torch.device) -> None:
        if device.type == "cpu" and kind == "adam":
            pytest.skip("capturable=True needs a GPU")
        torch.manual_seed(2)
        net, head = Backbone().train(), nn.Linear(16, 3)
        eager = copy.deepcopy(net), copy.deepcopy(head)
        modules = [net, head]
        optimizer = OPTIMIZERS[kind]([p for m in modules for p in m.parameters()])
        reference = OPTIMIZERS[kind]([p for m in eager for p in m.parameters()])
        before = [t.clone() for m in modules for t in (*m.parameters(), *m.buffers())]
        step = ts.capture_step(
            self.loss_of(net, head), optimizer, *self.labelled(90, 0), coords="voxel_coords",
            modules=modules, capacities=[80, 200],
        )  # fmt: skip
        after = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for seed, n in enumerate([90, 150, 60, 200]):
            if seed == 2:
                for group in (*optimizer.param_groups, *reference.param_groups):
                    group["lr"] *= 0.5
            loss = step(*self.labelled(n, seed))
            reference.zero_grad()
            expected = self.loss_of(*eager)(*self.labelled(n, seed))
            expected.backward()
            reference.step()
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(modules, eager, strict=True):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)

    def test_a_step_that_does_not_fit_runs_eagerly_and_once(self) -> None:
        net, head = Backbone().train(), nn.Linear(16, 3)
        eager = copy.deepcopy(net), copy.deepcopy(head)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1)
        reference = torch.optim.SGD([p for m in eager for p in m.parameters()], lr=0.1)
        step = ts.capture_step(
            self.loss_of(net, head), optimizer, *self.labelled(50, 0), coords="voxel_coords",
            modules=[net, head], capacities=[50],
        )  # fmt: skip
        with pytest.warns(RuntimeWarning, match="51 rows are more than"):
            loss = step(*self.labelled(51, 1))
        expected = self.loss_of(*eager)(*self.labelled(51, 1))
        expected.backward()
        reference.step()
        torch.testing.assert_close(loss, expected.detach())
        for ours, theirs in zip((net, head), eager, strict=True):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b)

    def test_activations_are_computed_again(self) -> None:
        """`save_memory` changes results by rounding, and its kernels are part of the graph."""
        torch.manual_seed(2)
        net, head = Backbone().train(), nn.Linear(16, 3)
        saving, saving_head = copy.deepcopy(net), copy.deepcopy(head)
        plan = ts.save_memory(saving, batch(90), share=0)
        assert {"stem", "block"} <= set(plan.segments)
        results = []
        for modules in ([net, head], [saving, saving_head]):
            step = ts.capture_step(
                self.loss_of(*modules),
                torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1),
                *self.labelled(90, 0), coords="voxel_coords", modules=modules, capacities=[200],
            )  # fmt: skip
            losses = [step(*self.labelled(n, seed)) for seed, n in enumerate([90, 150, 0])]
            assert step.replays == 3
            state = [t.clone() for m in modules for t in m.state_dict().values()]
            results.append([*losses, *state])
        for once, again in zip(*results, strict=True):
            torch.testing.assert_close(again, once, rtol=1e-3, atol=1e-5, equal_nan=True)

    def test_a_graph_cannot_draw_the_same_numbers_again(self, device: torch.device) -> None:
        """On a CPU there is no graph, so dropout draws the same numbers in the backward pass."""
        net = nn.Sequential(
            spconv.SparseSequential(spconv.SubMConv3d(4, 8, 3, padding=1), nn.Dropout(0.5)),
            spconv.SubMConv3d(8, 3, 3, padding=1),
        ).train()

        def loss_of(x: spconv.SparseConvTensor):
            feats = net(x).features
            return F.mse_loss(feats, torch.zeros_like(feats))

        def capture_step():
            return ts.capture_step(
                loss_of, torch.optim.SGD(net.parameters(), lr=0.1), tensor, modules=[net]
            )

        tensor = spconv.SparseConvTensor(*scene(40), list(SHAPE), 2)
        assert ts.save_memory(net, tensor, share=0).segments == ("0",)
        if device.type == "cuda":
            with pytest.raises(
                ts.GraphCaptureError, match=r"SparseSequential draws random numbers inside"
            ):
                capture_step()
        else:
            assert capture_step()(tensor).isfinite()

    def test_an_optimiser_that_counts_on_the_host_is_refused(self) -> None:
        net, head = Backbone().train(), nn.Linear(16, 3)
        optimizer = torch.optim.Adam(net.parameters())
        with pytest.raises(ValueError, match=r"Adam counts its steps on the host; pass capturable"):
            ts.capture_step(
                self.loss_of(net, head), optimizer, *self.labelled(50, 0),
                coords="voxel_coords", modules=[net, head],
            )  # fmt: skip


def test_weights_cast_before_the_capture_are_not_frozen() -> None:
    """Autocast keeps casts of weights; a graph made of them would never see new weights."""
    device = torch.get_default_device().type
    net = spconv.SubMConv3d(4, 4, 3, bias=False, indice_key="a")
    feats, coords = scene(40)

    def tensor() -> spconv.SparseConvTensor:
        return spconv.SparseConvTensor(feats, coords, list(SHAPE), 2)

    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    with torch.autocast(device, dtype):
        F.linear(feats, net.weight[0, 0, 0])  # fills the cache
        captured = ts.capture(lambda x: net(x).features, tensor(), modules=[net])
        first = captured(tensor())
        with torch.no_grad():
            net.weight.mul_(2)
        torch.testing.assert_close(captured(tensor()), 2 * first, rtol=1e-2, atol=1e-2)


def test_the_examples_memory_is_free() -> None:
    """A captured function keeps the structure of the example, and not its tensors."""
    example = batch(50)
    held = [weakref.ref(value) for value in example.values() if isinstance(value, torch.Tensor)]
    frame = example["frame_id"] = Frame()
    held.append(weakref.ref(frame))
    with torch.no_grad():
        captured = ts.capture(Backbone().eval(), example, coords="voxel_coords")
        del example, frame
        gc.collect()
        assert [reference() for reference in held] == [None] * 3
        assert captured(batch(40))["point_features"].shape == (40, 16)


class Frame:
    """The batch may have an entry that the network does not read."""


def test_kernels_compile_as_they_are_launched_unless_processes_are_asked_for(monkeypatch):
    rehearsals = []

    def maps_only(device):
        rehearsals.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(_captured, "maps_only", maps_only)
    net = Backbone().eval()
    with torch.no_grad():
        for processes in (0, 1):
            ts.capture(net, batch(20), coords="voxel_coords", compile_processes=processes)
        assert not rehearsals
        ts.capture(net, batch(20), coords="voxel_coords", compile_processes=2)
    assert len(rehearsals) == 1
    with pytest.raises(ValueError, match="compile_processes"):
        ts.capture(net, batch(20), coords="voxel_coords", compile_processes=-1)
