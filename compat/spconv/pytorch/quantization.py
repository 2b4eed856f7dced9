"""``spconv.pytorch.quantization``, int8 layers of spconv: not provided."""

from compat.spconv._names import refuse_module

refuse_module(
    "spconv.pytorch.quantization", "Quantised layers do not exist here. Use float16 or bfloat16."
)
