"""``MinkowskiEngine.utils.gradcheck``: torch's, for the original's autograd functions too."""

from __future__ import annotations

from typing import Any

import torch


def gradcheck(func: Any, inputs: Any, *args: Any, **kwargs: Any) -> bool:
    """Compare gradients with finite differences; see :func:`torch.autograd.gradcheck`.

    Args:
        func: A callable, or a class or object with ``apply``, which is then called.
        inputs: Its arguments, tensors in float64 where they require gradients.
        args: Passed on.
        kwargs: Passed on.
    """
    return torch.autograd.gradcheck(getattr(func, "apply", func), inputs, *args, **kwargs)
