"""Show where a network's time and memory go, layer by layer, and what bounds the network.

  tritonspconv profile second scan.bin --html profile.html
  tritonspconv profile minkunet --eval --trace trace.json     # for chrome://tracing or Perfetto
  tritonspconv profile mypackage.nets:build scan.bin
  tritonspconv profile train.py --args "--epochs 1"           # the network that a script runs

NETWORK is second, unet (through compat.spconv), minkunet (through compat.minkowski),
MODULE:FACTORY, or a script. A factory takes no argument and returns a network of compat.spconv,
compat.minkowski, tritonspconv.nn, or of the originals. The network gets the voxels of the scan with
four features. A script runs until its network has run --call times; its last forward pass is
measured.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
from tritonspconv.cli.convert import build_model
from tritonspconv.cli.errors import CommandError
from tritonspconv.demo.layer_profile import print_columns
from tritonspconv.demo.scenes import (
    add_scan_arguments,
    at_least_one,
    choose_device,
    read_scans,
    second_shape,
    unet_shape,
    voxelize,
)
from tritonspconv.models.lidar import second_encoder, sparse_unet
from tritonspconv.models.minkowski import mink_unet
from tritonspconv.points import VoxelGrid, voxel_range
from tritonspconv.profile.layers import NetworkProfile, profile_network
from tritonspconv.profile.page import write_profile
from tritonspconv.profile.script import profile_script
from tritonspconv.profile.words import verdicts
from tritonspconv.sparse_tensor import SparseTensor

HEAD = [
    "layer", "type", "sites in", "sites out", "nbrs/site", "map", "ms", "map ms", "product ms",
    "host ms", "bandwidth", "rate", "memory MiB",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("network", help="second, unet, minkunet, MODULE:FACTORY or SCRIPT.py")
    add_scan_arguments(parser)
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=at_least_one, default=1, help="scans (default 1)")
    parser.add_argument("--passes", type=at_least_one, default=3, help="timed passes (default 3)")
    parser.add_argument(
        "--eval", action="store_true", help="evaluation mode without gradients; no backward pass"
    )
    parser.add_argument("--args", default="", help="what a script finds in sys.argv")
    parser.add_argument("--call", type=at_least_one, default=3, help="of a script (default 3)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with bars")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Profile; return the exit status and the report."""
    if args.network.endswith(".py"):
        if args.trace is not None or args.scan is not None:
            raise CommandError("a script brings its own data, and no --trace is made of it")
        try:
            profile = profile_script(Path(args.network), shlex.split(args.args), call=args.call)
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library not in _ORIGINALS:
                raise
            raise CommandError(
                f"the script imports {library}, which is not installed. To run it with the adapter "
                f"instead: tritonspconv run --as {library} -- -m tritonspconv profile "
                f"{args.network}"
            ) from error
        return _report(args, profile, f"{Path(args.network).name}, forward pass {args.call}")
    device = choose_device(args.device)
    network, library = _network(args.network)
    scans = read_scans(args, args.batch_size)
    grid = voxel_range(scans[0])
    feats, indices = voxelize(scans, grid, device)
    network = network.to(device).train(not args.eval)
    make_input = _maker(library, args.network, feats, indices, grid, args.batch_size)
    profile = profile_network(
        network, make_input, device, backward=not args.eval, passes=args.passes, trace=args.trace
    )
    title = f"{args.network} on {args.scan.name if args.scan else 'a simulated street'}"
    return _report(args, profile, title)


def _report(
    args: argparse.Namespace, profile: NetworkProfile, title: str
) -> tuple[int, dict[str, Any]]:
    """Print, and write the files that were asked for."""
    rows = table(profile)
    shown = [
        row for row, layer in zip(rows[1:], profile.layers, strict=True) if layer.role == "sparse"
    ]
    print_columns(tuple(rows[0]), [tuple(row) for row in shown], left=2)
    sentences = verdicts(profile)
    # A script's own backward pass, and that of evaluation mode, are not measured.
    backward = f", backward {profile.backward_ms:,.1f} ms" if profile.backward_ms else ""
    print(
        f"\nfree-running: forward {profile.forward_ms:,.1f} ms{backward}; layers one by one: "
        f"{profile.total('ms'):,.1f} ms forward"
    )
    print(*(f"- {sentence}" for sentence in sentences), sep="\n")
    if args.html is not None:
        write_profile(args.html, title, profile, sentences, rows)
        print(f"wrote {args.html}")
    if args.trace is not None:
        print(f"wrote {args.trace}")
    return 0, {"network": args.network, **asdict(profile), "verdicts": sentences}


