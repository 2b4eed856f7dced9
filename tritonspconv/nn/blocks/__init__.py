"""Fusion of hand-written blocks: :func:`tritonspconv.optimize`."""

from tritonspconv.nn.blocks.optimize import (
    BlockReport,
    OptimizationReport,
    optimization_report,
    optimize,
    unoptimize,
)

__all__ = [
    "BlockReport",
    "OptimizationReport",
    "optimization_report",
    "optimize",
    "unoptimize",
]
