"""``cumm.tensorview.gemm``: the activations that a convolution's ``act_type`` takes."""

from compat.spconv.core import Activation

__all__ = ["Activation"]
