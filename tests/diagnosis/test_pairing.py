"""Which operator of one graph is which of another, and what is measured of each: faults, other names, other fusions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from planted_faults import FAMILIES, FAULTS, save_as

from xares_onnx.diagnosis.diagnosing import suspects
from xares_onnx.diagnosis.figures import Measurement
from xares_onnx.diagnosis.graph import Graph
from xares_onnx.diagnosis.groups import Trials, groups_of, try_groups
from xares_onnx.diagnosis.pairing import pair, unpaired
from xares_onnx.diagnosis.requantizing import Recipe, recipe_of
from xares_onnx.diagnosis.surgery import load
from xares_onnx.diagnosis.tensors import measure
from xares_onnx.encoder.encoder import open_encoder
from xares_onnx.encoder.spec import ModelOptions
from xares_onnx.progress import ignore

pytestmark = pytest.mark.usefixtures("shared_process")

LAYER = 2
GROUPS = ("layer 1", "layer 2's attention", "layer 2's feed-forward", "layer 3", "all of them")


def clips(count: int = 3) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(12_000 + 500 * number)).astype(np.float32) for number in range(count)]


def measured(a: Path, b: Path) -> Measurement:
    options = ModelOptions(device="cpu", threads=1)
    with open_encoder(a, options) as first, open_encoder(b, options) as second:
        infos = (first.info, second.info)
        return first.call(measure, infos, 1, False, clips(), returns=Measurement, observer=ignore)


def tried(a: Path, b: Path) -> Trials:
    options = ModelOptions(device="cpu", threads=1)
    with open_encoder(a, options) as first, open_encoder(b, options) as second:
        infos = (first.info, second.info)
        result = first.call(measure, infos, 1, False, clips(), returns=Measurement, observer=ignore)
        groups = [group for group in groups_of(result) if group.title in GROUPS]
        arguments = (infos, 1, False, result, groups, clips())
        return first.call(try_groups, *arguments, returns=Trials, observer=ignore)


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, in which nothing but the input and the output keeps its name."""
    kept = {"audio", "embeddings"}

    def other(name: str) -> str:
        return name if name in kept or not name else f"t{hash_of(name)}"

    numbers: dict[str, int] = {}

    def hash_of(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    for node in model.graph.node:
        node.name = ""
        node.input[:] = [other(name) for name in node.input]
        node.output[:] = [other(name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = other(tensor.name)
    return model


@pytest.mark.parametrize(
    ("family", "opset", "precision", "fault"),
    [
        ("wav2vec2", 13, "float32", "epsilon"),
        ("wav2vec2", 17, "float32", "coupled"),
        ("wav2vec2", 13, "static", "epsilon"),
        ("wav2vec2", 17, "float16", "swapped heads"),
        ("dasheng", 17, "dynamic", "three bits"),
        ("dasheng", 13, "float16", "cut frames"),
        ("conformer", 17, "static", "doubled"),
        ("conformer", 13, "dynamic", "cut frames"),
        ("lstm", 17, "dynamic", "three bits"),
        ("lstm", 13, "float32", "swapped heads"),
    ],
)
def test_a_planted_fault_is_the_first_suspect(tmp_path: Path, family: str, opset: int, precision: str, fault: str) -> None:
    a = save_as(FAMILIES[family](opset), tmp_path / "a.onnx", "float32")
    model = FAMILIES[family](opset)
    place = FAULTS[fault](model, LAYER)
    result = measured(a, save_as(model, tmp_path / "b.onnx", precision))
    ranked = suspects(result.steps)
    first = result.steps[ranked[0]]
    assert first.name.startswith(place) or (fault == "cut frames" and first.place.layer == LAYER)
    patterns = {"doubled": "a constant factor of 2", "cut frames": "3 frames missing"}
    if fault in patterns:
        assert first.pattern.startswith(patterns[fault])
    if fault == "coupled":
        assert first.local_noise is not None
        assert first.batch_noise is not None
        assert first.local_noise < 1e-9 < 1e-4 < first.batch_noise


@pytest.mark.parametrize("precision", ["float32", "float16", "dynamic", "static"])
def test_a_sound_copy_has_no_suspect(tmp_path: Path, precision: str) -> None:
    a = save_as(FAMILIES["wav2vec2"](17), tmp_path / "a.onnx", "float32")
    result = measured(a, save_as(FAMILIES["wav2vec2"](17), tmp_path / "b.onnx", precision))
    assert suspects(result.steps) == []
    assert result.unpaired_a == result.unpaired_b == []
    assert result.layers == 3


def test_an_operator_behind_a_fault_is_right_by_itself(tmp_path: Path) -> None:
    a = save_as(FAMILIES["conformer"](13), tmp_path / "a.onnx", "float32")
    model = FAMILIES["conformer"](13)
    FAULTS["three bits"](model, LAYER)
    result = measured(a, save_as(model, tmp_path / "b.onnx", "float32"))
    wrong = [step for step in result.steps if (step.local_noise or 0.0) > 1e-9]
    assert [step.name for step in wrong] == ["2.ffn.in.MatMul"]
    behind = [step for step in result.steps if step.place.layer > LAYER]
    assert behind
    assert all(step.noise > 1e-6 and step.local_noise == 0.0 for step in behind)
    before = [step for step in result.steps if step.place.layer < LAYER]
    assert before
    assert all(step.noise == 0.0 and step.cosine > 1 - 1e-6 for step in before)


def test_names_do_not_matter(tmp_path: Path) -> None:
    a = save_as(FAMILIES["conformer"](17), tmp_path / "a.onnx", "float32")
    model = FAMILIES["conformer"](17)
    FAULTS["doubled"](model, LAYER)
    result = measured(a, save_as(renamed(model), tmp_path / "b.onnx", "float32"))
    assert result.unpaired_a == result.unpaired_b == []
    ranked = suspects(result.steps)
    assert [result.steps[number].name for number in ranked] == ["2.ffn.in.MatMul"]


def test_a_normalisation_of_one_node_is_one_of_nine(tmp_path: Path) -> None:
    a = save_as(FAMILIES["wav2vec2"](13), tmp_path / "a.onnx", "float32")
    b = save_as(FAMILIES["wav2vec2"](17), tmp_path / "b.onnx", "float32")
    result = measured(a, b)
    assert result.unpaired_a == result.unpaired_b == []
    assert (result.opset_a, result.opset_b) == (13, 17)
    assert sum(step.operator == "LayerNormalization" for step in result.steps) == 8
    assert max(step.noise for step in result.steps) < 1e-9


def test_weights_begin_anew_behind_what_cannot_be_paired(tmp_path: Path) -> None:
    """B computes one activation in another way, as a tanh; what comes behind it is paired all the same."""
    a = save_as(FAMILIES["wav2vec2"](17), tmp_path / "a.onnx", "float32")
    model = FAMILIES["wav2vec2"](17)
    place, node = next((i, n) for i, n in enumerate(model.graph.node) if n.name == "2.ffn.gelu.Mul2")
    source = next(n for n in model.graph.node if n.name == "2.ffn.gelu.Div").input[0]
    model.graph.node[place].CopyFrom(helper.make_node("Tanh", [source], [node.output[0]], name="other"))
    graphs = [Graph(load(a)), Graph(load(save_as(model, tmp_path / "b.onnx", "float32")))]
    pairs = pair(*graphs)
    assert [step.name for step in unpaired(graphs[0], pairs.b_of)] == ["2.ffn.gelu.Erf"]
    assert [step.name for step in unpaired(graphs[1], pairs.a_of)] == ["other"]
    names = {graphs[0].steps[i].name: graphs[1].steps[j].name for i, j in pairs.b_of.items()}
    assert names["2.ffn.out.MatMul"] == "2.ffn.out.MatMul"
    assert names["3.attention.q.MatMul"] == "3.attention.q.MatMul"


@pytest.mark.parametrize("precision", ["float16", "dynamic", "static"])
def test_all_of_it_put_back_to_float_is_the_reference(tmp_path: Path, precision: str) -> None:
    a = save_as(FAMILIES["wav2vec2"](17), tmp_path / "a.onnx", "float32")
    model = FAMILIES["wav2vec2"](17)
    FAULTS["three bits"](model, LAYER)
    result = tried(a, save_as(model, tmp_path / "b.onnx", precision))
    by_title = {trial.group.title: trial for trial in result.trials}
    everything = by_title["all of them"]
    assert everything.noise is not None
    assert everything.noise < 1e-5 < result.noise
    noises = {title: trial.noise for title, trial in by_title.items() if trial.noise is not None and title != "all of them"}
    guilty = noises["layer 2's feed-forward"]
    assert guilty < 0.3 * result.noise
    assert guilty < min(noises["layer 1"], noises["layer 3"], noises["layer 2's attention"])


@pytest.mark.parametrize(
    ("precision", "call"),
    [
        (
            "dynamic",
            'quantize_dynamic("a.onnx", "fixed.onnx", op_types_to_quantize=["Conv", "MatMul"], weight_type=QuantType.QInt8',
        ),
        ("static", 'quantize_static("a.onnx", "fixed.onnx", reader, op_types_to_quantize=['),
        ("float16", "B is not quantised"),
    ],
)
def test_the_recipe_is_read_off_the_copy(tmp_path: Path, precision: str, call: str) -> None:
    model = FAMILIES["wav2vec2"](17)
    a, b = save_as(model, tmp_path / "a.onnx", "float32"), save_as(model, tmp_path / "b.onnx", precision)
    options = ModelOptions(device="cpu", threads=1)
    with open_encoder(a, options) as first, open_encoder(b, options) as second:
        infos = (first.info, second.info)
        excluded = ["2.ffn.in.MatMul"]
        recipe = first.call(recipe_of, infos, False, excluded, returns=Recipe, observer=ignore)
    text = "\n".join(recipe.lines)
    assert call in text
    assert "2.ffn.in.MatMul" in text
    assert recipe.dynamic == (precision == "dynamic")
    assert not recipe.per_channel
