"""Sparse networks as ONNX: a writer, and a reader that runs the files with the engine.

``export_onnx`` records one run of a network (``trace``), with the rules of the engine's operations
(``sparse``), of functions on rows (``functions``) and of dense code (``dense``). The record is a
:class:`~tritonspconv.export.onnx.graph.Graph`. ``fold`` simplifies it, ``dialects`` renames its
nodes, and ``write`` makes the file. ``network`` reads a file and runs it, and ``checks`` compares
the file with the network on other scans before the export returns.
"""

from tritonspconv.export.onnx.command import OnnxReport, export_onnx
from tritonspconv.export.onnx.errors import OnnxExportError
from tritonspconv.export.onnx.network import OnnxNetwork

__all__ = ["OnnxExportError", "OnnxNetwork", "OnnxReport", "export_onnx"]