def table(profile: NetworkProfile) -> list[list[str]]:
    """Return the head and one row of texts for each layer, without columns that say nothing.

    On a CPU these are the memory, which is not measured, and the time of the host, which is the
    time of the layer.
    """
    rows = [HEAD]
    for layer in profile.layers:
        sparse = layer.role == "sparse"
        seconds = layer.product_ms / 1e3 or float("inf")
        moved, worked = layer.moved_bytes / seconds, layer.flops / seconds
        rows.append(
            [
                layer.name,
                layer.kind,
                f"{layer.sites_in:,}",
                f"{layer.sites_out:,}",
                f"{layer.pairs / max(1, layer.sites_out):.1f}" if layer.pairs else "-",
                ("built" if layer.maps_built else "reused") if layer.pairs else "-",
                f"{layer.ms:.2f}",
                f"{layer.map_ms:.2f}" if sparse else "-",
                f"{layer.product_ms:.2f}" if sparse else "-",
                f"{layer.host_ms:.2f}",
                f"{100 * moved / profile.bandwidth:.0f} %" if sparse else "-",
                f"{100 * worked / profile.rate:.0f} %" if sparse else "-",
                f"{layer.added_bytes / 2**20:.1f}" if layer.added_bytes else "-",
            ]
        )
    if not any(layer.added_bytes for layer in profile.layers):
        rows = [row[:-1] for row in rows]
    if profile.device == "CPU":
        host = HEAD.index("host ms")
        rows = [row[:host] + row[host + 1 :] for row in rows]
    return rows


def _network(name: str) -> tuple[nn.Module, str]:
    """Return the network and the library of its input tensors."""
    torch.manual_seed(0)
    if name == "second":
        return second_encoder(spconv), "compat.spconv"
    if name == "unet":
        return sparse_unet(spconv), "compat.spconv"
    if name == "minkunet":
        return mink_unet(ME, depth=14), "compat.minkowski"
    if ":" not in name:
        raise CommandError(
            f"network must be second, unet, minkunet, module:factory or a script that ends in .py; "
            f"got {name!r}"
        )
    try:
        network = build_model(name, "network")
    except TypeError as error:
        raise CommandError(str(error)) from error
    names = [type(module).__module__ for module in network.modules()]
    for library in ("compat.spconv", "compat.minkowski", "tritonspconv.nn", *_ORIGINALS):
        if any(found == library or found.startswith(f"{library}.") for found in names):
            return network, library
    raise CommandError(f"{name} must hold layers of a sparse library; it holds none that is known")


_ORIGINALS = ("spconv", "MinkowskiEngine")


def _maker(
    library: str,
    name: str,
    feats: Tensor,
    indices: Tensor,
    grid: VoxelGrid,
    batch_size: int,
) -> Callable[[], Any]:
    """Return a function that makes a new input tensor of the library."""
    shape = second_shape(grid) if name == "second" else unet_shape(grid)
    if library in ("compat.minkowski", "MinkowskiEngine"):
        module = ME
        if library == "MinkowskiEngine":
            import MinkowskiEngine as module  # pyright: ignore[reportMissingImports]
        return lambda: module.SparseTensor(feats, coordinates=indices)
    if library == "tritonspconv.nn":
        return lambda: SparseTensor(feats, indices, spatial_shape=shape, batch_size=batch_size)
    module = spconv
    if library == "spconv":
        import spconv.pytorch as module  # pyright: ignore[reportMissingImports]
    return lambda: module.SparseConvTensor(feats, indices, shape, batch_size)
