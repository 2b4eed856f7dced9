"""Train a segmentation network on labelled scans and watch it.

  tritonspconv train                                  # made-up rooms, MinkUNet
  tritonspconv train --network spunet --data streets
  tritonspconv train --data semantickitti/dataset --dtype bfloat16
  tritonspconv train --resume                         # continue from train_out/checkpoint.pt

MinkUNet runs through compat.minkowski, SpUNet through compat.spconv; --original runs the library
itself where it is installed. After every epoch the curves, the predictions of two validation scans
and a checkpoint are written to --out. The same seed gives the same bits, and so does a resumed
training.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tritonspconv.cli.errors import CommandError
from tritonspconv.demo.scenes import DTYPES, at_least_one, choose_device, describe
from tritonspconv.models.lidar import sparse_unet
from tritonspconv.models.minkowski import mink_unet
from tritonspconv.training.data import CHANNELS, Sample, ScanSet, kitti_set, simulated_set
from tritonspconv.training.loop import Epoch, Forward, TrainingSettings, predict, train
from tritonspconv.training.pictures import Shown, draw_curves, draw_predictions

LIBRARIES = {
    "minkunet": ("compat.minkowski", "MinkowskiEngine"),
    "spunet": ("compat.spconv.pytorch", "spconv.pytorch"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--network", choices=LIBRARIES, default="minkunet")
    parser.add_argument("--original", action="store_true", help="run the original library")
    parser.add_argument(
        "--data", default="rooms", metavar="WHAT", help="rooms, streets, or a SemanticKITTI folder"
    )
    parser.add_argument("--scans", type=at_least_one, default=32, help="simulated, to learn from")
    parser.add_argument("--val-scans", type=at_least_one, default=8, help="simulated, to judge by")
    parser.add_argument("--voxel", type=float, metavar="M", help="side of a voxel in metres")
    parser.add_argument("--epochs", type=at_least_one, default=12, help="default 12")
    parser.add_argument("--batch-size", type=at_least_one, default=2, help="scans (default 2)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="default 0.004")
    parser.add_argument(
        "--narrow", type=at_least_one, default=4, help="divide all channels (default 4)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--out", type=Path, default=Path("train_out"), help="default train_out")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Train; return the exit status and the report."""
    device = choose_device(args.device)
    checkpoint = args.out / "checkpoint.pt"
    if args.resume and not checkpoint.is_file():
        raise CommandError(f"--resume needs {checkpoint}; there is no such file. Train first.")
    settings = TrainingSettings(
        args.epochs, args.batch_size, args.learning_rate, dtype=DTYPES[args.dtype], seed=args.seed
    )
    train_set, val_set = _sets(args)
    names = train_set.class_names
    library = _library(args)
    torch.manual_seed(args.seed)
    build = mink_unet if args.network == "minkunet" else sparse_unet
    extra = {"depth": 14} if args.network == "minkunet" else {}
    network = build(library, CHANNELS, len(names), channel_divisor=args.narrow, **extra).to(device)
    forward = _forward(args.network, library)
    count = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{args.network} through {library.__name__} on {describe(device)}, {args.dtype}: "
        f"{count / 1e6:.2f} M weights, {train_set.count} scans, {val_set.count} to judge by",
        flush=True,
    )

    def report(epoch: Epoch) -> None:
        print(
            f"epoch {epoch.number:3}: loss {epoch.loss:.3f}, mIoU {100 * epoch.miou:5.1f} %, "
            f"{epoch.seconds:.1f} s",
            flush=True,
        )

    epochs = train(
        network, forward, train_set, val_set, settings, device,
        checkpoint=checkpoint, resume=args.resume, report=report,
    )  # fmt: skip
    _draw(args, network, forward, val_set, epochs, device, settings.dtype)
    for name, iou in zip(names, epochs[-1].iou, strict=True):
        print(f"  {name:14} {'-' if iou != iou else f'{100 * iou:5.1f} %'}")
    print(f"wrote {args.out}/curves.png, predictions.png, checkpoint.pt")
    report_data = {"classes": names, "epochs": [asdict(epoch) for epoch in epochs]}
    return 0, {"library": library.__name__, "device": describe(device), **report_data}


def _sets(args: argparse.Namespace) -> tuple[ScanSet, ScanSet]:
    if args.data in ("rooms", "streets"):
        return (
            simulated_set(args.data, "train", args.scans, args.voxel),
            simulated_set(args.data, "val", args.val_scans, args.voxel),
        )
    size = args.voxel or 0.1
    return kitti_set(args.data, "train", size), kitti_set(args.data, "val", size)


def _library(args: argparse.Namespace) -> ModuleType:
    ours, original = LIBRARIES[args.network]
    if args.original and args.network == "minkunet":
        # MinkowskiEngine looks for names that Python 3.10 moved.
        import collections
        import collections.abc

        collections.Sequence = collections.abc.Sequence  # pyright: ignore
    try:
        return importlib.import_module(original if args.original else ours)
    except ImportError as error:
        raise CommandError(
            f"--original needs {original}, which is not installed: {error}"
        ) from error


def _forward(network: str, library: ModuleType) -> Forward:
    """Return a function that runs the network on a batch and returns logits in its order."""
    if network == "minkunet":

        def run_minkunet(net: nn.Module, batch: Sample) -> torch.Tensor:
            return net(library.SparseTensor(batch.feats, coordinates=batch.coords)).F

        return run_minkunet

    def run_spunet(net: nn.Module, batch: Sample) -> torch.Tensor:
        # The network halves the grid four times.
        largest = batch.coords.amax(dim=0).tolist()
        shape = [-(-(extent + 1) // 16) * 16 for extent in largest[1:]]
        x = library.SparseConvTensor(batch.feats, batch.coords, shape, largest[0] + 1)
        out, _ = net(x)
        return out.features

    return run_spunet


def _draw(
    args: argparse.Namespace,
    network: nn.Module,
    forward: Forward,
    val_set: ScanSet,
    epochs: list[Epoch],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install 'tritonspconv[demo]')")
        return
    title = args.network + (" (original)" if args.original else "")
    draw_curves(args.out / "curves.png", {title: epochs})
    shown = []
    for number in range(min(2, val_set.count)):
        sample = val_set.sample(number)
        found = predict(network, forward, sample, device, dtype)
        shown.append(Shown(sample.coords, sample.labels, found))
    draw_predictions(args.out / "predictions.png", shown, val_set.class_names)
