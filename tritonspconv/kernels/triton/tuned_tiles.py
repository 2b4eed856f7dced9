"""Tiles that `tritonspconv tune` found, from a file that the user names. Nothing is timed here.

The environment variable ``TRITONSPCONV_TILES`` names the file. It is read once, at the first launch
of a matrix kernel. `configs.py` chooses where no file is named, or the file lacks the channels.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tritonspconv.kernels.triton.configs import Card, GemmConfig

VARIABLE = "TRITONSPCONV_TILES"

MatrixOp = Literal["gather_gemm", "weight_grad"]


class Problem(NamedTuple):
    """The problem that a tile was found for, without the number of rows.

    Attributes:
        op: The kernel.
        dtype: The dtype of the operands, such as ``"float16"``. The dtype of float16 parts is
            float16.
        parts: float16 parts of each float32 operand, or 0.
        c_in: Input channels.
        c_out: Output channels.
    """

    op: MatrixOp
    dtype: str
    parts: int
    c_in: int
    c_out: int


class TileFile(NamedTuple):
    """The content of a file of tiles.

    Attributes:
        device: Name of the device that the tiles were found on.
        card: The card that the tiles fit.
        tiles: For each problem, the tiles by the ``log2_rows`` that they were found with.
    """

    device: str
    card: Card
    tiles: dict[Problem, dict[int, GemmConfig]]


def problem(op: MatrixOp, dtype: torch.dtype, parts: int, c_in: int, c_out: int) -> Problem:
    """Return the problem of a launch with operands of ``dtype``."""
    return Problem(op, str(dtype).removeprefix("torch."), parts, c_in, c_out)


def tuned_tile(wanted: Problem, log2_rows: int, card: Card) -> GemmConfig | None:
    """Return the tile found for the nearest number of rows, or None where there is none.

    Args:
        wanted: The problem.
        log2_rows: Bits of the number of output rows (fwd, dgrad) or of listed pairs (wgrad).
        card: The card that the tile must fit.

    Raises:
        RuntimeError: The file that the environment names was made on another kind of card.
        OSError: It cannot be read.
        ValueError: It is no file of tiles.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    file = read_tiles(path)
    if file.card != card:
        raise RuntimeError(
            f"{VARIABLE}={path} holds tiles for {file.device} ({file.card}); this device is "
            f"{card}. Run tritonspconv tune here, or unset the variable."
        )
    by_rows = file.tiles.get(wanted)
    if not by_rows:
        return None
    return by_rows[min(by_rows, key=lambda log2: (abs(log2 - log2_rows), log2))]


@functools.lru_cache(maxsize=8)
def read_tiles(path: str) -> TileFile:
    """Read a file of tiles; once for each path.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file of tiles.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        tiles: dict[Problem, dict[int, GemmConfig]] = {}
        for entry in content["tiles"]:
            wanted = Problem(*(entry[name] for name in Problem._fields))
            tile = GemmConfig(**entry["tile"])
            tiles.setdefault(wanted, {})[int(entry["log2_rows"])] = tile
        return TileFile(content["device"], Card(**content["card"]), tiles)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a file that tritonspconv tune wrote; reading it gave {error!r}."
        ) from error
