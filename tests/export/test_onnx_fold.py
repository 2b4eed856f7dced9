"""Batch norms and ReLUs go into the layer before them only where the result stays the same."""

import pytest
import torch
from torch.nn import functional as F

from tritonspconv.export.onnx.fold import fold
from tritonspconv.export.onnx.graph import DOMAIN, Graph, Node, Value

NORM = {
    "scale": torch.tensor([0.5, -2.0]),
    "shift": torch.tensor([1.0, 3.0]),
    "mean": torch.tensor([0.25, -1.0]),
    "variance": torch.tensor([4.0, 0.5]),
}
EPSILON = 1e-3
CONV, POOL = "SparseConvolution", "SparseMaxPool"


def made(*steps: str, bias: bool = True, transposed: bool = False) -> Graph:
    """Return a graph of layers in a row: each reads the output of the one before."""
    graph = Graph(outputs=[Value(f"x{len(steps)}", torch.float32, ("n", 2))], constants={**NORM})
    for number, step in enumerate(steps):
        source, result, weight = f"x{number}", f"x{number + 1}", f"w{number}"
        node = Node(step, [source], [result])
        if step == CONV:
            node = Node(step, [source, "coords", weight], [result, "out_coords"], domain=DOMAIN)
            graph.constants[weight] = torch.randn(2, 3, 3, 4)
        elif step == POOL:
            node = Node(step, [source, "coords"], [result, "out_coords"], domain=DOMAIN)
        elif step == "Gemm":
            node = Node(step, [source, weight], [result], {"transB": 1} if transposed else {})
            graph.constants[weight] = torch.randn(2, 4) if transposed else torch.randn(4, 2)
        elif step == "BatchNormalization":
            node.inputs += NORM
            node.attributes["epsilon"] = EPSILON
        if step in (CONV, "Gemm") and bias:
            node.inputs.append(f"b{number}")
            graph.constants[f"b{number}"] = torch.randn(2)
        graph.nodes.append(node)
    return graph


def ops_of(graph: Graph) -> list[str]:
    """Return the operations in order, with the activation of each layer that has one."""
    return [node.op + node.attributes.get("act_type", "") for node in graph.nodes]


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        pytest.param([CONV, "Relu"], ["SparseConvolutionReLU"], id="relu"),
        pytest.param(
            [CONV, "BatchNormalization", "Relu"], ["SparseConvolutionReLU"], id="norm and relu"
        ),
        pytest.param(
            [CONV, "Relu", "BatchNormalization"],
            ["SparseConvolutionReLU", "BatchNormalization"],
            id="norm behind a relu",
        ),
        pytest.param(
            ["Gemm", "BatchNormalization", "Relu"], ["Gemm", "Relu"], id="relu behind a product"
        ),
        pytest.param(
            [POOL, "BatchNormalization"], [POOL, "BatchNormalization"], id="norm behind a pool"
        ),
        pytest.param([CONV, CONV, "Relu"], [CONV, "SparseConvolutionReLU"], id="two layers"),
    ],
)
def test_what_a_layer_takes_up(steps, left):
    graph = made(*steps)
    fold(graph)
    assert ops_of(graph) == left
    assert graph.nodes[-1].outputs[0] == graph.outputs[0].name


def test_a_value_that_something_else_reads_stays():
    graph = made(CONV, "BatchNormalization")
    graph.outputs.append(Value("x1", torch.float32, ("n", 2)))
    fold(graph)
    assert ops_of(graph) == [CONV, "BatchNormalization"]


def test_a_norm_of_the_second_output_of_a_layer_stays():
    graph = made(CONV, "BatchNormalization")
    graph.nodes[1].inputs[0] = "out_coords"
    graph.outputs.append(Value("x1", torch.float32, ("n", 2)))
    fold(graph)
    assert ops_of(graph) == [CONV, "BatchNormalization"]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", ["sparse", "product", "transposed"])
def test_weights_hold_the_norm(kind, bias):
    steps = CONV if kind == "sparse" else "Gemm", "BatchNormalization"
    graph = made(*steps, bias=bias, transposed=kind == "transposed")
    # A layer is a product of rows and a matrix [channels in, channels out].
    as_matrix = (lambda w: w) if kind == "product" else (lambda w: w.flatten(1).T)
    old = as_matrix(graph.constants["w0"])
    rows = torch.randn(5, old.shape[0])
    sums = rows @ old + (graph.constants["b0"] if bias else 0)
    expected = F.batch_norm(
        sums, NORM["mean"], NORM["variance"], NORM["scale"], NORM["shift"], eps=EPSILON
    )
    fold(graph)
    weight, added = (graph.constants[name] for name in graph.nodes[0].inputs[-2:])
    torch.testing.assert_close(rows @ as_matrix(weight) + added, expected)
    assert set(graph.constants) == set(graph.nodes[0].inputs[-2:])
