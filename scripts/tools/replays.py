"""Call a captured network thousands of times with random scans, and compare each call with eager.

  python -m scripts.tools.replays                     # on a GPU
  python -m scripts.tools.replays --calls 40 --device cpu

Every call has another number of voxels. Some calls have none, some have more than the graph has
room for, and some reach too many sites in a strided layer; those run eagerly. The results must have
the bits of eager results. After a tenth of the calls the memory of the device and of the process
must not grow, and no kernel may be compiled. The exit status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings

import torch

import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv.models.lidar import second_encoder

SHAPE = (41, 400, 352)
ROOM = 20_000
# The process may grow by this much: its allocator keeps what it was given.
MOST_GROWTH = 64 << 20


def main() -> int:
    """Run the calls; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    warnings.filterwarnings("ignore", message="captured function")
    torch.manual_seed(0)
    network = second_encoder(spconv).to(device, dtype).eval()
    ts.optimize(network)

    def encode(x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        return network(x)[0]

    generator = torch.Generator().manual_seed(0)
    start, wrong = time.perf_counter(), 0
    settled: tuple[int, int, int] | None = None
    with torch.no_grad():
        fast = ts.capture(
            encode, scan(12_000, False, device, dtype), modules=[network], capacities=[ROOM]
        )
        for call in range(args.calls):
            rows = int(torch.randint(0, int(1.05 * ROOM), (), generator=generator))
            rows = 0 if call % 97 == 0 else rows
            x = scan(rows, call % 31 == 0, device, dtype, generator)
            found, expected = fast(x), encode(x)
            wrong += not torch.equal(found.features, expected.features)
            wrong += not torch.equal(found.indices, expected.indices)
            if call == args.calls // 10:
                settled = used(device)
    assert settled is not None
    growth = [now - before for now, before in zip(used(device), settled, strict=True)]
    seconds = time.perf_counter() - start
    print(f"{args.calls:,} calls in {seconds:.0f} s, {fast.replays:,} by graphs")
    print(f"  {wrong} tensors differ from eager ones")
    for reason, count in fast.eager_calls.items():
        print(f"  eager {count:,} times: {reason}")
    print(f"growth since call {args.calls // 10}: {growth[0] / 2**20:.1f} MiB on the device, "
          f"{growth[1] / 2**20:.1f} MiB in the process, {growth[2]} compiled kernels")  # fmt: skip
    return int(bool(wrong) or growth[0] > 0 or growth[1] > MOST_GROWTH or growth[2] > 0)


def scan(
    rows: int,
    spread: bool,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> spconv.SparseConvTensor:
    """Return voxels of a flat layer; where they are spread, strided layers reach more sites."""
    depth, height, width = SHAPE if spread else (6, 250, 250)
    cells = torch.randint(0, depth * height * width, (rows,), generator=generator).unique()
    place = torch.unravel_index(cells, (depth, height, width))
    indices = torch.stack([torch.zeros_like(cells), *place], dim=1).int().to(device)
    feats = torch.randn(len(cells), 4, generator=generator).to(device, dtype)
    return spconv.SparseConvTensor(feats, indices, list(SHAPE), 1)


def used(device: torch.device) -> tuple[int, int, int]:
    """Return bytes on the device, bytes of the process, and number of compiled kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        reserved = torch.cuda.memory_reserved(device)
        from tritonspconv.kernels.triton._launch import compiled_kernels

        kernels = len(compiled_kernels())
    else:
        reserved = kernels = 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return reserved, resident, kernels


if __name__ == "__main__":
    sys.exit(main())
