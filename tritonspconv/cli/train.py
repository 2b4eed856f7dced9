"""Train a network on labelled scans and watch it.

  tritonspconv train                                  # made-up rooms, MinkUNet
  tritonspconv train --network spunet --data streets
  tritonspconv train --network second                 # cars in made-up streets
  tritonspconv train --data semantickitti/dataset --dtype bfloat16
  tritonspconv train --backend ours original          # both, and their curves in one plot
  tritonspconv train --resume                         # continue from train_out/checkpoint.pt
  torchrun --nproc-per-node 2 -m tritonspconv train --batch-size 4

MinkUNet runs through compat.minkowski, SpUNet and SECOND through compat.spconv. --data is rooms,
streets, or a folder: of SemanticKITTI or ScanNet for minkunet and spunet, in KITTI's detection
format for second. After every epoch a checkpoint is written to --out; at the end the curves, and a
picture of two validation scans. The same seed gives the same bits, and so does a resumed training.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tritonspconv.cli.errors import CommandError
from tritonspconv.cli.train_tasks import BACKENDS, LIBRARIES, Experiment, experiments
from tritonspconv.demo.scenes import DTYPES, at_least_one, choose_device, describe
from tritonspconv.training.detection import Detection
from tritonspconv.training.loop import Epoch, TrainingSettings, autocast, fit
from tritonspconv.training.pictures import Shown, ShownBoxes, draw_boxes, draw_curves
from tritonspconv.training.pictures import draw_predictions as draw_classes
from tritonspconv.training.segmentation import Segmentation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--network", choices=LIBRARIES, default="minkunet")
    parser.add_argument(
        "--backend", choices=BACKENDS, nargs="+", default=["ours"],
        help="run the adapter, the original library, or one after the other (default ours)",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        metavar="WHAT",
        help="rooms, streets, or a folder (default: what the network is for)",
    )
    parser.add_argument("--scans", type=at_least_one, default=32, help="simulated, to learn from")
    parser.add_argument("--val-scans", type=at_least_one, default=8, help="simulated, to judge by")
    parser.add_argument("--voxel", type=_length, metavar="M", help="side of a voxel in metres")
    parser.add_argument("--epochs", type=at_least_one, default=12, help="default 12")
    parser.add_argument("--batch-size", type=at_least_one, default=2, help="scans (default 2)")
    parser.add_argument("--learning-rate", type=_length, default=4e-3, help="default 0.004")
    parser.add_argument(
        "--narrow",
        type=int,
        choices=(1, 2, 4, 8, 16),
        help="divide all channels (default 4; second 2)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--out", type=Path, default=Path("train_out"), help="default train_out")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument(
        "--capture", action=argparse.BooleanOptionalAction,
        help="run training steps through tritonspconv.capture, as CUDA graphs (default: on a GPU)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Train; return the exit status and the report."""
    args.narrow = args.narrow or (2 if args.network == "second" else 4)
    args.backend = list(dict.fromkeys(args.backend))
    with _processes(args) as (device, is_first):
        if args.capture is None:
            args.capture = device.type == "cuda"
        return _run(args, device, is_first)


def _run(
    args: argparse.Namespace, device: torch.device, is_first: bool
) -> tuple[int, dict[str, Any]]:
    if args.resume:
        for backend in args.backend:
            if not _checkpoint(args, backend).is_file():
                raise CommandError(
                    f"--resume needs {_checkpoint(args, backend)}; there is no such file. Train "
                    "first."
                )
    settings = TrainingSettings(
        args.epochs, args.batch_size, args.learning_rate, dtype=DTYPES[args.dtype], seed=args.seed
    )
    made = experiments(args, device)
    curves: dict[str, list[Epoch]] = {}
    for experiment in made:
        _announce(args, experiment, device)

        def report(epoch: Epoch) -> None:
            print(
                f"epoch {epoch.number:3}: loss {epoch.loss:.3f}, {_score_name(args)} "
                f"{100 * epoch.score:5.1f} %, {epoch.seconds:.1f} s",
                flush=True,
            )

        title = f"{args.network} ({experiment.library})"
        curves[title] = fit(
            experiment.network, experiment.task, settings, device,
            checkpoint=_checkpoint(args, experiment.backend), resume=args.resume, report=report,
        )  # fmt: skip
        for name, score in curves[title][-1].parts.items():
            print(f"  {name:16} {'-' if score != score else f'{100 * score:5.1f} %'}")
    if is_first:
        _draw(args, made[0], curves, device, settings.dtype)
    runs = [
        {"library": x.library, "epochs": [asdict(epoch) for epoch in epochs]}
        for x, epochs in zip(made, curves.values(), strict=True)
    ]
    return 0, {"device": describe(device), "score": _score_name(args), "runs": runs}


@contextlib.contextmanager
def _processes(args: argparse.Namespace) -> Iterator[tuple[torch.device, bool]]:
    """Join the processes that torchrun started; yield the device, and whether this is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield choose_device(args.device), True
        return
    device = choose_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        is_first = dist.get_rank() == 0
        with contextlib.ExitStack() as stack:
            if not is_first:
                sink = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(sink))
            yield device, is_first
    finally:
        dist.destroy_process_group()


def _length(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number above zero; got {text!r}")
    return value


def _checkpoint(args: argparse.Namespace, backend: str) -> Path:
    return args.out / ("checkpoint.pt" if backend == "ours" else f"checkpoint-{backend}.pt")


def _score_name(args: argparse.Namespace) -> str:
    return "AP" if args.network == "second" else "mIoU"


def _announce(args: argparse.Namespace, experiment: Experiment, device: torch.device) -> None:
    count = sum(parameter.numel() for parameter in experiment.network.parameters())
    processes = dist.get_world_size() if dist.is_initialized() else 1
    shared = f", {processes} processes" if processes > 1 else ""
    print(
        f"{args.network} through {experiment.library} on {describe(device)}{shared}, {args.dtype}: "
        f"{count / 1e6:.2f} M weights, {experiment.task.train_count} scans, "
        f"{experiment.task.val_count} to judge by",
        flush=True,
    )
    if args.data in (None, "rooms", "streets") and not args.resume:
        print("epoch 1 takes longer than the others: it simulates the scans", flush=True)


@torch.no_grad()
def _draw(
    args: argparse.Namespace,
    experiment: Experiment,
    curves: dict[str, list[Epoch]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install 'tritonspconv[demo]')")
        return
    draw_curves(args.out / "curves.png", curves, _score_name(args))
    network, task = experiment.network.eval(), experiment.task
    numbers = range(min(2, task.val_count))
    with autocast(device, dtype):
        if isinstance(task, Segmentation):
            samples = [task.val_set.sample(number) for number in numbers]
            shown = [
                Shown(sample.coords, sample.labels, task.predict(network, sample, device))
                for sample in samples
            ]
            draw_classes(args.out / "predictions.png", shown, task.val_set.class_names)
        elif isinstance(task, Detection):
            scenes = [task.val_set.load(number) for number in numbers]
            found = [ShownBoxes(scene, *task.find(network, scene, device)) for scene in scenes]
            draw_boxes(args.out / "predictions.png", found, task.val_set.grid)
    print(f"wrote {args.out}/curves.png, predictions.png, checkpoint.pt")
