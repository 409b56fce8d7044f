"""What must hold for any bytes whatever, by reader: an answer of the kind that is promised, or the error that is.

`test_any_bytes` tries mutations of honest files; `fuzz` looks for more, guided by coverage.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_models as models
from made_results import record, result
from shard_makers import clip_members, encoded, noise, task_toml, write_tar

from xares_onnx.checking.parity import read_reference
from xares_onnx.data import audio
from xares_onnx.data.shards import index_shard, parse_label, read_extent, read_label
from xares_onnx.data.task import load_task
from xares_onnx.embedding.store import STORE_VERSION, Clip, EmbeddedShard, Header, Store
from xares_onnx.encoder.contract.declarations import (
    declared_by_preprocessor,
    declared_in_metadata,
    declared_in_sidecar,
    metadata_with,
)
from xares_onnx.encoder.contract.frame_law import frames_of_dimension
from xares_onnx.encoder.model_file import scan_model
from xares_onnx.errors import ClipError, ContractError, DataError, LabelError, ModelError, TaskFileError, UsageError
from xares_onnx.evaluation.record import read_predictions, read_result
from xares_onnx.packing.columns import find_columns
from xares_onnx.packing.tables import open_table

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
            audio.decode(read_extent(path, sample.audio), seconds=1.0)
        except ClipError as error:
            str(error).encode()
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


def check_table(data: bytes) -> None:
    """The same bytes as a table of each kind but parquet, which is pyarrow's."""
    for ending in ("csv", "tsv", "jsonl"):
        path = _FOLDER / f"t.{ending}"
        path.write_bytes(data)
        try:
            table = open_table(path)
            columns = find_columns(table)
            for _, cells in table.rows(columns.wanted):
                try:
                    json.dumps(columns.labels.join([columns.labels.read(cells)]))
                    columns.part(cells, "here")
                except (LabelError, UsageError) as error:
                    _is_sentence(error, any_lines=True)
        except (DataError, UsageError) as error:
            _is_sentence(error, any_lines=True)


def table_seeds() -> list[bytes]:
    return [
        b'path,label,split\na.wav,dog,train\nb.wav,"c, d",test\n',
        b'file\tlabels\tfold\na.wav\t"x;y"\t1\n',
        b"path,start,end,label\na.wav,0.5,1,bark\n",
        b'{"path": "a.wav", "events": [{"onset": 0, "offset": 1, "event": "x"}]}\n{"path": "b.wav", "events": null}\n',
        b"path,score,group\na.wav,1e3,x\n",
    ]


def check_result(data: bytes) -> None:
    path = _FOLDER / "r.json"
    path.write_bytes(data)
    try:
        result = read_result(path)
    except UsageError as error:
        _is_sentence(error, any_lines=True)
        return
    for scored in result.tasks:
        try:
            read_predictions(path, scored)
        except DataError as error:  # there are none
            _is_sentence(error, any_lines=True)


def result_seeds() -> list[bytes]:
    records = [record("a", 0.5, predictions="r.predictions/a.linear.npz"), record("b", None)]
    return [msgspec.json.encode(result(records))]


def check_arrays(data: bytes) -> None:
    """As predictions and as a reference."""
    path = _FOLDER / "p.npz"
    path.write_bytes(data)
    for reader in (lambda: read_predictions(path, record("a", 0.5, predictions="p.npz")), lambda: read_reference(path)):
        try:
            reader()
        except (DataError, UsageError) as error:
            _is_sentence(error, any_lines=True)


def array_seeds() -> list[bytes]:
    seeds = []
    for save in (np.savez, np.savez_compressed):
        with io.BytesIO() as buffer:
            save(buffer, key=np.array(["a", "b"]), fold=np.array(["f", "f"]), seed=np.array([0, 0]), target=np.ones((2, 3)))
            seeds.append(buffer.getvalue())
    with io.BytesIO() as buffer:
        np.savez(buffer, rate=16_000, waveform=np.ones(320, np.float32), embeddings=np.ones((2, 4), np.float32))
        seeds.append(buffer.getvalue())
    return seeds


def check_stored(data: bytes) -> None:
    """Bytes up to the first NUL, NUL as a shard's rows, the rest as its tensors: it is read, or not there."""
    store = Store(_FOLDER / "store")
    rows, _, tensors = data.partition(b"\0\0")
    folder = store.root / "ab"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{_STORED}.jsonl").write_bytes(rows)
    (folder / f"{_STORED}.safetensors").write_bytes(tensors)
    store.header(_STORED)
    shard = store.read(_STORED)
    if shard is not None:
        assert np.isfinite(shard.pooled).all()
        assert len(shard.pooled) == len(shard.clip_of_crop)


def stored_seeds() -> list[bytes]:
    store = Store(_FOLDER / "made")
    header = Header(
        store_version=STORE_VERSION,
        model="m",
        model_sha256="0",
        task="t",
        shard="s",
        expected=2,
        damage=None,
        audio_seconds=1.0,
    )
    pooled, clips = np.ones((2, 3), np.float32), [Clip("a", 0.5, "{}"), Clip("b", 0.5, "[]")]
    store.write(_STORED, EmbeddedShard(header, pooled, np.arange(2), clips, []))
    folder = store.root / "ab"
    return [b"\0\0".join((folder / f"{_STORED}{ending}").read_bytes() for ending in (".jsonl", ".safetensors"))]


_STORED = "ab" * 20


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
    "table": Target(check_table, table_seeds),
    "result": Target(check_result, result_seeds),
    "arrays": Target(check_arrays, array_seeds),
    "stored": Target(check_stored, stored_seeds),
}
