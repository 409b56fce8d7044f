"""A front end that is a graph: the pair gives what the one graph gives, as two files and joined; and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as models
import onnxruntime
import pytest
from feature_models import BANDS, feature_model, front_end, waveform_model
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from onnx_models import constant, noise, save, value
from typer.testing import CliRunner
from window_models import WINDOW_DIM, window_model

from xares_onnx import cli
from xares_onnx.encoder import joining
from xares_onnx.encoder.encoder import Embedding, Encoder, load_encoder
from xares_onnx.encoder.joining import join
from xares_onnx.errors import ContractError, ModelError, UsageError

pytestmark = pytest.mark.usefixtures("shared_process")
RATE = 16_000
LENGTHS = [1, 7, 401, 5_001, *range(15_999, 50_000, 2_122), 170_001]
CLIPS = [noise(samples, seed) * np.float32(10.0 ** -(seed % 4)) for seed, samples in enumerate(LENGTHS)]
MEL = "frontend.model=mel.onnx"
Clip = NDArray[np.float32]


def front_model(
    kind: str = "kaldi", layout: str = "BFT", *, name: str = "audio", opset: int = 17, **sizes: Any
) -> ModelProto:
    """The front end alone: `audio` to `mel` in a layout such as B1TF."""
    nodes, initializers = front_end(kind, RATE)
    singles = [axis for axis, letter in enumerate(layout) if letter == "1"]
    letters = layout.replace("1", "")
    nodes = [helper.make_node("Identity", [name], ["audio"]) if name != "audio" else None, *nodes]  # type: ignore[list-item]
    nodes = [node for node in nodes if node is not None]
    nodes.append(helper.make_node("Transpose", ["bands"], ["ordered"], perm=["BFT".index(axis) for axis in letters]))
    if singles:
        nodes += [constant("singles", singles), helper.make_node("Unsqueeze", ["ordered", "singles"], ["mel"])]
    else:
        nodes.append(helper.make_node("Identity", ["ordered"], ["mel"]))
    shape = {"B": "batch", "T": "samples"} | sizes
    graph = helper.make_graph(
        nodes,
        "front",
        [value(name, TensorProto.FLOAT, [shape["B"], shape["T"]])],
        [value("mel", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def pair(folder: Path, front: ModelProto, model: ModelProto, *contract: str, **options: Any) -> Encoder:
    folder.mkdir(exist_ok=True)
    save(front, folder / "mel.onnx")
    return load_encoder(save(model, folder / "model.onnx"), device="cpu", contract=[MEL, *contract], **options)


def assert_same(given: list[Embedding], expected: list[Embedding], tolerance: float = 1e-5) -> None:
    assert len(given) == len(expected) >= 20
    for one, other in zip(given, expected, strict=True):
        np.testing.assert_allclose(one.times, other.times, rtol=0, atol=1e-9)
        assert np.abs(other.frames).max() > 0.05
        np.testing.assert_allclose(one.frames, other.frames, rtol=0, atol=tolerance)


def canonical(kind: str, folder: Path) -> list[Embedding]:
    return load_encoder(save(waveform_model(kind), folder / "canonical.onnx"), device="cpu").embed(CLIPS, RATE)


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("kind", ["whisper", "kaldi", "librosa"])
def test_a_pair_gives_what_one_graph_gives(kind: str, tmp_path: Path) -> None:
    told: list[Any] = []
    encoder = pair(tmp_path / "pair", front_model(kind), feature_model(kind), observer=told.append)
    contract = encoder.contract
    assert contract.frontend is None
    described = contract.described()
    assert described["frontend.model"] == {"value": "mel.onnx", "source": "--contract"}
    assert described["frontend.model_sha256"]["source"] == "the file"
    assert described["frontend.bins"] == {"value": BANDS[kind], "source": "measured"}
    assert described["frontend.scale"] == {"value": 1.0, "source": "default"}
    assert described["input_kind"]["value"] == "features"
    assert any(f"the model takes features, made by mel.onnx: {BANDS[kind]} bins every" in str(note) for note in told)
    assert_same(encoder.embed(CLIPS, RATE), canonical(kind, tmp_path))


FORMS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "[batch, frames, bands]": ("BTF", {}, "BTF", {}),
    "[batch, 1, frames, bands]": ("B1TF", {}, "BFT", {}),
    "[1, bands, frames], a batch of one": ("BFT", {"B": 1}, "B1TF", {"B": 1}),
    "to a model of [bands, frames]": ("BFT", {}, "FT", {}),
    "to a batch of three": ("BTF", {}, "BTF", {"B": 3}),
    "to axes without sizes": ("BTF", {}, "BTF", {"B": None, "T": None, "F": None}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_both(form: str, tmp_path: Path) -> None:
    layout, sizes, model_layout, model_sizes = FORMS[form]
    front, model = front_model("whisper", layout, **sizes), feature_model("whisper", model_layout, sizes=model_sizes)
    assert_same(pair(tmp_path / "pair", front, model).embed(CLIPS, RATE), canonical("whisper", tmp_path))


def scaled(by: float, plus: float) -> ModelProto:
    """The encoder for features that are `by` times too large, and then `plus` too much."""
    extra = [
        helper.make_node("Constant", [], ["plus"], value_float=plus),
        helper.make_node("Constant", [], ["by"], value_float=by),
        helper.make_node("Sub", ["bands", "plus"], ["less"]),
        helper.make_node("Div", ["less", "by"], ["scaled"]),
    ]
    return feature_model("kaldi", "BTF", extra=extra)


def test_scale_and_offset_lie_between(tmp_path: Path) -> None:
    encoder = pair(
        tmp_path / "pair",
        front_model("kaldi"),
        scaled(0.1, 2.0),
        "frontend.scale=0.1",
        "frontend.offset=2",
        "input_layout=BTF",
    )
    assert encoder.contract.described()["frontend.offset"] == {"value": 2.0, "source": "--contract"}
    assert_same(encoder.embed(CLIPS, RATE), canonical("kaldi", tmp_path), 1e-4)


def test_amplitude_and_lengths_reach_the_front_end(tmp_path: Path) -> None:
    """A front end of 16-bit samples, with an input of lengths, as NeMo's has."""
    front = front_model("kaldi")
    front.graph.input.append(value("waveforms_lens", TensorProto.INT64, ["batch"]))
    del front.graph.node[0], front.graph.node[0]
    front.graph.node.insert(0, helper.make_node("Unsqueeze", ["unit", "channel"], ["signal"]))
    front.graph.node.insert(0, helper.make_node("Div", ["audio", "full"], ["unit"]))
    front.graph.node.insert(0, helper.make_node("Constant", [], ["full"], value_float=32768.0))
    front.graph.node.insert(0, constant("channel", [1]))
    encoder = pair(tmp_path / "pair", front, feature_model("kaldi"), "amplitude=int16")
    assert_same(encoder.embed(CLIPS, RATE), canonical("kaldi", tmp_path))


