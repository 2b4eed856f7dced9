"""Run a program in which the import names of spconv or MinkowskiEngine mean the adapter.

  tritonspconv run --as spconv -- tools/train.py --epochs 80
  tritonspconv run --as MinkowskiEngine -- -m package.train
  torchrun --nproc-per-node 8 -m tritonspconv run --as spconv -- tools/train.py

The program's worker processes get the same names. The arguments of "python" follow "--". A
module called compat in the program's folder does not take the place of the adapters.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NoReturn


def start(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by Python running the program.

    Args:
        arguments: The arguments behind ``tritonspconv run``.
    """
    runner = importlib.import_module("tritonspconv.compat.__main__")
    runner.main(arguments, module="tritonspconv", description=__doc__)
    raise AssertionError("the program has taken the place of this process")
