"""A reader of exported files: it runs them with the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspconv import ops
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.export.onnx.graph import DOMAIN
from tritonspconv.export.onnx.standard import OPERATORS, run_in_numpy
from tritonspconv.export.onnx.write import SIGNATURE
from tritonspconv.geometry import ConvGeometry
from tritonspconv.guide import more
from tritonspconv.has_rows import has_rows
from tritonspconv.kernel_map import KernelMap, kernel_map
from tritonspconv.sparse_tensor import SparseTensor

Attributes = dict[str, Any]


class OnnxNetwork:
    """A file that :func:`tritonspconv.export_onnx` wrote, ready to run.

    The sparse nodes run with the engine, on the device of the input. Standard nodes run in torch,
    and rare ones in numpy. There are no gradients.

    Args:
        path: The file.

    Attributes:
        inputs: Names of the inputs, in the order in which a call takes them.
        outputs: Names of the outputs.
        batch_size: Samples that a bounded input must have; None: any number.

    Raises:
        ImportError: The package ``onnx`` is not installed.
        ValueError: The file was not written by :func:`tritonspconv.export_onnx`.

    Example:
        >>> network = OnnxNetwork("second.onnx")  # doctest: +SKIP
        >>> encoded = network(voxels)  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        import onnx

        self._model = onnx.load(str(path))
        entries = {entry.key: entry.value for entry in self._model.metadata_props}
        if SIGNATURE not in entries:
            raise ValueError(
                f"OnnxNetwork: {path} has no entry {SIGNATURE!r} in its metadata, which says what "
                "its inputs are for. Write the file with tritonspconv.export_onnx."
            )
        self._signature: dict[str, Any] = json.loads(entries[SIGNATURE])
        self.inputs = [given["name"] for given in self._signature["inputs"]]
        self.outputs = [made["path"] for made in self._signature["outputs"]]
        self.batch_size: int | None = self._signature["batch_size"]
        self._nodes = _handlers(self._signature.get("dialect"))
        self._constants = {
            tensor.name: tensor_of(tensor) for tensor in self._model.graph.initializer
        }
        self._attributes = [
            {attribute.name: attribute_value(attribute) for attribute in node.attribute}
            for node in self._model.graph.node
        ]

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """Run the network.

        Args:
            *inputs: Tensors, or sparse tensors of the engine or of an adapter, as in the example of
                the export. Their grid and batch size must equal the example's; the number of rows
                is free. Sites must not repeat.

        Returns:
            A tensor or a :class:`tritonspconv.SparseTensor` for the output; for several outputs a
            dict by :attr:`outputs`.

        Raises:
            TypeError: The number of inputs differs from the file, or an input is of the wrong kind.
            ValueError: A grid or batch size differs from the file.
        """
        if len(inputs) != len(self.inputs):
            raise TypeError(
                f"OnnxNetwork: the network takes {len(self.inputs)} inputs, {self.inputs}; got "
                f"{len(inputs)}."
            )
        run = Run(self.batch_size, self._constants, self._nodes)
        for given, described in zip(inputs, self._signature["inputs"], strict=True):
            run.give(given, described)
        for node, attributes in zip(self._model.graph.node, self._attributes, strict=True):
            run.node(self._model, node, attributes)
        made = {x["path"]: run.output(x) for x in self._signature["outputs"]}
        return made[""] if list(made) == [""] else made


