"""``export_onnx``: record, simplify, write, and compare with the network."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tritonspconv.export.onnx import autoware, libspconv
from tritonspconv.export.onnx.checks import ScanCheck, compare
from tritonspconv.export.onnx.dense import DenseRecorder
from tritonspconv.export.onnx.errors import OnnxExportError
from tritonspconv.export.onnx.fold import fold as fold_graph
from tritonspconv.export.onnx.functions import function_rules
from tritonspconv.export.onnx.graph import OPSET, Graph, Value
from tritonspconv.export.onnx.inputs import (
    copied,
    fewer_rows,
    leaves,
    map_leaves,
)
from tritonspconv.export.onnx.network import OnnxNetwork, rows_of
from tritonspconv.export.onnx.sparse import SiteSet, sparse_rules
from tritonspconv.export.onnx.trace import Recorder
from tritonspconv.export.onnx.values import Dense, RowCount, Rows, as_plain
from tritonspconv.export.onnx.write import checked, model_of
from tritonspconv.guide import without_more
from tritonspconv.has_rows import has_rows

Dialect = Literal["tritonspconv", "libspconv", "autoware"]


@dataclass(frozen=True)
class OnnxReport:
    """The report of an export.

    Attributes:
        path: The file.
        inputs: Names of the file's inputs.
        outputs: Names of the file's outputs.
        operators: Number of nodes of each type.
        checks: Differences between the file and the network, for each scan that was compared.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]
    checks: tuple[ScanCheck, ...]

    @property
    def max_error(self) -> float:
        """Largest absolute difference between file and network, over all scans."""
        return max(check.max_error for check in self.checks)


def export_onnx(
    model: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    fold: bool = False,
    dialect: Dialect = "tritonspconv",
    check: Sequence[Any] = (),
) -> OnnxReport:
    """Write a sparse network as ONNX.

    The network runs once on an example. Each sparse layer becomes one node of the domain
    ``tritonspconv``; functions between layers become standard nodes; torch's own exporter
    translates dense code behind ``dense()``. The file keeps only the grid and the batch size of
    bounded tensors from the example. Before the function returns, it runs the file and the network
    on the example, on two other scans made of it, and on ``check``, and compares them.

    Args:
        model: A network of :mod:`tritonspconv.nn`, ``compat.spconv`` or ``compat.minkowski``, in
            evaluation mode.
        inputs: Example inputs of the network: a sparse tensor, a tensor, or a tuple of arguments
            with lists and dicts of these. Rows must not repeat a site. Other values in it become
            part of the file.
        path: The file to write.
        fold: Fold batch norms into the weights of the layers before them, and ReLUs into the
            attribute ``act_type`` of sparse convolutions.
        dialect: The names that the nodes get: ours, or those that NVIDIA's ``libspconv`` or the
            TensorRT plug-ins of Autoware read. These hold less; docs/onnx.md has the table.
        check: Further scans, each like ``inputs``.

    Returns:
        The report of the nodes that were written, and of the differences that were found.

    Raises:
        ImportError: The packages ``onnx`` and ``onnxscript`` are not installed
            (``pip install tritonspconv[onnx]``).
        OnnxExportError: The network does something that the file cannot hold. The message names the
            module, the reason and the line.
        ValueError: The model is in training mode, or the dialect is unknown.

    Example:
        >>> report = export_onnx(net.eval(), voxels, "second.onnx", fold=True)  # doctest: +SKIP
        >>> report.max_error  # doctest: +SKIP
        2.4e-07
    """
    if dialect not in get_args(Dialect):
        raise ValueError(
            f"export_onnx: dialect must be one of {get_args(Dialect)}; got {dialect!r}."
        )
    if model.training:
        raise ValueError(
            "export_onnx: the model is in training mode, in which its output depends on the other "
            "rows of a batch; call model.eval() first."
        )
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    graph = record(model, given)
    graph.drop_unused()
    if fold or dialect != "tritonspconv":
        fold_graph(graph)
    dtype, opset = None, OPSET
    if dialect == "libspconv":
        libspconv.rename(graph)
        dtype, opset = torch.float16, libspconv.OPSET
    elif dialect == "autoware":
        autoware.rename(graph)
    proto = model_of(graph, opset)
    if dialect != "libspconv":
        checked(proto)
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        made.write_bytes(proto.SerializeToString())
        checks = _checks(model, OnnxNetwork(made), given, check, dtype)
        made.replace(path)
    operators: dict[str, int] = {}
    for node in graph.nodes:
        operators[node.op] = operators.get(node.op, 0) + 1
    given_names, made_names = (
        tuple(value.name for value in side) for side in (graph.inputs, graph.outputs)
    )
    return OnnxReport(path, given_names, made_names, operators, tuple(checks))


