"""The groups of taps by which columns are ordered, for the tool that searches better ones."""

from tritonspconv.kernels.triton._column_order import AXIS_RANGES, CUBE_GROUPS, box_mask

__all__ = ["AXIS_RANGES", "CUBE_GROUPS", "box_mask"]
