"""The name under which a shard is stored: what shapes its numbers changes it, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from xares_onnx.data import audio
from xares_onnx.data.audio import CropSettings
from xares_onnx.embedding import embed, store
from xares_onnx.embedding.embed import EmbedSpec
from xares_onnx.embedding.pieces import Piece
from xares_onnx.embedding.store import STORE_VERSION, store_key
from xares_onnx.encoder import spec as encoder_spec
from xares_onnx.encoder.contract.constants import Constant
from xares_onnx.encoder.contract.contract import Contract, FrontendModel
from xares_onnx.encoder.contract.frontend import make_frontend
from xares_onnx.encoder.contract.tokens import Tokens
from xares_onnx.encoder.contract.windows import Windows
from xares_onnx.encoder.exposure import Exposure
from xares_onnx.encoder.model_file import ModelScan
from xares_onnx.encoder.session import CUDA
from xares_onnx.encoder.spec import EncoderInfo, ModelSpec, Tap

CONTRACT = Contract(
    input="audio",
    input_layout="BT",
    lengths_input=None,
    output="embeddings",
    output_layout="BTD",
    dim=64,
    sample_rate=16_000,
    hop_samples=160,
    receptive_field_samples=400,
    first_frame_center_samples=200.0,
    min_samples=400,
    max_samples=None,
    chunk_samples=160_000,
    amplitude="unit",
    normalize="none",
    dynamic_batch=True,
    batch_coupled=False,
)


def spec() -> EmbedSpec:
    scan = ModelScan(
        sha256="a", bytes=1, solid_bytes=1, parameters=1, external=(), stamps={}, metadata={}, producer="p", opset=17
    )
    info = EncoderInfo(path="m.onnx", scan=scan, contract=CONTRACT, provider="CPUExecutionProvider", onnxruntime="1.2.3")
    return EmbedSpec(
        model=ModelSpec(info, "auto", 2),
        task="mine",
        shard=Path("a.tar"),
        shard_digest="b",
        shard_stamp=("a.tar", 1, 2, 3, 4),
        crops=CropSettings(5.0),
        frames=False,
        selected=frozenset({"x", "y"}),
        store=Path("store"),
    )


# A path into the spec, and another value there. Together they name every field: a new one must be put on one side.
SHAPING: dict[str, Any] = {
    "model.info.scan.sha256": "c",
    "model.info.scan.integers": True,
    "model.info.provider": CUDA,
    "model.info.exposure": Exposure(("x",)),
    "model.info.onnxruntime": "1.2.4",
    "model.info.contract.input": "x",
    "model.info.contract.input_layout": "B1T",
    "model.info.contract.lengths_input": "lengths",
    "model.info.contract.output": "y",
    "model.info.contract.output_layout": "BDT",
    "model.info.contract.dim": 65,
    "model.info.contract.sample_rate": 8_000,
    "model.info.contract.hop_samples": 320,
    "model.info.contract.receptive_field_samples": 401,
    "model.info.contract.first_frame_center_samples": 200.5,
    "model.info.contract.min_samples": 401,
    "model.info.contract.max_samples": 160_000,
    "model.info.contract.chunk_samples": 80_000,
    "model.info.contract.amplitude": "int16",
    "model.info.contract.normalize": "zscore",
    "model.info.contract.dynamic_batch": False,
    "model.info.contract.batch_coupled": True,
    "model.info.contract.mask_input": "mask",
    "model.info.contract.fixed_batch": 4,
    "model.info.contract.window_frames": 100,
    "model.info.contract.frontend": make_frontend({"preset": "whisper"}, 16_000),
    "model.info.contract.constants": {"is_longer": Constant("tensor(bool)", (None, 1), (1, 1), (True,))},
    "model.info.contract.tokens": Tokens(2, 12),
    "model.info.contract.frontend_model": FrontendModel(file="mel.onnx", sha256="d", contract=CONTRACT),
    "model.info.contract.windows": Windows(76, 8),
    "model.info.contract.chunk_overlap": "window",
    "crops.seconds": None,
    "crops.rule": "whole-crops",
    "crops.pad_short_clips": False,
    "frames": True,
    "crops.keep_padding": True,
    "shard_digest": "c",
    "selected": frozenset({"x"}),
}
NOT_SHAPING: dict[str, Any] = {
    "model.info.path": "elsewhere/n.onnx",
    "model.info.notes": ("said",),
    "model.info.batch_difference": 1e-6,
    "model.info.more_taps": (Tap("x", spec().model.info.contract),),
    "model.info.scan.bytes": 2,
    "model.info.scan.solid_bytes": 2,
    "model.info.scan.stamps": {"": ("m.onnx", 1, 2, 3, 4)},
    "model.info.scan.parameters": 2,
    "model.info.scan.external": ("w",),
    "model.info.scan.metadata": {"a": "b"},
    "model.info.scan.producer": "q",
    "model.info.scan.opset": 18,
    "model.info.contract.license": "MIT",
    "model.info.contract.source": "a paper",
    "model.info.contract.sources": {"dim": "measured"},
    "model.device": "cpu",
    "model.threads": 7,
    "model.trust": True,
    "task": "yours",
    "shard": Path("elsewhere/b.tar"),
    "shard_stamp": ("b.tar", 5, 6, 7, 8),
    "store": Path("elsewhere"),
    "piece_bytes": 9,
    "piece": Piece(0, 2),
}


def changed(record: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    assert getattr(record, name) != value
    return msgspec.structs.replace(record, **{name: changed(getattr(record, name), rest, value) if rest else value})


def leaves(record: Any, where: str = "") -> Iterator[str]:
    for name in record.__struct_fields__:
        value = getattr(record, name)
        yield from leaves(value, f"{where}{name}.") if isinstance(value, msgspec.Struct) else [where + name]


def test_every_field_is_known_to_shape_the_numbers_or_not() -> None:
    assert sorted(leaves(spec())) == sorted([*SHAPING, *NOT_SHAPING])


@pytest.mark.parametrize("path", SHAPING)
def test_what_shapes_the_numbers_changes_the_name(path: str) -> None:
    assert changed(spec(), path, SHAPING[path]).key() != spec().key()


@pytest.mark.parametrize("path", NOT_SHAPING)
def test_nothing_else_changes_the_name(path: str) -> None:
    assert changed(spec(), path, NOT_SHAPING[path]).key() == spec().key()


def test_how_the_processor_adds_bytes_names_quantised_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float model's name is the digest that it was before there was such a thing."""
    quantised = changed(spec(), "model.info.scan.integers", True)
    names = {}
    for sums in ("exact", "saturating", "unknown"):
        monkeypatch.setattr(embed.processor, "pair_sums", lambda sums=sums: sums)
        names[sums] = (spec().key(), quantised.key())
    assert len({name for name, _ in names.values()}) == 1
    assert len({name for _, name in names.values()}) == 3
    monkeypatch.setattr(embed.audio, "resampler_version", lambda: "soxr 1")
    monkeypatch.setattr(embed.audio, "decoder_version", lambda: "libsndfile 1")
    monkeypatch.setattr(store, "STORE_VERSION", 1)
    assert spec().key() == "2994eb07ae6472b015456a49d092a174b2c592e1"