def _checks(
    model: nn.Module, network: OnnxNetwork, given: tuple[Any, ...], check: Sequence[Any], dtype: Any
) -> list[ScanCheck]:
    """Compare file and network on the example, on parts of it and on further scans."""
    checks = [compare(model, network, given, dtype)]
    for seed, share in enumerate((0.6, 0.25)):
        checks.append(compare(model, network, fewer_rows(given, share, seed), dtype))
    for scan in check:
        scan = scan if isinstance(scan, tuple) else (scan,)
        checks.append(compare(model, network, scan, dtype))
    return checks


def record(model: nn.Module, given: tuple[Any, ...]) -> Graph:
    """Run a network on an example and return the recording.

    Raises:
        OnnxExportError: The network did something that a graph cannot hold.
    """
    dense = DenseRecorder()
    recorder = Recorder(model, function_rules() | sparse_rules(), dense)
    entry = _Inputs(recorder)
    names = list(inspect.signature(model.forward).parameters)
    named = dict(zip(_argument_names(names, len(given)), copied(given), strict=True))
    arguments = map_leaves(named, entry.add)
    try:
        with recorder.recording():
            results = model(*arguments.values())
    except OnnxExportError:
        raise
    except Exception as error:
        where = recorder.failed_in or "the network"
        raise OnnxExportError(
            f"export_onnx: {where} raised {type(error).__name__} while it was recorded: "
            f"{without_more(str(error))}. "
            "Values and the number of rows are not known to the recorder."
        ) from error
    _add_outputs(recorder, results)
    graph = recorder.graph
    graph.signature |= {"inputs": entry.signature, "batch_size": recorder.batch_size}
    return graph


def _argument_names(names: list[str], count: int) -> list[str]:
    """Return a name for each positional argument."""
    return [names[place] if place < len(names) else f"input{place}" for place in range(count)]


class _Inputs:
    """The values that the inputs of the example become."""

    def __init__(self, recorder: Recorder) -> None:
        self.signature: list[dict[str, Any]] = []
        self._recorder = recorder
        self._bounds: dict[int, Any] = {}

    def add(self, name: str, value: Any) -> Any:
        """Return a tensor or sparse tensor of the example as a value of the graph."""
        recorder = self._recorder
        if isinstance(value, Tensor):
            if not value.ndim:
                raise OnnxExportError(
                    f"export_onnx: input {name!r} is a tensor without axes. Pass a number, which "
                    "becomes part of the file, or a tensor with a row for each site."
                )
            bounds = self._bounds.setdefault(value.shape[0], recorder.new_bounds())
            self.signature.append({"name": name, "kind": "tensor"})
            return self._value(name, value, bounds)
        feats, sites = rows_of(value, "export_onnx: the example")
        try:
            sites.validate()
        except ValueError as error:
            raise OnnxExportError(
                f"export_onnx: input {name!r}: {without_more(str(error))}"
            ) from error
        if feats.shape[0] < 2:
            raise OnnxExportError(
                f"export_onnx: input {name!r} has {feats.shape[0]} rows; an example needs at least "
                "two, so that results can be compared."
            )
        grid, bounds = sites.grid, recorder.new_bounds()
        recorder.note_grid(grid)
        rows = self._value(f"{name}.features", feats, bounds)
        coords = self._value(f"{name}.indices", sites.coords, bounds)
        recorder.site_sets[id(bounds)] = SiteSet(f"{name}.indices", sites.coords, bounds)
        self.signature.append(
            {
                "name": name, "kind": "sparse", "features": f"{name}.features",
                "indices": f"{name}.indices",
                "spatial_shape": list(grid.shape) if grid.bounded else None,
            }
        )  # fmt: skip
        return value._with_rows_in_cells(rows, coords)

    def _value(self, name: str, value: Tensor, bounds: Any) -> Rows:
        recorder = self._recorder
        name = recorder.fresh(name)
        shape = (_rows_of(recorder, bounds), *value.shape[1:])
        recorder.graph.inputs.append(Value(name, value.dtype, shape))
        return recorder.rows(value.contiguous(), name, bounds)


