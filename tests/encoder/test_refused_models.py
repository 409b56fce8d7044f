"""Models, files and external data that are refused: each with one sentence that names what is wrong, and exit code 3."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import feature_models
import numpy as np
import onnx
import onnx_models as models
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_models import noise, save, save_external

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.encoder.measuring.measure import measure_contract
from xares_onnx.encoder.session import Session
from xares_onnx.errors import ModelError

RATE = 16_000

# ---------------------------------------------------------------- refused models

REFUSED: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "a window of features": (
        lambda: models.encoder(samples=80, frames=None),
        "input 'audio' takes exactly 80 values, too few for a window of audio; export it with a dynamic samples axis",
    ),
    "rank 4": (models.rank_4, "input 'audio' has shape ['batch', 1, 'samples', 1]; a waveform input is"),
    "tokens": (models.tokens, "no float input for a waveform; it has 'tokens'"),
    "stateful": (models.stateful, "the model keeps a state: input 'state' takes output 'new_state' of the previous call"),
    "stateful, and nothing says which is the waveform": (
        lambda: models.renamed(models.stateful(), "audio", "left"),
        "input 'state' takes output 'new_state' of the previous call",
    ),
    "states known by their shape": (
        lambda: models.renamed(models.renamed(models.stateful(), "state", "h0"), "new_state", "hn"),
        "input 'h0' takes output 'hn' of the previous call",
    ),
    "another vector": (
        models.conditioned,
        "the model needs input 'speaker' (tensor(float), shape ['batch', 1, 4]) beside the waveform",
    ),
    "a state beside an input of any name": (
        lambda: models.renamed(models.stateful(), "audio", "sound"),
        "the model keeps a state: input 'state' takes output 'new_state' of the previous call",
    ),
    "a second waveform": (
        lambda: models.encoder(extra_inputs=[models.waveform_input("padding_mask")]),
        "the model needs input 'padding_mask' (tensor(float), shape ['batch', 'samples']) beside the waveform, which "
        "nothing here can fill; if it is a mask with ones for samples, set --contract mask_input=padding_mask; if",
    ),
    "one value a frame": (
        lambda: models.one_value("BT1"),
        "output 'embeddings' gives 1 value per frame; an embedding needs a dimension of 2 or more",
    ),
    "one value a frame without an axis": (lambda: models.one_value("BT"), "one value per frame is no embedding"),
    "one value a clip": (lambda: models.one_value("B"), "a single value is no embedding"),
    "frames and heads": (models.heads, "several axes could hold the dim"),
    "a batch that is nowhere in the output": (
        models.mean_over_a_batch_of_5,
        "with a fixed batch of 5 no axis holds the batch",
    ),
    "an unnamed input": (lambda: models.with_lengths(name="attention"), "the model needs input 'attention' (tensor(int64)"),
    "two waveforms": (
        lambda: models.renamed(models.encoder(extra_inputs=[models.waveform_input("right")]), "audio", "left"),
        "any of 'left', 'right' could be the waveform; name it by --contract input=NAME",
    ),
    "NaN": (models.not_a_number, "gives NaN or infinity"),
    "unknown operator": (models.unknown_operator, "Magic"),
    "scalar": (models.scalar_output, "output 'embeddings' has shape [] for 16000 samples and []"),
    "constant frames": (models.constant_frames, "output 'embeddings' has shape [1, 5, 4]"),
    "the same for any input": (models.a_table, "output 'embeddings' is the same for any input"),
    "an attention map": (models.attention_map, "no single axis holds frames that follow the input's length"),
    "no law": (models.lawless_frames, "the frame count of output 'embeddings' follows no law"),
    "a sequence": (models.sequence_output, "no output is a float tensor"),
    "two hidden states": (models.two_hidden_states, "any of outputs 'layer_1', 'layer_2' could be the embedding"),
    "a table of positions": (lambda: models.stops_growing(500), "the model fails on a chunk of 10 s; declare a shorter one"),
    "shorter than a second": (lambda: models.stops_growing(20), "the model fails on inputs of 1, 2, 4, 10, 30 s"),
    "too much memory": (models.huge_tensor, "it needs more memory than it may use"),
    "metadata that contradicts": (
        lambda: models.encoder(metadata={"xares.hop_samples": "320"}),
        "metadata declares hop_samples=320, but 160 was measured",
    ),
    "metadata of the wrong type": (lambda: models.encoder(metadata={"xares.hop_samples": "x"}), "hop_samples='x' is not"),
    "metadata with features": (
        lambda: feature_models.feature_model("kaldi", metadata={"xares.input_kind": "features"}),
        "metadata says that input 'features' takes features, but not how to make them; declare --contract "
        "frontend.preset=kaldi or another (docs/vendors.md), or the graph that makes them by --contract "
        "frontend.model=FILE.onnx, or export the model with its front end",
    ),
    "metadata with features where a waveform goes in": (
        lambda: models.encoder(metadata={"xares.frontend.preset": "whisper"}),
        "metadata says that the model takes features, but input 'audio' has the shape of a waveform, "
        "['batch', 'samples']; if its front end is inside, set --contract input_kind=waveform",
    ),
    "the same in a window": (
        lambda: models.encoder(samples=16_000, frames=98, metadata={"xares.frontend.preset": "whisper"}),
        "input 'audio' has the shape of a waveform, ['batch', 16000]; if its front end is inside, set",
    ),
    "features of an unknown extractor, and a waveform": (
        lambda: models.encoder(metadata={"xares.input_kind": "features"}),
        "input 'audio' has the shape of a waveform, ['batch', 'samples']; if its front end is inside, set",
    ),
    "the same in three axes": (
        lambda: models.encoder("B1T", metadata={"xares.frontend.preset": "kaldi"}),
        "input 'audio' has the shape of a waveform, ['batch', 1, 'samples']; if its front end is inside, set",
    ),
    "metadata with a key of no front end": (
        lambda: models.encoder(metadata={"xares.frontend.preset": "kaldi", "xares.frontend.mel": "80"}),
        "metadata: there is no contract key 'frontend.mel'; did you mean 'frontend.mels'",
    ),
    "features without a word": (
        lambda: feature_models.feature_model("whisper", name="mel"),
        "input 'mel' has the shape of features, ['batch', 80, 'frames'], and nothing declares how to make them; declare "
        "--contract frontend.preset=kaldi or another (docs/vendors.md), or the graph that makes them by --contract "
        "frontend.model=FILE.onnx, or export",
    ),
    "features in two axes without a word": (
        lambda: feature_models.feature_model("kaldi", "TF", name="input", sizes={"F": "bands"}),
        "; if it takes features, declare --contract frontend.preset=kaldi or another (docs/vendors.md), or the graph",
    ),
    "features in a window without a word": (
        lambda: feature_models.feature_model("kaldi", "B1TF", sizes={"T": 998, "B": 1}),
        "input 'features' has the shape of features, [1, 1, 998, 80], and nothing declares how to make them",
    ),
    "an image": (
        lambda: models.images(),
        "input 'pixel_values' has shape ['batch', 3, 224, 224]; a waveform input is [batch, samples]",
    ),
    "embeddings of tokens": (
        lambda: feature_models.feature_model("kaldi", "BTF", name="inputs_embeds", bands=768),
        "input 'inputs_embeds' has shape ['batch', 'frames', 768]; a waveform input is [batch, samples]",
    ),
}


def refused(path: Path, says: str, **options: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load_encoder(path, **options)
    message = str(caught.value)
    assert says in message
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert len(message) < 700


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name: str, tmp_path: Path, shared_process: None) -> None:
    model, says = REFUSED[name]
    refused(save(model(), tmp_path / "model.onnx"), says)


@pytest.mark.parametrize(
    ("contract", "says"),
    [
        ("hop_samples=320", "--contract declares hop_samples=320, but 160 was measured; correct the declaration"),
        ("receptive_field_samples=401", "--contract declares receptive_field_samples=401, but 400 was measured"),
        ("output_dim=5", "--contract declares output_dim=5, but 4 was measured"),
        ("output_layout=BDT", "--contract declares output_layout=BDT, but BTD was measured"),
        ("input_layout=B1T", "--contract declares input_layout=B1T, but input 'audio' has shape ['batch', 'samples']"),
        ("input=sound", "--contract: the model has no input 'sound'; it has 'audio'"),
        ("lengths_input=lengths", "--contract: the model has no input 'lengths'"),
        ("output=logits", "--contract: the model has no float output 'logits'; it has 'embeddings'"),
        ("min_samples=399", "--contract declares min_samples=399, but with that many samples model.onnx failed"),
        ("chunk_samples=399", "chunk_samples=399 is less than the 400 samples that the model needs"),
    ],
)
def test_a_declaration_that_contradicts_the_model(contract: str, says: str, tmp_path: Path, shared_process: None) -> None:
    refused(save(models.encoder(), tmp_path / "model.onnx"), says, contract=[contract])


def test_chunks_longer_than_the_declared_maximum(tmp_path: Path, shared_process: None) -> None:
    path = save(models.encoder(), tmp_path / "model.onnx")
    refused(
        path,
        "chunk_samples=90000 is more than max_samples=80000",
        contract=["max_samples=80000", "chunk_samples=90000"],
    )


@pytest.mark.parametrize("key", ["hop_samples", "receptive_field_samples", "first_frame_center_samples"])
def test_a_clip_only_model_has_no_frames_to_declare(key: str, tmp_path: Path, shared_process: None) -> None:
    path = save(models.encoder(output_layout="BD"), tmp_path / "model.onnx")
    refused(path, f"--contract declares {key}=160", contract=[f"{key}=160"])


def test_an_output_of_one_value_a_frame(tmp_path: Path, shared_process: None) -> None:
    extra = [helper.make_node("ReduceMean", ["frames_first"], ["embeddings"], axes=[2], keepdims=1)]
    model = models.encoder(output_layout="any", extra=extra)
    refused(save(model, tmp_path / "model.onnx"), "output 'embeddings' gives 1 value per frame")


# ---------------------------------------------------------------- refused files


def test_files_that_are_no_model(tmp_path: Path, shared_process: None) -> None:
    good = models.encoder().SerializeToString()
    cases = {
        "missing": (None, "does not exist"),
        "empty": (b"", "is empty"),
        "text": (b"just some text\n" * 100, "is not an ONNX file"),
        "noise": (random.Random(0).randbytes(5_000), "is not an ONNX file"),
        "cut": (good[: len(good) // 2], "is not an ONNX file, or a damaged one"),
        "no graph": (ModelProto(ir_version=8).SerializeToString(), "holds no graph"),
    }
    for name, (data, says) in cases.items():
        path = tmp_path / f"{name}.onnx"
        if data is not None:
            path.write_bytes(data)
        refused(path, says)


def test_names_that_are_no_file(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), "cannot be read (File name too long)")
    refused(tmp_path / "nul\0", "does not exist")
    refused(Path("/dev/zero"), "is not a regular file")
    with pytest.raises(ModelError, match="name that is not UTF-8"):
        load_encoder(tmp_path / "\udcff.onnx")
    os.mkfifo(tmp_path / "fifo.onnx")
    refused(tmp_path / "fifo.onnx", "is not a regular file")


def test_folders(tmp_path: Path, shared_process: None) -> None:
    refused(tmp_path, "holds no .onnx file")
    save(models.encoder(), tmp_path / "b.onnx")
    assert load_encoder(tmp_path).info.path == str(tmp_path / "b.onnx")
    save(models.encoder(), tmp_path / "a.onnx")
    refused(tmp_path, "holds 2 .onnx files and no model.onnx; name one of them")
    save(models.encoder(), tmp_path / "model.onnx")
    assert load_encoder(tmp_path).info.path == str(tmp_path / "model.onnx")


@pytest.mark.parametrize("field", ["metadata", "producer", "samples", "audio", "embeddings", "location"])
def test_text_that_is_not_utf8(field: str, tmp_path: Path, shared_process: None) -> None:
    model = models.with_external_weights(models.encoder(metadata={"xares.source": "metadata"}), "location")[0]
    model.producer_name = "producer"
    data = model.SerializeToString()
    assert field.encode() in data.replace(b'"location"', b"")
    path = tmp_path / "model.onnx"
    path.write_bytes(data.replace(field.encode(), b"\xff" * len(field)))
    refused(path, "is not UTF-8 text")


@pytest.mark.parametrize("where", ["initializer", "constant", "function"])
def test_tensors_that_claim_more_than_the_file_holds(where: str, tmp_path: Path, shared_process: None) -> None:
    huge = TensorProto(dims=[1 << 40, 1 << 40], data_type=TensorProto.FLOAT, name="huge")
    node = helper.make_node("Constant", [], ["huge"], value=huge)
    model = models.encoder()
    if where == "initializer":
        model.graph.initializer.append(huge)
    elif where == "constant":
        model.graph.node.append(node)
    else:
        model.functions.append(helper.make_function("d", "f", [], ["huge"], [node], [helper.make_opsetid("", 17)]))
    refused(save(model, tmp_path / "model.onnx"), f"tensor 'huge' claims {1 << 80:.0e} values and holds 0")


def test_no_damage_is_our_fault(tmp_path: Path, shared_process: None) -> None:
    """Bytes of a model changed, lost and added at random: a `ModelError`, or a model that still works."""
    chance = random.Random(0)
    sources = [models.encoder(), models.several_outputs(), models.nested_functions(4), models.with_lengths()]
    whole = [model.SerializeToString() for model in sources]
    outcomes = {"worked": 0, "refused": 0}
    for i in range(300):
        data = bytearray(chance.choice(whole))
        weights = data.find(models.WEIGHTS.tobytes())
        spots = [*range(weights), *range(weights + models.WEIGHTS.nbytes, len(data))]
        for _ in range(chance.choice([1, 1, 3])):
            spot = min(chance.choice(spots), len(data) - 1)
            match chance.randrange(3):
                case 0:
                    data[spot] = chance.randrange(256)
                case 1:
                    del data[spot : spot + chance.randrange(1, 9)]
                case 2:
                    data[spot:spot] = chance.randbytes(chance.randrange(1, 9))
        path = tmp_path / f"{i}.onnx"
        path.write_bytes(data)
        try:
            load_encoder(path).embed([noise(17_000)], RATE)
            outcomes["worked"] += 1
        except ModelError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


# ---------------------------------------------------------------- external data


def test_external_data_through_a_symbolic_link(tmp_path: Path, shared_process: None) -> None:
    path = save_external(tmp_path / "model", target=tmp_path / "elsewhere" / "weights.bin")
    (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "elsewhere" / "weights.bin")
    refused(path, "keeps weights in 'weights.bin', which is a link; put the file itself beside the model")


def test_external_data_through_a_linked_folder(tmp_path: Path, shared_process: None) -> None:
    path = save_external(tmp_path / "model", "sub/weights.bin", tmp_path / "elsewhere" / "weights.bin")
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "elsewhere")
    refused(path, "keeps weights in 'sub/weights.bin', which is a link")


def test_external_data_through_a_hard_link(tmp_path: Path, shared_process: None) -> None:
    path = save_external(tmp_path / "model", target=tmp_path / "elsewhere.bin")
    os.link(tmp_path / "elsewhere.bin", tmp_path / "model" / "weights.bin")
    refused(path, "keeps weights in 'weights.bin', which is a hard link to a file elsewhere; put a copy")


def test_external_data_outside_the_folder(tmp_path: Path, shared_process: None) -> None:
    outside = tmp_path / "outside.bin"
    for location in ("../outside.bin", "sub/../../outside.bin", str(outside), "..\\outside.bin", "C:outside.bin", ""):
        path = save_external(tmp_path / "model", location, outside)
        refused(path, f"keeps weights in {location!r}, outside its folder; put the file beside the model")


def test_external_data_that_is_no_file(tmp_path: Path, shared_process: None) -> None:
    elsewhere = tmp_path / "elsewhere.bin"
    os.mkdir(tmp_path / "folder")
    os.mkfifo(tmp_path / "fifo")
    for location in ("missing.bin", "folder", "fifo", ".", "w" * 5_000, "a\0b"):
        refused(save_external(tmp_path, location, elsewhere), "which does not exist; put the file beside the model")


def test_external_data_that_is_cut_short(tmp_path: Path, shared_process: None) -> None:
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
    refused(path, "'weights.bin', which ends at byte 100, before the weights do; get the whole file")


@pytest.mark.parametrize("where", ["attribute", "list", "sparse initializer", "sparse attribute", "inner graph", "function"])
def test_external_data_is_found_wherever_a_tensor_may_be(where: str, tmp_path: Path, shared_process: None) -> None:
    tensor = TensorProto(dims=[4], data_type=TensorProto.FLOAT, name="hidden")
    models.make_external(tensor, "../secret")
    sparse = onnx.SparseTensorProto(dims=[4], values=tensor, indices=numpy_helper.from_array(np.array([1])))
    model = models.encoder()
    node = helper.make_node("Constant", [], ["hidden"])
    attribute = node.attribute.add(name="value")
    match where:
        case "attribute":
            attribute.t.CopyFrom(tensor)
        case "list":
            attribute.tensors.append(tensor)
        case "sparse initializer":
            model.graph.sparse_initializer.append(sparse)
        case "sparse attribute":
            attribute.sparse_tensor.CopyFrom(sparse)
        case "inner graph":
            attribute.g.initializer.append(tensor)
        case "function":
            function = helper.make_function("d", "f", [], ["hidden"], [], [helper.make_opsetid("", 17)])
            function.attribute_proto.add(name="value").t.CopyFrom(tensor)
            model.functions.append(function)
    if "sparse initializer" != where != "function":
        model.graph.node.append(node)
    refused(save(model, tmp_path / "model.onnx"), "keeps weights in '../secret', outside its folder")


def test_the_same_noise_is_asked_for_once_and_another_shape_of_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two items of a second hold the same values as one of two seconds."""
    session = Session(save(models.encoder(frames=None), tmp_path / "model.onnx"), "cpu")
    asked: list[tuple[int, ...]] = []
    run = session.run_raw

    def counted(outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        asked.append(feeds["audio"].shape)
        return run(outputs, feeds)

    monkeypatch.setattr(session, "run_raw", counted)
    measure_contract(session, {}, lambda: None)
    # One second of one noise, three seconds, two items, the first again to see whether it repeats, another noise.
    assert asked[:5] == [(1, RATE), (1, 3 * RATE + 1), (2, RATE), (1, RATE), (1, RATE)]
    assert (1, 2 * RATE) in asked
