"""What must hold for any bytes whatever, by reader: an answer of the kind that is promised, or the error that is.

`test_any_bytes` tries mutations of honest files; `fuzz` looks for more, guided by coverage.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_models as models
from shard_makers import clip_members, encoded, noise, task_toml, write_tar

from xares_onnx.data import audio
from xares_onnx.data.shards import index_shard, parse_label, read_extent, read_label
from xares_onnx.data.task import load_task
from xares_onnx.encoder.contract.declarations import (
    declared_by_preprocessor,
    declared_in_metadata,
    declared_in_sidecar,
    metadata_with,
)
from xares_onnx.encoder.contract.frame_law import frames_of_dimension
from xares_onnx.encoder.model_file import scan_model
from xares_onnx.errors import ClipError, ContractError, LabelError, ModelError, TaskFileError, UsageError

_ROOM = tempfile.TemporaryDirectory()
_FOLDER = Path(_ROOM.name)


@dataclass(frozen=True)
class Target:
    """`check` raises where a promise is broken; `seeds` are honest inputs."""

    check: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]


def check_audio(data: bytes) -> None:
    try:
        seconds = audio.duration(data)
        assert 0 <= seconds <= audio.MAX_SECONDS
    except ClipError as error:
        _is_sentence(error)
    try:
        samples, rate = audio.decode(data)
    except ClipError as error:
        _is_sentence(error)
        return
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert 0 < len(samples) <= audio.MAX_FRAMES
    assert np.isfinite(samples).all()
    assert audio.MIN_RATE <= rate <= audio.MAX_RATE


def audio_seeds() -> list[bytes]:
    sound, pair = noise(0.05), np.stack([noise(0.05)] * 2, axis=1)
    kinds = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("AIFF", "PCM_24")]
    kinds += [("MP3", "MPEG_LAYER_III"), ("AU", "ULAW"), ("CAF", "PCM_16"), ("W64", "PCM_16"), ("WAVEX", "PCM_16")]
    rate = 48_000  # which all of them take
    return [encoded(sound, rate, *kind) for kind in kinds] + [encoded(pair, rate, "FLAC", "PCM_24")]


def check_shard(data: bytes) -> None:
    path = _FOLDER / "a.tar"
    path.write_bytes(data)
    index = index_shard(path)
    for sample in index.samples:
        for extent in (sample.audio, sample.label):
            assert 0 <= extent.offset <= extent.offset + extent.size <= len(data)
        assert len(read_extent(path, sample.audio)) == sample.audio.size
        try:
            parse_label(read_label(path, sample.label))
        except (ClipError, LabelError) as error:
            str(error).encode()
    keys = [sample.key for sample in index.samples]
    assert len(set(keys)) == len(keys)
    assert all(key.isprintable() for key in [*keys, *(drop.key for drop in index.drops)])


def shard_seeds() -> list[bytes]:
    import tarfile

    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        parts = [*clip_members("a", b"x" * 20, {"label": 1}), *clip_members("é" * 120, b"y", [1])]
        if kind == tarfile.USTAR_FORMAT:
            parts = parts[:2]
        elif kind == tarfile.PAX_FORMAT:
            parts[0][0].pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3"}
        data = write_tar(_FOLDER / "seed.tar", parts, format=kind).read_bytes()
        found.append(data.rstrip(b"\0") + bytes(1536))
    return found


def check_task(data: bytes) -> None:
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    try:
        task = load_task(Path("any.toml"), text)
    except TaskFileError as error:
        _is_sentence(error, any_lines=True)
        return
    assert len(task.target.class_names) != 1
    assert len(task.digest()) == 64


def task_seeds() -> list[bytes]:
    shipped = (Path(__file__).parents[1] / "tasks").glob("synthetic_*.toml")
    return [task_toml().encode(), *(path.read_bytes() for path in sorted(shipped))]


def check_dimension(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of odd literals
        frames = frames_of_dimension(text, "samples")
    for samples in (1, 16_000, 2**31):
        assert frames is None or isinstance(frames(samples), int)


def dimension_seeds() -> list[bytes]:
    return [
        b"((samples//160)) + 1",
        b"floor(samples/320 - 1/2) + 1",
        b"min(max(samples,400),ceil(samples/7))",
        b"-samples*(2 - 3)",
    ]


def check_declared(data: bytes) -> None:
    """The same bytes as a sidecar, as a preprocessor's config and as metadata."""
    path = _FOLDER / "declared"
    path.write_bytes(data)
    for reader in (declared_in_sidecar, declared_by_preprocessor):
        try:
            _are_declarations(reader(path))
        except (ContractError, UsageError) as error:
            _is_sentence(error, any_lines=True)
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(raw, dict):
        return
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in raw.items()}
    try:
        declared = declared_in_metadata(metadata)
        _are_declarations(declared)
        again = declared_in_metadata(metadata_with(metadata, declared))
    except ContractError as error:
        _is_sentence(error, any_lines=True)
        return
    assert {key: by.value for key, by in again.items()} == {key: by.value for key, by in declared.items()}


def declared_seeds() -> list[bytes]:
    metadata = {"xares.hop_samples": "160", "sample_rate": "8000", "normalize_samples": "0", "xares.output_layout": "BT1D"}
    return [
        b'sample_rate = 8000\nhop_samples = 160\namplitude = "int16"\nfirst_frame_center_samples = 12.5\n',
        b'{"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000, "do_normalize": true}',
        json.dumps({**metadata, "xares.contract_version": "1", "xares.license": "MIT"}).encode(),
    ]


def check_model(data: bytes) -> None:
    path = _FOLDER / "m.onnx"
    path.write_bytes(data)
    try:
        scan = scan_model(path)
    except ModelError as error:
        _is_sentence(error)
        return
    assert scan.parameters >= 0
    assert scan.bytes == len(data)
    assert not scan.external  # there is nothing beside it
    assert math.isfinite(scan.opset)
    for text in (scan.producer, *scan.metadata, *scan.metadata.values()):
        text.encode()


def model_seeds() -> list[bytes]:
    found = [models.encoder(), models.nested_functions(5), models.endless_loop(), models.with_lengths()]
    found.append(models.with_external_weights(models.encoder(metadata={"a": "b"}), "w.bin")[0])
    return [model.SerializeToString() for model in found]


def _are_declarations(declared: dict[str, object]) -> None:
    json.dumps({key: getattr(by, "value") for key, by in declared.items()}).encode()  # noqa: B009


def _is_sentence(error: Exception, *, any_lines: bool = False) -> None:
    """`any_lines`: the command line prints it on one."""
    text = str(error)
    assert text
    assert any_lines or (text.encode() and "\n" not in text)
    assert len(text) < 2_000


TARGETS = {
    "audio": Target(check_audio, audio_seeds),
    "shard": Target(check_shard, shard_seeds),
    "task": Target(check_task, task_seeds),
    "dimension": Target(check_dimension, dimension_seeds),
    "declared": Target(check_declared, declared_seeds),
    "model": Target(check_model, model_seeds),
}
