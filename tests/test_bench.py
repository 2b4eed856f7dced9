"""The benchmark: one process for each precision of float32."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonspconv.bench import command, layers
from tritonspconv.bench.allocated import peak_of
from tritonspconv.bench.networks import SAVING, NetworkBench, saving_cases
from tritonspconv.bench.peers import OURS, load_peer
from tritonspconv.bench.report import Cell, Report, command_line
from tritonspconv.bench.scenes import SceneStore
from tritonspconv.bench.timing import Measurement, Meter
from tritonspconv.cli.main import main


@pytest.mark.parametrize("scene", ["waymo_b4", "sphere", "kitti"])
def test_no_process_measures_float32_and_tf32(scene: str) -> None:
    """Spconv's tuner keeps its first choice for a shape if SPCONV_ALLOW_TF32 changes later."""
    dtypes = {dtype for _, dtype in layers._channels(scene, False, True)}
    assert "tf32" not in dtypes
    assert scene != "waymo_b4" or {"float32", "float16", "bfloat16"} <= dtypes


def test_the_process_of_tf32_gets_the_same_arguments() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(
        [
            "layers",
            "tf32",
            "--quick",
            "--clock",
            "cpu",
            "--max-points",
            "9",
            "--only",
            "a b",
            "--device",
            "cuda",
        ]
    )
    line = command._arguments_apart(given, Path("tf32.json"))
    assert line[0] == "bench"
    found = parser.parse_args(line[1:])
    assert found.sections == ["tf32"]
    assert found.json == Path("tf32.json")
    for name in (
        "quick",
        "clock",
        "max_points",
        "only",
        "device",
        "peers",
        "waymo",
        "sphere_radius",
    ):
        assert getattr(found, name) == getattr(given, name), name


def test_rows_of_another_process_are_kept() -> None:
    there = Report(["ours", "spconv"], {})
    there.begin("tf32", "a title", ("scene", "pass"), [("kitti", "fwd")])
    cell = Cell("ok", Measurement.of([1.0, 2.0, 4.0], "ms"), {"out": 1e-4})
    there.add(("kitti", "fwd"), {"ours": cell, "spconv": Cell("error", None, {}, "no")})
    here = Report(["ours", "spconv"], {})
    here.adopt(json.loads(json.dumps(there.content())))
    assert here.sections[0].rows == there.sections[0].rows
    assert here.sections[0].title == "a title"


def test_a_cpu_has_no_tf32(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tf32", "--device", "cpu", "--peers", "ours"]) == 0
    assert "tf32: needs a GPU" in capsys.readouterr().out


def test_a_footprint_has_what_graphs_keep_and_a_call_takes(monkeypatch) -> None:
    """The first run keeps 5 MiB and needs 100 for a moment; each run takes 2."""
    state = {"kept": 0, "peak": 0}
    mib = 2**20

    def run() -> None:
        state["peak"] = max(state["peak"], state["kept"] + (2 if state["kept"] else 100) * mib)
        state["kept"] = 5 * mib

    for name, value in {
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device=None: 7 * mib + state["kept"],
        "reset_peak_memory_stats": lambda device=None: state.update(peak=state["kept"]),
        "max_memory_reserved": lambda device=None: 7 * mib + state["peak"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    meter = Meter(torch.device("cuda"), quick=True)
    assert meter.footprint.once(run) == [7.0]
    with pytest.raises(RuntimeError, match="needs a GPU"):
        Meter(torch.device("cpu"), quick=True).footprint.once(run)


def test_processor_time_is_that_of_the_work() -> None:
    meter = Meter(torch.device("cpu"), quick=True, clock="cpu")
    assert meter.wall.alone(lambda: time.sleep(0.2)).median < 100
    assert Meter(torch.device("cpu"), quick=True).wall.alone(lambda: time.sleep(0.2)).median > 100


def test_clocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'cpu' measures work on a CPU; got device cuda"):
        Meter(torch.device("cuda"), quick=True, clock="cpu")
    with pytest.raises(ValueError, match=r"one of \('wall', 'cpu'\); got 'sun'"):
        Meter(torch.device("cpu"), quick=True, clock="sun")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/somewhere/tritonspconv/__main__.py", "bench", "--only", "a b"],
         "tritonspconv bench --only 'a b'"),
        (["/somewhere/bin/tritonspconv", "tune"], "tritonspconv tune"),
        (["/somewhere/minkowski.py"], "python minkowski.py"),
    ],
)  # fmt: skip
def test_reports_name_the_command_without_its_folder(arguments, shown, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    assert command_line() == shown


@pytest.mark.parametrize("captured", [False, True])
def test_saving_networks_compute_again_in_training_alone(captured) -> None:
    device = torch.device("cpu")
    scenes = SceneStore(device, None, None, 16, 4000)
    peer = load_peer(OURS, device)
    name, plain = list(SAVING.items())[captured]
    names = [case.labels[0] for case in saving_cases(scenes, [peer], captured=captured)]
    assert names == [plain, name, plain, name]
    scene = scenes["waymo_unet"]

    def replaced(name: str, training: bool) -> list[str]:
        network = NetworkBench(name, scene, peer, "float32", training).network
        return [path for path, module in network.named_modules() if "forward" in vars(module)]

    assert replaced(name, training=True)
    assert replaced(name, training=False) == replaced(plain, training=True) == []


MIB = 2**20
needs_mallinfo = pytest.mark.skipif(sys.platform != "linux", reason="reads GNU's allocator")


@needs_mallinfo
def test_allocated_memory_counts_whoever_allocates_it() -> None:
    """Memory that is free when the call begins counts again; memory given back does not."""
    freed = [torch.ones(MIB, dtype=torch.uint8) for _ in range(64)]
    freed.clear()

    def call() -> None:
        torch.ones(48 * MIB, dtype=torch.uint8)
        held = torch.ones(32 * MIB, dtype=torch.uint8), np.ones(32 * MIB, np.uint8)
        time.sleep(0.05)
        assert len(held) == 2

    assert 64 * MIB <= peak_of(call) < 66 * MIB


@needs_mallinfo
def test_allocated_memory_of_a_result_counts() -> None:
    assert 32 * MIB <= peak_of(lambda: torch.ones(32 * MIB, dtype=torch.uint8)) < 34 * MIB


def test_allocated_memory_needs_the_allocator_of_gnu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    with pytest.raises(RuntimeError, match="is measured by mallinfo2"):
        peak_of(lambda: None)
