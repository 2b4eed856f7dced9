"""Sparse networks as programs and files that run without this package."""

from tritonspconv.export._program import export_program
from tritonspconv.export._run import ExportError
from tritonspconv.export.onnx import OnnxExportError, OnnxNetwork, OnnxReport, export_onnx

__all__ = [
    "ExportError",
    "OnnxExportError",
    "OnnxNetwork",
    "OnnxReport",
    "export_onnx",
    "export_program",
]
