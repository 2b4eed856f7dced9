"""The operators of the domain ``tritonspconv``, registered so that onnx's checker knows them."""

from __future__ import annotations

import functools
from typing import Any

from tritonspconv.export.onnx.graph import DOMAIN, VERSION

_RELATION = """
A layer relates fine and coarse sites by ``fine = stride * coarse - padding + dilation * tap``, per
axis, where ``tap`` runs over the window and the last axis runs fastest. Inputs are the fine sites;
``transposed=1`` makes them the coarse ones. ``inverse=1`` runs the relation of an earlier layer
backwards: ``indices`` are that layer's output sites, and ``out_indices`` its input sites.
``subm=1``: outputs are at the input sites, so that there is no value for their indices. Otherwise
outputs are at ``out_indices`` if given; else the node makes them, ascending by (sample,
coordinates): ``sites="reached"``, every site of the output grid that an input reaches; or
``sites="cells"``, the cells ``floor(fine / stride)`` that hold an input. Without
``input_spatial_shape`` the grid is unbounded.
"""
_INTS = "kernel_size stride padding dilation output_padding"
_OPTIONAL_INTS = "input_spatial_shape output_spatial_shape taps"


@functools.cache
def register() -> None:
    """Register the operators, once in a process."""
    from onnx import defs

    for schema in _schemas(defs.OpSchema):
        defs.register_schema(schema)


def _schemas(op_schema: Any) -> list[Any]:
    parameter, attribute, kinds = op_schema.FormalParameter, op_schema.Attribute, op_schema.AttrType
    optional = op_schema.FormalParameterOption.Optional
    constraints = [
        ("T", ["tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)"], "Values"),
        ("I", ["tensor(int32)"], "Coordinates: sample, then one number per axis"),
        ("S", ["tensor(int32)", "tensor(int64)"], "Sample of each row"),
    ]
    relation = [
        *(attribute(name, kinds.INTS, "", required=True) for name in _INTS.split()),
        *(attribute(name, kinds.INTS, "", required=False) for name in _OPTIONAL_INTS.split()),
        *(
            attribute(name, kinds.INT, "", required=True)
            for name in ["ndim", "subm", "transposed", "inverse"]
        ),
        attribute("sites", kinds.STRING, "same, reached or cells", required=True),
        attribute("indice_key", kinds.STRING, "Equal for layers of one relation", required=True),
    ]

    def schema(name: str, doc: str, inputs: Any, outputs: Any, attributes: Any) -> Any:
        used = {kind for _, kind, *_ in (*inputs, *outputs)}
        return op_schema(
            name, DOMAIN, VERSION, doc,
            inputs=[parameter(n, kind, "", **_option(o, optional)) for n, kind, *o in inputs],
            outputs=[parameter(n, kind, "", **_option(o, optional)) for n, kind, *o in outputs],
            type_constraints=[each for each in constraints if each[0] in used],
            attributes=attributes,
        )  # fmt: skip

    ints = {
        name: attribute(name, kinds.INT, "", required=True)
        for name in ["in_channels", "out_channels", "batch_size", "channels", "channels_first"]
    }
    mode = attribute("mode", kinds.STRING, "max, avg or sum", required=True)
    rows = [("features", "T"), ("indices", "I")]
    return [
        schema(
            "SparseConvolution",
            f"Sparse convolution; weight [out_channels, *kernel_size, in_channels].\n{_RELATION}",
            [*rows, ("weight", "T"), ("bias", "T", "?"), ("out_indices", "I", "?")],
            [("out", "T"), ("made_indices", "I", "?")],
            [
                *relation, ints["in_channels"], ints["out_channels"],
                attribute("act_type", kinds.STRING, "ReLU, or absent", required=False),
            ],
        ),
        schema(
            "SparsePool",
            f"Pooling over the inputs that are present in each window.\n{_RELATION}",
            [*rows, ("out_indices", "I", "?")],
            [("out", "T"), ("made_indices", "I", "?")],
            [
                *relation, mode,
                attribute("floor", kinds.FLOAT, "Lower bound of a maximum", required=False),
            ],
        ),
        schema(
            "SparseToDense",
            "Rows in a dense tensor, zero elsewhere.",
            rows,
            [("dense", "T")],
            [
                attribute("spatial_shape", kinds.INTS, "", required=True),
                ints["batch_size"], ints["channels"], ints["channels_first"],
            ],
        ),
        schema(
            "SparseGlobalPool",
            "All rows of each sample, channel by channel: [batch_size, C].",
            [("features", "T"), ("batch_index", "S")],
            [("out", "T")],
            [mode, ints["batch_size"]],
        ),
    ]  # fmt: skip


def _option(given: Any, optional: Any) -> dict[str, Any]:
    return {"param_option": optional} if given else {}