def _rows_of(recorder: Recorder, bounds: Any) -> str:
    """Return the name of the number of rows of a set."""
    known = recorder.row_names
    return known.setdefault(id(bounds), f"rows{len(known)}")


def _add_outputs(recorder: Recorder, results: Any) -> None:
    """Make the network's results the outputs of the graph."""
    found = leaves(results)
    if any(isinstance(value, RowCount) for value in _others(results)):
        raise OnnxExportError("export_onnx: the network returns the number of rows.")
    if not found:
        raise OnnxExportError("export_onnx: the network returns no tensor and no sparse tensor.")
    dense = {path: value for path, value in found.items() if isinstance(value, Dense)}
    names = recorder.dense.finish(recorder.graph, list(dense.values()))
    outputs = _Outputs(recorder)
    for path, value in found.items():
        if path in dense:
            outputs.add_tensor(path, names[list(dense).index(path)], value, None)
        elif isinstance(value, Rows):
            outputs.add_tensor(path, recorder.name_of(value), value, value.bounds)
        elif has_rows(value):
            outputs.add_sparse(path, value)
        else:
            raise OnnxExportError(
                f"export_onnx: output {path!r} does not depend on the input, or not in a way that "
                "was recorded."
            )
    outputs.finish()


class _Outputs:
    """The outputs of the graph, named by their paths in the network's result."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._graph = recorder.graph
        self._fixed = {value.name for value in self._graph.inputs} | self._graph.constants.keys()
        self._names: dict[str, str] = {}
        self._signature: list[dict[str, Any]] = []

    def add_tensor(self, path: str, name: str, value: Tensor, bounds: Any) -> None:
        """Add a tensor; it has rows if it has ``bounds``."""
        made = self._add(path or "output", name, value, bounds)
        self._signature.append({"path": path, "kind": "tensor", "name": made})

    def add_sparse(self, path: str, value: Any) -> None:
        """Add a sparse tensor: its features, and its coordinates unless they are an input."""
        recorder, where = self._recorder, path or "output"
        try:
            feats, sites = value._rows_in_cells()
        except ValueError as error:
            raise OnnxExportError(
                f"export_onnx: output {path!r} is a sparse tensor without cells, such as the "
                f"result of a global pool. Return other outputs. {without_more(str(error))}"
            ) from error
        bounds, grid = sites.bounds, sites.grid
        shape = list(grid.shape) if grid.bounded else None
        found = recorder.site_sets.get(id(bounds))
        if not isinstance(feats, Rows) or found is None:
            raise OnnxExportError(
                f"export_onnx: output {path!r} has features or coordinates that were not recorded."
            )
        features = self._add(f"{where}.features", recorder.name_of(feats), feats, feats.bounds)
        indices = self._names.get(found.name, found.name)
        if found.name not in self._fixed and found.name not in self._names:
            indices = self._add(f"{where}.indices", found.name, found.coords, bounds)
        self._signature.append(
            {
                "path": path, "kind": "sparse", "features": features, "indices": indices,
                "spatial_shape": shape,
            }
        )  # fmt: skip

    def _add(self, wanted: str, name: str, value: Tensor, bounds: Any) -> str:
        recorder = self._recorder
        if name in self._names:
            # One output serves both paths.
            return self._names[name]
        if name in self._fixed:
            name = recorder.emit("Identity", [name])
        self._names[name] = recorder.unique(wanted)
        rows = () if bounds is None else (_rows_of(recorder, bounds),)
        shape = (*rows, *as_plain(value).shape[len(rows) :])
        self._graph.outputs.append(Value(name, value.dtype, shape))
        return self._names[name]

    def finish(self) -> None:
        """Give the values of the graph the names of the outputs."""
        self._graph.rename(self._names)
        self._graph.signature["outputs"] = self._signature


def _others(tree: Any) -> list[Any]:
    """Return the values that are neither tensors nor containers."""
    if isinstance(tree, dict):
        return [x for value in tree.values() for x in _others(value)]
    if isinstance(tree, (list, tuple)):
        return [x for value in tree for x in _others(value)]
    return [tree]
