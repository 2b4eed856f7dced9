"""``python -m tritonspconv``: what this installation runs on, and whether it computes rightly."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time

import torch
from torch import Tensor

from tritonspconv import ActiveSites, ConvGeometry, Grid, __version__, kernel_map, ops, reference
from tritonspconv.kernels import has_triton
from tritonspconv.testing import assert_matches, random_sites

_DESCRIPTION = """\
Show versions, devices and what runs on them, and check a layer of each kind on every device,
forward and backward, against brute force in float64. The exit status is 1 if a result is wrong.
On a GPU the kernels are compiled first, which takes some seconds.
"""
_GEOMETRIES = {
    "submanifold": ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)),
    "strided": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "transposed": ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), transposed=True),
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> int:
    """Print the report; return the exit status."""
    argparse.ArgumentParser(
        prog="python -m tritonspconv",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    for name, value in _versions():
        _say(f"{name:14}{value}")
    failed = False
    for device in devices:
        _say(f"\n{device}: {_describe(device)}")
        for kind, geometry in _GEOMETRIES.items():
            failed |= _check(kind, geometry, device)
    _say("\nSomething is wrong: please report it with this output." if failed else "\nAll is well.")
    return int(failed)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _versions() -> list[tuple[str, str]]:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed; GPUs need it, CPUs do not"
    return [
        ("tritonspconv", __version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {built}"),
        ("Triton", triton),
        ("kernel cache", os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")),
    ]


def _describe(device: torch.device) -> str:
    """Return the device's name, and which kernels run on it."""
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads, vectorised torch"
    properties = torch.cuda.get_device_properties(device)
    arch = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
    if not has_triton(device):
        kernels = "vectorised torch: Triton kernels need sm_80 or newer"
    else:
        from tritonspconv.kernels.triton._versions import hands_values

        kernels = f"Triton kernels, {'direct' if hands_values else 'ordinary'} launches"
    return f"{properties.name} ({arch}, {properties.total_memory >> 30} GiB), {kernels}"


def _check(kind: str, geometry: ConvGeometry, device: torch.device) -> bool:
    """Print how a layer does in each dtype; return whether one is wrong."""
    torch.manual_seed(0)
    sites = random_sites(200, extent=9)
    moved = ActiveSites(sites.coords.to(device), sites.grid)
    failed = False
    for dtype in _DTYPES:
        start = time.perf_counter()
        try:
            _compare(moved, geometry, dtype)
            verdict = "right"
        except AssertionError as error:
            verdict, failed = f"WRONG: {error}", True
        except Exception as error:
            verdict, failed = f"FAILED: {type(error).__name__}: {error}", True
        seconds = time.perf_counter() - start
        _say(f"  {kind:12} {str(dtype).removeprefix('torch.'):9} {seconds:5.1f} s  {verdict}")
    return failed


def _compare(sites: ActiveSites, geometry: ConvGeometry, dtype: torch.dtype) -> None:
    """Raise an AssertionError where output or a gradient is not what brute force gives."""
    found = kernel_map(sites, geometry)
    volume, c_in, c_out = found.kernel_volume, 12, 20
    feats = torch.randn(found.n_in, c_in).to(sites.device, dtype).requires_grad_()
    weight = torch.randn(volume, c_in, c_out).to(sites.device, dtype).requires_grad_()
    grad = torch.randn(found.n_out, c_out).to(sites.device, dtype)
    out = ops.sparse_conv(feats, weight, found)
    grads = torch.autograd.grad(out, (feats, weight), grad)
    boxes = [_box(side.grid) for side in (found.in_sites, found.out_sites)]
    triples = reference.relation(
        found.in_sites.coords.cpu(), found.out_sites.coords.cpu(), geometry.kernel_size,
        geometry.stride, geometry.padding, geometry.dilation, transposed=geometry.transposed,
        submanifold=geometry.sites == "same", in_box=boxes[0], out_box=boxes[1],
    )  # fmt: skip
    in_rows, out_rows, taps = torch.tensor(triples).unbind(1)

    def forward(x: Tensor, w: Tensor) -> Tensor:
        products = torch.bmm(x[in_rows, None], w[taps])[:, 0]
        return products.new_zeros(found.n_out, c_out).index_add(0, out_rows, products)

    def grad_feats(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        products = torch.bmm(g[out_rows, None], w[taps].mT)[:, 0]
        return torch.zeros_like(x).index_add(0, in_rows, products)

    def grad_weight(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        products = x[in_rows, :, None] * g[out_rows, None]
        return torch.zeros_like(w).index_add(0, taps, products)

    assert_matches(out, forward, feats, weight, name="output")
    inputs = feats, weight, grad
    assert_matches(grads[0], grad_feats, *inputs, name="gradient of the features")
    assert_matches(grads[1], grad_weight, *inputs, name="gradient of the weight")


def _box(grid: Grid) -> reference.Box:
    return reference.Box(grid.lower, grid.shape, grid.batch_size)


if __name__ == "__main__":
    sys.exit(main())
