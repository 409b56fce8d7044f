"""Outputs that are a classifier's, and the tensor to score in their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from check_models import computed, declared, logits, probabilities
from layered_model import layered
from onnx import NodeProto, helper, numpy_helper
from onnx_models import DIM, FLOAT, encoder, save

from xares_onnx import load_encoder
from xares_onnx.checking import Finding, check
from xares_onnx.checking.tail import Tail, read_tail

node = helper.make_node


def head(path: Path) -> Finding:
    report = check(path, device="cpu", threads=1, contract=["output=logits"] if "own" in path.name else [])
    (finding,) = [finding for finding in report.findings if finding.property == "head"]
    return finding


def headed(
    nodes: Sequence[NodeProto], dim: int, name: str = "embeddings", weights: Sequence[int] = (DIM, 3)
) -> onnx.ModelProto:
    """The sound encoder with nodes that make `name` (batch, frames, dim) of `frames_first` and of `head`, (4, 3) weights."""
    model = declared(encoder(output_layout="any", extra=nodes), output_dim=str(dim))
    model.graph.output[0].name = name
    values = np.random.default_rng(4).standard_normal(tuple(weights)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(values, "head"))
    return model


LINEAR = node("MatMul", ["frames_first", "head"], ["linear_out"])
CLASSIFIERS: dict[str, tuple[onnx.ModelProto, str, str]] = {
    "sigmoid": (headed([LINEAR, node("Sigmoid", ["linear_out"], ["embeddings"])], 3), "ends in Sigmoid", "frames_first"),
    "log-softmax": (
        headed([LINEAR, node("LogSoftmax", ["linear_out"], ["embeddings"], axis=2)], 3),
        "ends in LogSoftmax",
        "frames_first",
    ),
    "softmax by hand": (
        headed(
            [
                LINEAR,
                node("Exp", ["linear_out"], ["exp"]),
                node("ReduceL1", ["exp"], ["sum"], axes=[2]),
                node("Div", ["exp", "sum"], ["embeddings"]),
            ],
            3,
        ),
        "its values are probabilities, which sum to 1",
        "",
    ),
    "log-softmax by hand": (
        headed(
            [
                LINEAR,
                node("ReduceLogSumExp", ["linear_out"], ["sum"], axes=[2]),
                node("Sub", ["linear_out", "sum"], ["embeddings"]),
            ],
            3,
        ),
        "its values are logarithms of probabilities",
        "",
    ),
    "logits of a convolution": (
        headed(
            [
                node("Transpose", ["frames_first"], ["channels"], perm=[0, 2, 1]),
                node("Conv", ["channels", "head"], ["convolved"]),
                node("Transpose", ["convolved"], ["logits"], perm=[0, 2, 1]),
            ],
            3,
            "logits",
            (3, DIM, 1),
        ),
        "by its name, and the linear layer from 4 to 3 that it ends in",
        "channels",
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier(name: str, tmp_path: Path, shared_process: None) -> None:
    model, says, tap = CLASSIFIERS[name]
    finding = head(save(model, tmp_path / "model.onnx"))
    assert (finding.status, finding.measured) == ("warn", "classifier")
    assert says in finding.says
    assert finding.remedy.endswith(f"--taps '{tap}'" if tap else "by --taps")


def test_the_tap_that_is_named_can_be_scored(tmp_path: Path, shared_process: None) -> None:
    path = save(logits(), tmp_path / "model.onnx")
    tap = head(path).remedy.partition("--taps ")[2].strip("'")
    with load_encoder(path, taps=[tap], contract=["output_dim=4"], device="cpu", threads=1) as tapped:
        assert tapped.contract.dim == DIM


def test_the_last_layer_is_named_if_there_are_layers(tmp_path: Path, shared_process: None) -> None:
    """A pooled head, whose own input has lost its frames."""
    path = layered(tmp_path / "model.onnx")
    model = onnx.load(path)
    (tanh,) = [item for item in model.graph.node if item.op_type == "Tanh"]
    model.graph.node.remove(tanh)
    size = next(tensor for tensor in model.graph.initializer if tensor.name == "in0").dims[0]
    model.graph.initializer.append(numpy_helper.from_array(np.eye(size, 3, dtype=np.float32), "head"))
    model.graph.node.extend(
        [
            node("ReduceMean", ["stream3"], ["pooled"], axes=[1], keepdims=0),
            node("Gemm", ["pooled", "head"], ["scores"]),
            node("Softmax", ["scores"], ["embeddings"]),
        ]
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("embeddings", FLOAT, ["batch", 3]))
    helper.set_model_props(model, {})
    finding = head(save(model, path))
    assert finding.status == "warn"
    assert finding.remedy == "score the encoder before its head: --taps 'stream3'"


@pytest.mark.parametrize(
    ("nodes", "dim", "name", "weights"),
    [
        ([node("MatMul", ["frames_first", "head"], ["embeddings"])], 3, "embeddings", (DIM, 3)),  # a projection
        ([node("MatMul", ["frames_first", "head"], ["logits"])], 7, "logits", (DIM, 7)),  # it grows
        ([node("Identity", ["frames_first"], ["scores"])], 4, "scores", (DIM, 3)),  # by its name alone
        (
            [node("Sigmoid", ["frames_first"], ["gate"]), node("Mul", ["frames_first", "gate"], ["embeddings"])],
            4,
            "embeddings",
            (DIM, 3),
        ),
        (
            [node("Softmax", ["frames_first"], ["p"], axis=2), node("Add", ["frames_first", "p"], ["embeddings"])],
            4,
            "embeddings",
            (DIM, 3),
        ),
        (
            [node("Abs", ["frames_first"], ["size"]), node("Neg", ["size"], ["embeddings"])],
            4,
            "embeddings",
            (DIM, 3),
        ),
    ],
)
def test_an_embedding(
    nodes: list[NodeProto], dim: int, name: str, weights: tuple[int, ...], tmp_path: Path, shared_process: None
) -> None:
    finding = head(save(headed(nodes, dim, name, weights), tmp_path / "model.onnx"))
    assert (finding.status, finding.measured) == ("pass", "embedding")


@pytest.mark.parametrize("quantised", [False, True])
def test_the_tail_of_a_graph(quantised: bool) -> None:
    if not quantised:
        assert read_tail(probabilities(), "embeddings") == Tail("Softmax")
        assert read_tail(encoder(), "embeddings") == Tail("")
        assert read_tail(logits(), "logits") == Tail("", DIM, 3, "frames_first")
        assert read_tail(logits(), "no such output") == Tail()
        return
    model = computed(
        [
            node("DynamicQuantizeLinear", ["frames_first"], ["whole", "scale", "zero"]),
            node("MatMulInteger", ["whole", "layer", "zero"], ["product"]),
            node("Cast", ["product"], ["single"], to=FLOAT),
            node("Mul", ["scale", "layer_scale"], ["both"]),
            node("Mul", ["single", "both"], ["scaled"]),
            node("Add", ["bias3", "scaled"], ["shifted"]),
            node("Softmax", ["shifted"], ["embeddings"]),
        ]
    )
    for name, values in (("layer", np.ones((DIM, 3), np.int8)), ("layer_scale", np.ones(3, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "bias3"))
    assert read_tail(model, "embeddings") == Tail("Softmax", DIM, 3, "frames_first")