def test_taps_of_a_pair(tmp_path: Path) -> None:
    front, model = front_model("kaldi"), feature_model("kaldi", "BTF")
    with pair(tmp_path / "pair", front, model, taps=["embeddings", "dim_first"]) as encoder:
        (frames,) = encoder.embed([CLIPS[-1]], RATE, tap="dim_first")
        np.testing.assert_array_equal(frames.frames, encoder.embed([CLIPS[-1]], RATE)[0].frames)


def test_a_front_end_of_another_folder_below(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    save(front_model(), tmp_path / "parts/mel.onnx")
    model = feature_model(metadata={"xares.frontend.model": "parts/mel.onnx"}, kind="kaldi")
    contract = load_encoder(save(model, tmp_path / "model.onnx"), device="cpu").contract
    assert contract.described()["frontend.model"] == {"value": "parts/mel.onnx", "source": "metadata"}


# ---------------------------------------------------------------- windows of a graph's features


def test_windows_of_a_graphs_features_are_the_vendors_loop(tmp_path: Path) -> None:
    """As openWakeWord runs its two graphs: all features of a clip, x / 10 + 2, then windows of 76 frames every 8."""
    mel, model = front_model("kaldi", "B1TF"), window_model(76, bands=80, layout="BTF1", out="B11D")
    encoder = pair(tmp_path / "pair", mel, model, "window.hop_frames=8", "frontend.scale=0.1", "frontend.offset=2")
    assert (encoder.contract.hop_samples, encoder.contract.dim) == (1_280, WINDOW_DIM)
    front = onnxruntime.InferenceSession(mel.SerializeToString(), providers=["CPUExecutionProvider"])
    back = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    clips = [
        noise(400 + 160 * (76 - 1) + 1_280 * i, i) for i in range(21)
    ]  # whole windows, as that loop leaves the rest out
    for clip, embedding in zip(clips, encoder.embed(clips, RATE), strict=True):
        features = front.run(None, {"audio": clip[None]})[0][0, 0] / 10 + 2
        windows = [features[start : start + 76] for start in range(0, len(features) - 75, 8)]
        vectors = [back.run(None, {"features": window[None, :, :, None]})[0].ravel() for window in windows]
        np.testing.assert_allclose(embedding.frames, vectors, rtol=0, atol=1e-6)
        np.testing.assert_allclose(embedding.times, (6_200 + 1_280 * np.arange(len(vectors))) / RATE, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- one file


def run(*arguments: Any) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["annotate", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def counting(rank: int) -> ModelProto:
    """Right only if `length` (rank 1), or the sum of `attention_mask` (rank 2), is the number of frames."""
    name = "length" if rank == 1 else "attention_mask"
    extra = [
        helper.make_node("Cast", [name], ["counted"], to=TensorProto.FLOAT),
        constant("last", [1]),
        helper.make_node("Identity", ["counted"], ["held"])
        if rank == 1
        else helper.make_node("ReduceSum", ["counted", "last"], ["held"], keepdims=0),
        helper.make_node("Shape", ["bands"], ["size"], start=2, end=3),
        helper.make_node("Cast", ["size"], ["frames"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["held", "frames"], ["ratio"]),
        constant("axes", [1, 2]),
        helper.make_node("Unsqueeze", ["ratio", "axes"], ["ratios"]),
        helper.make_node("Mul", ["bands", "ratios"], ["scaled"]),
    ]
    axes = ["batch", "frames"][:rank]
    return feature_model("kaldi", extra=extra, extra_inputs=[value(name, TensorProto.INT64, axes)])


def with_lengths() -> ModelProto:
    front = front_model("kaldi")
    front.graph.input.append(value("waveforms_lens", TensorProto.INT64, ["batch"]))
    return front


JOINED: dict[str, tuple[ModelProto, ModelProto, list[str]]] = {
    "frames": (front_model("whisper"), feature_model("whisper", "B1TF"), []),
    "windows": (
        front_model("kaldi", "B1TF"),
        window_model(76, bands=80, layout="BTF1", out="B11D"),
        ["window.hop_frames=8"],
    ),
    "scale and offset": (
        front_model("kaldi"),
        scaled(0.1, 2.0),
        ["frontend.scale=0.1", "frontend.offset=2", "input_layout=BTF"],
    ),
    "inputs of one name": (front_model("kaldi", name="features"), feature_model("kaldi"), []),
    "other operator sets": (front_model("kaldi", opset=13), feature_model("kaldi"), []),
    "lengths": (with_lengths(), counting(1), []),
    "a window": (front_model("kaldi"), feature_model("kaldi", "BTF", sizes={"T": 198}), []),
    "no batch": (front_model("kaldi"), feature_model("kaldi", "FT"), []),
    "double precision": (front_model("kaldi"), feature_model("kaldi", element=TensorProto.DOUBLE), []),
}


@pytest.mark.parametrize("form", JOINED)
def test_the_joined_file_gives_what_the_two_give(form: str, tmp_path: Path) -> None:
    front, model, contract = JOINED[form]
    encoder = pair(tmp_path / "pair", front, model, *contract)
    expected = encoder.embed(CLIPS, RATE)
    joined = join(tmp_path / "pair/model.onnx", tmp_path / "pair/mel.onnx", contract, tmp_path / "whole.onnx")
    assert joined.difference <= 1e-5
    onnx.checker.check_model(onnx.load(tmp_path / "whole.onnx"))
    whole = load_encoder(tmp_path / "whole.onnx", device="cpu")
    assert whole.contract.features is None
    assert whole.contract.output == ("embeddings.frames" if "window.hop_frames=8" in contract else "embeddings")
    assert_same(whole.embed(CLIPS, RATE), expected, 1e-5)


def test_the_command_says_how_near_it_is(tmp_path: Path) -> None:
    save(front_model(), tmp_path / "mel.onnx")
    save(feature_model("kaldi"), tmp_path / "model.onnx")
    options = ["--contract", "license=MIT", "--contract", "amplitude=int16"]
    code, out, err = run(
        tmp_path / "model.onnx", "--frontend", tmp_path / "mel.onnx", *options, "-o", tmp_path / "whole.onnx"
    )
    assert (code, out.count("\n")) == (0, 1), err
    assert "xares.license=MIT" in out
    assert "of the largest value from the two files over 4 lengths" in out
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "whole.onnx").metadata_props}
    assert metadata == {
        "xares.contract_version": "1",
        "xares.input_kind": "waveform",
        "xares.amplitude": "int16",
        "normalize_samples": "0",
        "xares.license": "MIT",
        "sample_rate": "16000",
    }


def test_a_joined_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(front_model(), tmp_path / "mel.onnx")
    save(feature_model("kaldi"), tmp_path / "model.onnx")
    monkeypatch.setattr(joining, "_compare", lambda pair, whole: (0.5, (1,)))
    says = (
        "differs from the two by 5.0e-01 of the largest value, so it was not kept; use the two by --contract frontend.model="
    )
    with pytest.raises(ContractError, match=says):
        join(tmp_path / "model.onnx", tmp_path / "mel.onnx", [], tmp_path / "whole.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mel.onnx", "model.onnx"]


def test_a_difference_is_seen(tmp_path: Path) -> None:
    one = load_encoder(save(models.encoder(), tmp_path / "one.onnx"), device="cpu")
    other = load_encoder(save(models.divides_its_samples(1.01), tmp_path / "other.onnx"), device="cpu")
    assert 1e-3 < joining._compare(one, other)[0] < 2e-2
    third = load_encoder(save(models.encoder("BT", "BD"), tmp_path / "third.onnx"), device="cpu")
    assert joining._compare(one, third)[0] == float("inf")


@pytest.mark.parametrize(
    ("model", "contract", "says"),
    [
        (
            lambda: window_model(76, bands=80, batch=4),
            ["window.hop_frames=8"],
            "the model takes 4 windows per call, so that one graph cannot give all windows of a clip; export it with a "
            "dynamic batch axis, or use the two files by --contract frontend.model=mel.onnx",
        ),
        (
            lambda: counting(2),
            [],
            "input 'attention_mask' tells which frames are padding, and a waveform does not; export the model without it, "
            "or use the two files by --contract frontend.model=mel.onnx",
        ),
    ],
)
def test_pairs_that_one_graph_cannot_be(model: Any, contract: list[str], says: str, tmp_path: Path) -> None:
    save(front_model("kaldi"), tmp_path / "mel.onnx")
    save(model(), tmp_path / "model.onnx")
    with pytest.raises(ModelError) as caught:
        join(tmp_path / "model.onnx", tmp_path / "mel.onnx", contract, tmp_path / "whole.onnx")
    assert says in str(caught.value)
    assert not (tmp_path / "whole.onnx").exists()


def test_where_a_joined_file_may_lie(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    front = save(front_model(), tmp_path / "mel.onnx")
    model = save(feature_model("kaldi"), tmp_path / "a/model.onnx")
    with pytest.raises(UsageError, match=r"is not in the folder of .*; put it there, or below"):
        join(model, front, [], tmp_path / "whole.onnx")
    front = save(front_model(), tmp_path / "a/mel.onnx")
    for target in (front, model, tmp_path, tmp_path / "none/whole.onnx"):
        with pytest.raises(UsageError, match="name a new file in a folder that exists"):
            join(model, front, [], target)
    (tmp_path / "whole.toml").write_text("")
    with pytest.raises(UsageError, match=r"whole.toml would change what whole.onnx declares; choose another output"):
        join(model, front, [], tmp_path / "whole.onnx")


# ---------------------------------------------------------------- refusals


def loads(folder: Path, name: str) -> Encoder:
    return load_encoder(folder / "model.onnx", device="cpu", contract=[f"frontend.model={name}"])


def test_a_front_end_lies_beside_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save(feature_model("kaldi"), folder / "model.onnx")
    outside = save(front_model(), tmp_path / "mel.onnx")
    (folder / "link.onnx").symlink_to(outside)
    os.link(outside, folder / "hard.onnx")
    for name, says in {
        str(outside): "outside its folder; put the file beside the model",
        "../mel.onnx": "outside its folder; put the file beside the model",
        "link.onnx": "which is a link; put the file itself beside the model",
        "hard.onnx": "which is a hard link to a file elsewhere; put a copy beside the model",
        "none.onnx": "which does not exist; put the file beside the model",
        ".": "which does not exist; put the file beside the model",
    }.items():
        with pytest.raises(ModelError) as caught:
            loads(folder, name)
        assert f"declares frontend.model={name}, {says}" in str(caught.value)


def test_a_strangers_front_end_is_scanned(tmp_path: Path) -> None:
    save(feature_model("kaldi"), tmp_path / "model.onnx")
    (tmp_path / "mel.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"mel.onnx is not an ONNX file, or a damaged one"):
        loads(tmp_path, "mel.onnx")
    save(models.nested_functions(1_000), tmp_path / "bomb.onnx")
    with pytest.raises(ModelError, match=r"bomb.onnx (has more than|nests)"):
        loads(tmp_path, "bomb.onnx")


@pytest.mark.parametrize(
    ("front", "says"),
    [
        (
            lambda: models.encoder("BT", "BD"),
            "front end mel.onnx: it gives no frames; export it with a dynamic samples axis",
        ),
        (
            lambda: models.encoder(samples=16_000, frames=98),
            "front end mel.onnx: it takes exactly 16000 samples; export it with a dynamic samples axis",
        ),
        (models.stateful, "front end mel.onnx: the model keeps a state"),
        (
            models.encoder,
            "the front end gives 4 bins per frame; name the front end of this model by --contract frontend.model=FILE",
        ),
    ],
)
def test_a_front_end_that_cannot_be_used(front: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError) as caught:
        pair(tmp_path, front(), feature_model("kaldi"))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("contract", "says"),
    [
        (
            [MEL, "frontend.preset=kaldi"],
            "frontend.model=mel.onnx, which makes the features as it is, and --contract frontend.preset=kaldi; drop one",
        ),
        ([MEL, "frontend.mels=40"], "and --contract frontend.mels=40; drop one"),
        (
            ["frontend.scale=2"],
            "declares frontend.scale, which only a front end that is a graph has; declare its file by --contract "
            "frontend.model=FILE.onnx",
        ),
        (["frontend.preset=kaldi", "frontend.offset=2"], "or frontend.mean and frontend.std in its place"),
    ],
)
def test_declarations_that_exclude_each_other(contract: list[str], says: str, tmp_path: Path) -> None:
    save(front_model(), tmp_path / "mel.onnx")
    with pytest.raises(ContractError) as caught:
        load_encoder(save(feature_model("kaldi"), tmp_path / "model.onnx"), device="cpu", contract=contract)
    assert says in str(caught.value)


def test_a_front_end_on_the_command_line_stands_in_for_a_preset_beside(tmp_path: Path) -> None:
    save(front_model(), tmp_path / "mel.onnx")
    save(feature_model("kaldi"), tmp_path / "model.onnx")
    (tmp_path / "model.toml").write_text('[frontend]\npreset = "whisper"\nmels = 80\n')
    assert loads(tmp_path, "mel.onnx").contract.features is not None


# ---------------------------------------------------------------- names and changes


def test_the_content_of_the_front_end_names_the_embeddings(tmp_path: Path) -> None:
    first = pair(tmp_path, front_model("kaldi"), feature_model("kaldi"), cache=tmp_path / "cache")
    again = load_encoder(tmp_path / "model.onnx", device="cpu", contract=[MEL], cache=tmp_path / "cache")
    assert again.contract == first.contract
    front = front_model("kaldi")
    front.doc_string = "another file"
    other = pair(tmp_path, front, feature_model("kaldi"), cache=tmp_path / "cache")
    names = {encoder.contract.described()["frontend.model_sha256"]["value"] for encoder in (first, other)}
    assert len(names) == 2
    assert first.info.scan.sha256 == other.info.scan.sha256
    assert (
        first.info.scan.bytes
        == sum((tmp_path / name).stat().st_size for name in ("mel.onnx", "model.onnx")) - len("another file") - 2
    )


def test_a_front_end_that_is_replaced_while_it_is_in_use_is_not_run(tmp_path: Path) -> None:
    encoder = pair(tmp_path, front_model("kaldi"), feature_model("kaldi"))
    save(front_model("whisper"), tmp_path / "mel.onnx")
    with pytest.raises(ModelError, match="was replaced while it was in use; run again"):
        encoder.embed([CLIPS[-1]], RATE)
