"""Golden files: recordings of an original, for machines that cannot run the original.

Each original has one compressed ``.npz``. Every tensor is an array called
``<case>|<dtype>|<kind>|<name>``. The rest is one JSON text, with versions and device. The seeds
are the cases' names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parity.case import Recording
from tests.parity.originals import Original
from tests.parity.side import Job

FOLDER = Path(__file__).parent / "golden"
META = "meta"
KINDS = ("tensors", "coords")


def path_of(original: Original) -> Path:
    """Return the golden file of an original."""
    return FOLDER / f"{original.name}-{original.golden_target}.npz"


def save(path: Path, setting: dict[str, Any], recordings: dict[Job, Recording]) -> None:
    """Write recordings and how they were made."""
    arrays: dict[str, np.ndarray] = {}
    plain: dict[str, Any] = {}
    for job, recording in recordings.items():
        key = f"{job.case}|{job.precision}"
        plain[key] = {name: getattr(recording, name) for name in ("kept", "facts", "error")}
        for kind in KINDS:
            for name, value in getattr(recording, kind).items():
                # NumPy has no bfloat16.
                bits = value.dtype == torch.bfloat16
                path_in_file = f"{key}|{kind}|{name}" + "|bfloat16" * bits
                arrays[path_in_file] = (value.view(torch.int16) if bits else value).numpy()
    meta = json.dumps({"setting": setting, "recordings": plain})
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays, **{META: np.array(meta)})


def load(path: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Recording]]:
    """Return how the file was made, and recordings by case and dtype."""
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != META}
        meta = json.loads(str(file[META]))
    found = {tuple(key.split("|")): Recording(**plain) for key, plain in meta["recordings"].items()}
    for name, value in arrays.items():
        case, precision, kind, tensor, *bits = name.split("|")
        getattr(found[case, precision], kind)[tensor] = (
            value.view(torch.bfloat16) if bits else value
        )
    return meta["setting"], found
