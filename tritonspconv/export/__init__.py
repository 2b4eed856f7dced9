"""Networks as files that other runtimes read."""

from tritonspconv.export.onnx import OnnxExportError, OnnxNetwork, OnnxReport, export_onnx

__all__ = ["OnnxExportError", "OnnxNetwork", "OnnxReport", "export_onnx"]
