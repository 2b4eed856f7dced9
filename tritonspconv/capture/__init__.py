"""Whole networks as CUDA graphs, with new coordinates at every call."""

from tritonspconv.capture._captured import Captured, CaptureOverflow, capture
from tritonspconv.capture._step import CapturedStep, capture_step

__all__ = ["CaptureOverflow", "Captured", "CapturedStep", "capture", "capture_step"]