def test_each_tap_has_a_name_of_its_own() -> None:
    layer = Tap("layer", changed(spec().model.info.contract, "output", "inside"))
    tapped = changed(spec(), "model.info.more_taps", (layer,))
    assert tapped.key(0) == spec().key()
    assert tapped.key(1) == changed(spec(), "model.info.contract.output", "inside").key()


def test_all_clips_by_name_are_not_all_clips() -> None:
    """A shard's choice is by key; None also keeps those that cannot be read."""
    assert changed(spec(), "selected", None).key() != spec().key()
    assert changed(spec(), "selected", frozenset()).key() != changed(spec(), "selected", None).key()


def test_providers_and_batches_change_the_name_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = changed(spec(), "model.info.provider", CUDA)
    on_another = changed(spec(), "model.info.provider", "ROCMExecutionProvider")
    assert on_cuda.model.info.batching == on_another.model.info.batching != spec().model.info.batching
    assert on_cuda.key() != on_another.key()
    on_the_cpu = spec().key()
    for constant in ("GPU_BATCH", "_CALL_SECONDS", "_WINDOW_SECONDS"):
        before = on_cuda.key()
        with monkeypatch.context() as patched:
            patched.setattr(encoder_spec, constant, 8)
            assert on_cuda.key() != before
            assert spec().key() == on_the_cpu


def test_where_a_shard_is_cut_names_it_only_if_chunks_of_a_piece_share_calls() -> None:
    on_cuda = changed(spec(), "model.info.provider", CUDA)
    large = ("a.tar", on_cuda.piece_bytes + 1, 2, 3, 4)
    cut = changed(on_cuda, "shard_stamp", large)
    assert cut.key() not in (on_cuda.key(), changed(cut, "piece_bytes", 9).key())
    assert changed(on_cuda, "shard_stamp", ("a.tar", on_cuda.piece_bytes, 2, 3, 4)).key() == on_cuda.key()
    assert changed(spec(), "shard_stamp", large).key() == spec().key()


def test_a_piece_is_named_after_its_shard_and_its_clips() -> None:
    piece = changed(spec(), "piece", Piece(3, 17))
    assert (spec().name(), piece.name()) == (spec().key(), f"{spec().key()}.3-17")


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (audio.soxr, "__version__", "0"),
        (audio.soundfile, "__libsndfile_version__", "0"),
        (store, "STORE_VERSION", STORE_VERSION + 1),
        (embed.audio, "resampler_version", lambda: "soxr VHQ"),
    ],
)
def test_a_version_changes_the_name(module: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = spec().key()
    monkeypatch.setattr(module, name, value)
    assert spec().key() != before


def test_the_name_is_the_same_in_every_process() -> None:
    """Sets and dicts have an order of their own in each."""
    many = changed(spec(), "selected", frozenset(map(str, range(50))))
    again = changed(spec(), "selected", frozenset(map(str, reversed(range(50)))))
    assert many.key() == again.key()
    assert store_key({"b": [1], "a": None}) == store_key({"a": None, "b": [1]}) == "2de15135fb6c982efaaf60f4e5f9c861c51db0f2"