class Run:
    """One run of a file.

    Args:
        batch_size: Samples of bounded grids.
        constants: Values that the file holds.
        nodes: Functions that run the sparse nodes, by domain and type.

    Attributes:
        values: Tensors by name.
        sites: The engine's sites of values that are coordinates.
        row_sites: The sites of values that are features, of files that do not name coordinates.
        maps: Kernel maps that later nodes may run backwards: by input, output and geometry, or by
            the name that the file has for them.
    """

    def __init__(
        self,
        batch_size: int | None,
        constants: dict[str, Tensor],
        nodes: dict[tuple[str, str], Handler],
    ) -> None:
        self.values: dict[str, Any] = {}
        self.sites: dict[str, ActiveSites] = {}
        self.row_sites: dict[str, ActiveSites] = {}
        self.maps: dict[Any, KernelMap] = {}
        self.batch_size = batch_size
        self._constants = constants
        self._nodes = nodes
        self._device = torch.device("cpu")

    def give(self, given: Any, described: dict[str, Any]) -> None:
        """Set an input."""
        name = described["name"]
        if described["kind"] == "tensor":
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"OnnxNetwork: input {name!r} must be a tensor; got {type(given).__name__}."
                )
            self.values[name], self._device = given, given.device
            return
        feats, sites = rows_of(given, f"OnnxNetwork: input {name!r}")
        expected = described["spatial_shape"]
        found = list(sites.grid.shape) if sites.grid.bounded else None
        if found != expected:
            raise ValueError(
                f"OnnxNetwork: input {name!r} must have spatial_shape={expected}, the grid of the "
                f"example that was exported; got {found}."
            )
        if sites.grid.bounded and sites.grid.batch_size != self.batch_size:
            raise ValueError(
                f"OnnxNetwork: input {name!r} must have batch_size={self.batch_size}, as the "
                f"example that was exported; got {sites.grid.batch_size}."
            )
        if sites.has_repeats():
            raise ValueError(
                f"OnnxNetwork: rows of input {name!r} repeat a site. Merge them first, e.g. with "
                "voxelize()." + more("repeated-coords")
            )
        self._device = feats.device
        self.values[described["features"]] = feats
        self.row_sites[described["features"]] = sites
        self.set_sites(described["indices"], sites)

    def set_sites(self, name: str, sites: ActiveSites) -> None:
        """Set a value to the coordinates of sites."""
        self.values[name], self.sites[name] = sites.coords, sites

    def value(self, name: str) -> Any:
        """Return a value by name; None for an absent input."""
        if not name:
            return None
        if name in self.values:
            return self.values[name]
        self.values[name] = self._constants[name].to(self._device)
        return self.values[name]

    def sites_of(self, name: str, shape: Any) -> ActiveSites:
        """Return the sites of a value that is coordinates, in a grid of ``shape``; None: any."""
        if name not in self.sites:
            coords = self.value(name)
            sites = ActiveSites(coords, self._grid(coords, shape))
            # Coordinates that a caller gave as a tensor, which give() did not see.
            sites.validate()
            self.sites[name] = sites
        return self.sites[name]

    def _grid(self, coords: Tensor, shape: Any) -> Grid:
        if shape is None:
            return Grid.around(coords)
        assert self.batch_size is not None, "a file with bounded grids has a batch size"
        return Grid((0,) * len(shape), tuple(shape), self.batch_size)

    def node(self, model: Any, node: Any, attributes: Attributes) -> None:
        """Run one node."""
        sparse = self._nodes.get((node.domain, node.op_type))
        if sparse is not None:
            sparse(self, node, attributes)
            return
        inputs = [self.value(name) for name in node.input]
        operator = OPERATORS.get(node.op_type) if not node.domain else None
        if operator is not None:
            outputs = [operator(inputs, attributes)]
        elif node.domain:
            raise NotImplementedError(f"OnnxNetwork: unknown operator {node.domain}.{node.op_type}")
        else:
            outputs = run_in_numpy(model, node, inputs)
        self.values.update(zip(node.output, outputs, strict=False))

    def output(self, described: dict[str, Any]) -> Any:
        """Return an output."""
        if described["kind"] == "tensor":
            return self.value(described["name"])
        if described["indices"] is None:
            sites = self.row_sites[described["features"]]
        else:
            sites = self.sites_of(described["indices"], described["spatial_shape"])
        return SparseTensor(self.value(described["features"]), sites)

    def relate(self, node: Any, a: Attributes, out_indices: str, made: str) -> KernelMap:
        """Return the kernel map of a node."""
        sites = self.sites_of(node.input[1], a.get("input_spatial_shape"))
        shape = a.get("output_spatial_shape")
        geometry = geometry_of(a)
        if a["subm"]:
            return kernel_map(sites, geometry)
        if out_indices:
            out_sites = self.sites_of(out_indices, shape)
            if a["inverse"]:
                known = self.maps.get((out_indices, node.input[1], geometry))
                if known is not None:
                    return known.inverse()
                return kernel_map(out_sites, geometry, out_sites=sites).inverse()
            return kernel_map(sites, geometry, out_sites=out_sites)
        grid = (
            None if shape is None else Grid((0,) * len(shape), tuple(shape), sites.grid.batch_size)
        )
        found = kernel_map(sites, geometry, out_grid=grid)
        self.set_sites(made, found.out_sites)
        self.maps[node.input[1], made, geometry] = found
        return found


