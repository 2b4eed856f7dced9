"""Dense code behind a ``dense()``: recorded with torch.fx, translated by torch's own exporter.

A dense tensor has one shape for every scan. Torch's exporter can therefore translate the operations
on this tensor without symbols for sizes. Code that reads values, or makes a shape of them, is
refused.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tritonspconv.export.onnx.errors import OnnxExportError, name_of
from tritonspconv.export.onnx.graph import OPSET, Graph, Node
from tritonspconv.export.onnx.trace import Kwargs, Recorder
from tritonspconv.export.onnx.values import Args, Cell, Dense, Function, as_plain

# These make numbers or shapes of values.
_READS_VALUES = (
    "item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "nonzero", "nonzero_static",
    "argwhere", "unique", "unique_consecutive", "masked_select", "bincount", "histc",
    "repeat_interleave", "data_ptr", "__bool__", "__float__", "__int__", "__index__",
    "__complex__", "__contains__", "__array__", "__iter__", "__dlpack__",
)  # fmt: skip


class DenseRecorder:
    """The dense part of one recorded run, as a torch.fx graph."""

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self._root = nn.Module()
        self._inputs: list[tuple[str, Tensor]] = []
        self._constants: dict[int, fx.Node] = {}
        self._kept: list[Tensor] = []
        self._entered: dict[int, str] = {}

    def enter(self, recorder: Recorder, x: Tensor, name: str) -> Dense:
        """Return a tensor that a node of the sparse part made."""
        node = self._graph.placeholder(f"input{len(self._inputs)}")
        # The code may write into the tensor.
        self._inputs.append((name, x.clone()))
        return self._made(recorder, x, node, name)

    def call(self, recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Apply a function to dense tensors."""
        name = getattr(func, "__name__", "")
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        by_mask = name in ("__getitem__", "index_put_", "index", "where") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in leaves
        )
        if name in _READS_VALUES or (by_mask and (name != "where" or len(leaves) == 1)):
            recorder.refuse(f"calls {name_of(func)}, which makes a number or a shape of values")

        def in_graph(leaf: Any) -> Any:
            if isinstance(leaf, Dense):
                return leaf.node
            return self._constant(recorder, leaf) if isinstance(leaf, Tensor) else leaf

        graph_args, graph_kwargs = _map((args, kwargs), in_graph)
        node = self._node(func, graph_args, graph_kwargs)
        plain_args, plain_kwargs = _map(
            (args, kwargs), lambda x: as_plain(x) if isinstance(x, Tensor) else x
        )
        with torch._C.DisableTorchFunction():
            out = func(*plain_args, **plain_kwargs)
        if _is_in_place(name) or kwargs.get("inplace"):
            # The graph repeats the call, so that later reads of the tensor see the change.
            return args[0]
        return self._results(recorder, func, out, node)

    def _results(self, recorder: Recorder, func: Function, out: Any, node: fx.Node) -> Any:
        if isinstance(out, Tensor):
            return self._made(recorder, out, node, None)
        if isinstance(out, (tuple, list)):
            parts = [
                self._results(
                    recorder, func, part, self._graph.call_function(operator.getitem, (node, place))
                )
                for place, part in enumerate(out)
            ]
            return parts if isinstance(out, list) else tuple(parts)
        if out is None:
            return None
        return recorder.refuse(f"makes a {type(out).__name__} of values by {name_of(func)}")

    def _node(self, func: Function, args: Any, kwargs: Any) -> fx.Node:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = func.__self__.__name__  # pyright: ignore[reportFunctionMemberAccess]
            return self._graph.call_function(getattr, (args[0], attribute))
        if getattr(Tensor, name, None) is func:
            return self._graph.call_method(name, args, kwargs)
        return self._graph.call_function(func, args, kwargs)

    def _constant(self, recorder: Recorder, value: Tensor) -> fx.Node:
        recorder.expect_constant(value)
        if id(value) not in self._constants:
            self._kept.append(value)
            path = recorder.path_of(value).replace(".", "_")
            name = path or f"constant{len(self._constants)}"
            name += "_" * (name in self._root._buffers)
            self._root.register_buffer(name, value.detach())
            self._constants[id(value)] = self._graph.get_attr(name)
        return self._constants[id(value)]

    def _made(self, recorder: Recorder, x: Tensor, node: fx.Node, name: str | None) -> Dense:
        with torch._C.DisableTorchFunction():
            made = x.as_subclass(Dense)
        made.recorder, made.cell, made.node = recorder, Cell(name), node
        if name is not None:
            self._entered[id(node)] = name
        return made

    def finish(self, graph: Graph, outputs: list[Dense]) -> list[str]:
        """Add the nodes that make dense outputs, and return the values' names.

        Raises:
            OnnxExportError: Torch's exporter does not translate the code.
        """
        users = {node: len(node.users) for node in self._graph.nodes}
        names: list[str | None] = [
            self._entered.get(id(x.node)) if not users.get(x.node) else None for x in outputs
        ]
        made = [x for x, name in zip(outputs, names, strict=True) if name is None]
        if made:
            self._graph.output(tuple(x.node for x in made))
            found = iter(self._translate(graph, len(made)))
            names = [next(found) if name is None else name for name in names]
        return [name for name in names if name is not None]

    def _translate(self, graph: Graph, count: int) -> list[str]:
        import onnx

        module = fx.GraphModule(self._root, self._graph).eval()
        examples = tuple(x for _, x in self._inputs)
        outputs = [f"dense.{place}" for place in range(count)]
        try:
            with _quiet():
                program = torch.onnx.export(
                    module, examples, dynamo=True, opset_version=OPSET, verbose=False,
                    input_names=[name for name, _ in self._inputs], output_names=outputs,
                )  # fmt: skip
        except Exception as error:
            raise OnnxExportError(
                "export_onnx: torch.onnx.export does not translate the dense code behind dense(). "
                f"Export the network without its dense head, and the head by itself. {error}"
            ) from error
        proto = cast("Any", program).model_proto
        if proto.functions:
            raise OnnxExportError("export_onnx: the dense code became functions of its own in ONNX")
        taken = {name for name, _ in self._inputs} | set(outputs)
        own = {
            name: f"dense/{name}"
            for node in proto.graph.node for name in (*node.input, *node.output)
            if name and name not in taken
        }  # fmt: skip

        def renamed(name: str) -> str:
            return own.get(name, name)

        for tensor in proto.graph.initializer:
            graph.constants[renamed(tensor.name)] = torch.from_numpy(
                onnx.numpy_helper.to_array(tensor).copy()
            )
        for node in proto.graph.node:
            graph.nodes.append(
                Node(
                    node.op_type, [renamed(name) for name in node.input],
                    [renamed(name) for name in node.output],
                    {attribute.name: attribute for attribute in node.attribute}, node.domain,
                    f"dense/{node.name}",
                )
            )  # fmt: skip
        return outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from reporting its progress, and packages that are not installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _map(tree: Any, change: Any) -> Any:
    """Change the leaves of arguments; slices are trees too."""
    if isinstance(tree, slice):
        return slice(*(_map(x, change) for x in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return type(tree)(_map(x, change) for x in tree) if type(tree) in (list, tuple) else tree
    if isinstance(tree, dict):
        return {key: _map(x, change) for key, x in tree.items()}
    return change(tree)


def _is_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in (
        "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__",
    )  # fmt: skip
