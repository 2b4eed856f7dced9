"""Files of tiles: how `tritonspconv tune` makes them, and how launches use them."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests._process import ROOT, run
from tritonspconv.kernels.triton import configs, gather_gemm, tuned_tiles, weight_grad
from tritonspconv.kernels.triton._launch import bind
from tritonspconv.kernels.triton.configs import GemmConfig
from tritonspconv.testing import assert_close

CARD = configs.card_of(torch.device("cpu"))
NARROW, WIDE = GemmConfig(16, 16, 16, 2, 2), GemmConfig(256, 16, 16, 8, 2)
PROBLEM = tuned_tiles.problem("gather_gemm", torch.float32, 0, 3, 5)


def entry(log2_rows: int, tile: GemmConfig, **other: object) -> dict[str, object]:
    return {**PROBLEM._asdict(), "log2_rows": log2_rows, "tile": tile._asdict(), **other}


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Return a function that makes launches use a file with the given entries."""

    def use(*entries: dict[str, object], card: configs.Card = CARD) -> None:
        content = {"device": "a card", "card": card._asdict(), "tiles": entries}
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps(content))
        monkeypatch.setenv(tuned_tiles.VARIABLE, str(path))
        tuned_tiles.read_tiles.cache_clear()

    yield use
    tuned_tiles.read_tiles.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_launches():
    """Clear the bound kernels, so that launches of different tests do not share them."""
    caches = [gather_gemm._bind, weight_grad._bind]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("log2_rows", "expected"), [(1, NARROW), (10, NARROW), (13, NARROW), (14, WIDE), (30, WIDE)]
)
def test_the_tile_of_the_nearest_number_of_rows_is_taken(use, log2_rows, expected):
    use(entry(10, NARROW), entry(16, WIDE))
    assert tuned_tiles.tuned_tile(PROBLEM, log2_rows, CARD) == expected


def test_without_a_file_or_an_entry_the_fixed_choice_stands(use, monkeypatch):
    use(entry(10, NARROW))
    assert tuned_tiles.tuned_tile(PROBLEM._replace(c_out=6), 10, CARD) is None
    monkeypatch.delenv(tuned_tiles.VARIABLE)
    assert tuned_tiles.tuned_tile(PROBLEM, 10, CARD) is None


def test_a_file_of_another_card_is_refused(use):
    use(entry(10, NARROW), card=CARD._replace(shared_bytes=4096))
    with pytest.raises(RuntimeError, match=r"holds tiles for a card .*Run tritonspconv tune here"):
        tuned_tiles.tuned_tile(PROBLEM, 10, CARD)


@pytest.mark.parametrize("text", ["", "{}", '{"device": "x", "card": {}, "tiles": []}'])
def test_what_is_no_file_of_tiles_is_refused(use, tmp_path, text):
    use()
    (tmp_path / "tiles.json").write_text(text)
    with pytest.raises(ValueError, match=r"must be a file that tritonspconv tune wrote"):
        tuned_tiles.tuned_tile(PROBLEM, 10, CARD)


def test_launches_run_the_tiles_of_the_file(use, triton_device, monkeypatch):
    bound = []
    for module in (gather_gemm, weight_grad):
        monkeypatch.setattr(
            module, "bind", lambda kernel, **meta: bound.append(meta) or bind(kernel, **meta)
        )
    grad_problem = PROBLEM._replace(op="weight_grad")._asdict()
    weight_tile = entry(6, WIDE._replace(block_k=32), **grad_problem)
    use(entry(6, NARROW), weight_tile, card=configs.card_of(triton_device))
    n = 40
    rows = torch.arange(n, dtype=torch.int32, device=triton_device)[None]
    mask = torch.ones(1, n, dtype=torch.int32, device=triton_device)
    feats = torch.randn(n, 3, device=triton_device)
    grad = torch.randn(n, 5, device=triton_device)
    weight = torch.randn(1, 3, 5, device=triton_device)
    out = gather_gemm.gather_gemm(feats, weight, None, rows, mask, None, mirrored=False)
    assert_close(out, feats.double() @ weight[0].double(), eager=feats @ weight[0])
    tap_ptr = torch.tensor([0, n], device=triton_device)
    pairs = torch.cat([rows, rows])
    found = weight_grad.weight_grad(
        feats, grad, pairs, tap_ptr, torch.empty_like(weight), mirrored=False
    )
    assert_close(found[0], feats.double().T @ grad.double(), eager=feats.T @ grad)
    tiles = [tuple(meta[f"BLOCK_{axis}"] for axis in "MNK") for meta in bound if "BLOCK_K" in meta]
    assert tiles == [(16, 16, 16), (256, 16, 32)]


@pytest.fixture
def tune():
    """Return the script as a module."""
    return importlib.import_module("tritonspconv.cli.tune")


def test_the_search_finds_the_fastest_tile_that_is_right(tune, capsys):
    best = GemmConfig(64, 32, 64, 8, 3)
    wrong = best._replace(block_m=128)
    ran = []

    def run(tile: GemmConfig) -> torch.Tensor:
        ran.append(tile)
        return torch.tensor([2.0 if tile == wrong else 1.0])

    def steps_from_best(tile: GemmConfig) -> int:
        places = zip(tune.STEPS.values(), tile, best, strict=True)
        return sum(abs(values.index(a) - values.index(b)) for values, a, b in places)

    def layer(call) -> SimpleNamespace:
        call()
        return SimpleNamespace(median=0.1 if ran[-1] == wrong else 1.0 + steps_from_best(ran[-1]))

    meter = SimpleNamespace(layer=SimpleNamespace(alone=layer), synchronize=lambda: None)
    fixed = GemmConfig(128, 128, 32, 4, 5)
    launch = tune.TunableLaunch(PROBLEM, 10, fixed, run)
    assert tune.search(launch, 1e-3, meter) == (best, 1.0, 1.0 + steps_from_best(fixed))
    assert wrong in ran
    assert "7.000 to 1.000 ms" in capsys.readouterr().out


def test_the_script_writes_a_file_that_launches_can_use(tmp_path, triton_device):
    path = tmp_path / "tiles.json"
    interpret = "1" if triton_device.type == "cpu" else "0"
    # The second run keeps the entries of the first.
    for channels in ("3:5", "2:2"):
        result = run(
            "-m", "tritonspconv", "tune", path, "--channels", channels, "--dtypes", "float32",
            "--ops", "gather_gemm", "--max-points", "300", "--rows", "20",
            "--device", triton_device, cwd=ROOT, TRITON_INTERPRET=interpret,
        )  # fmt: skip
        assert f"gather_gemm float32 0 {channels.replace(':', ' ')}, 2**5:" in result.stdout
    file = tuned_tiles.read_tiles(str(path))
    assert file.card == configs.card_of(triton_device)
    known = [PROBLEM, PROBLEM._replace(c_in=5, c_out=3), PROBLEM._replace(c_in=2, c_out=2)]
    assert set(file.tiles) <= set(known)