Handler = Callable[[Run, Any, Attributes], None]


def _convolution(run: Run, node: Any, a: Attributes) -> None:
    inputs = [*node.input, "", ""]
    found = run.relate(node, a, inputs[4], node.output[1] if len(node.output) > 1 else "")
    weight, bias = run.value(inputs[2]), run.value(inputs[3])
    run.values[node.output[0]] = ops.sparse_conv(
        run.value(inputs[0]), weight, found, bias, weight_layout="OVI",
        relu=a.get("act_type") == "ReLU",
    )  # fmt: skip


def _pool(run: Run, node: Any, a: Attributes) -> None:
    inputs = [*node.input, ""]
    found = run.relate(node, a, inputs[2], node.output[1] if len(node.output) > 1 else "")
    feats = run.value(inputs[0])
    run.values[node.output[0]] = ops.sparse_pool(feats, found, a["mode"], floor=a.get("floor"))


def _to_dense(run: Run, node: Any, a: Attributes) -> None:
    sites = run.sites_of(node.input[1], a["spatial_shape"])
    run.values[node.output[0]] = ops.to_dense(
        run.value(node.input[0]), sites, channels_first=bool(a["channels_first"])
    )


def _global_pool(run: Run, node: Any, a: Attributes) -> None:
    feats, batch_index = map(run.value, node.input)
    run.values[node.output[0]] = ops.global_pool(feats, batch_index, a["batch_size"], a["mode"])


NODES: dict[tuple[str, str], Handler] = {
    (DOMAIN, "SparseConvolution"): _convolution,
    (DOMAIN, "SparsePool"): _pool,
    (DOMAIN, "SparseToDense"): _to_dense,
    (DOMAIN, "SparseGlobalPool"): _global_pool,
}
"""Functions that run the sparse nodes, by domain and type."""


def _handlers(dialect: str | None) -> dict[tuple[str, str], Handler]:
    """Return the functions that run the sparse nodes of a file."""
    if dialect is None:
        return NODES
    # These modules import this one.
    module = import_module(f"tritonspconv.export.onnx.{dialect}")
    return module.NODES


def geometry_of(a: Attributes) -> ConvGeometry:
    """Return the geometry that a node's attributes describe."""
    size = tuple(a["kernel_size"])
    taps = a.get("taps") or []
    return ConvGeometry(
        kernel_size=size,
        stride=tuple(a["stride"]),
        padding=tuple(a["padding"]),
        dilation=tuple(a["dilation"]),
        transposed=bool(a["transposed"]),
        sites=a["sites"],
        output_padding=tuple(a["output_padding"]),
        taps=tuple(zip(*[iter(taps)] * len(size), strict=True)),
    )


def rows_of(given: Any, what: str) -> tuple[Tensor, ActiveSites]:
    """Return features and sites, in cells, of a sparse tensor of the engine or of an adapter.

    Raises:
        TypeError: ``given`` is no sparse tensor.
    """
    if not has_rows(given):
        raise TypeError(f"{what} must be a sparse tensor; got {type(given).__name__}.")
    return given._rows_in_cells()


def tensor_of(proto: Any) -> Tensor:
    """Return a constant of a file as a tensor."""
    from onnx import TensorProto, numpy_helper

    if proto.data_type == TensorProto.BFLOAT16:
        raw = torch.frombuffer(bytearray(proto.raw_data), dtype=torch.bfloat16)
        return raw.reshape(tuple(proto.dims))
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def attribute_value(attribute: Any) -> Any:
    """Return the value of an attribute: text as str, tensors of torch, dtypes of casts."""
    from onnx import AttributeProto, helper

    if attribute.name == "to" and attribute.type == AttributeProto.INT:
        return torch_dtype(attribute.i)
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if attribute.type == AttributeProto.TENSOR:
        return tensor_of(value)
    return list(value) if attribute.type == AttributeProto.INTS else value


def torch_dtype(number: int) -> torch.dtype:
    """Return the dtype of ONNX's number for it."""
    from tritonspconv.export.onnx.write import onnx_dtype

    names = "float32 float16 float64 bfloat16 int32 int64 int8 uint8 bool"
    by_number = {onnx_dtype(getattr(torch, name)): getattr(torch, name) for name in names.split()}
    return by_number[number]
