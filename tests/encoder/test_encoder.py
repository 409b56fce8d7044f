"""The public door: `load_encoder(path).embed(waveforms, rate)` against NumPy, for every layout and declaration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_models as models
import pytest
import soxr
from onnx import ModelProto, TensorProto
from onnx_models import DIM, HOP, RECEPTIVE, noise, save, save_external

import xares_onnx
from xares_onnx.encoder import encoder as encoder_module
from xares_onnx.encoder import resolve
from xares_onnx.encoder.batching import Batching
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.encoder.session import cuda_may_work
from xares_onnx.encoder.spec import ModelSpec
from xares_onnx.encoder.worker import Worker
from xares_onnx.errors import ContractError, MachineError, ModelError, UsageError
from xares_onnx.progress import Event, Note, ignore

RATE = 16_000
TOLERANCE = 2e-6  # float32 sums of 400 products against float64


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    with load(models.encoder(), tmp_path_factory.mktemp("plain")) as encoder:
        yield encoder


def load(model: ModelProto, folder: Path, **options: Any) -> Encoder:
    return load_encoder(save(model, folder / "model.onnx"), **{"device": "cpu", **options})


def reference(waveform: np.ndarray, amplitude: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Frames and times of the tiny encoder with 10 s chunks, by the words of the contract, frame by frame."""
    frames, times = [], []
    for start in range(0, len(waveform), 10 * RATE):
        piece = waveform[start : start + 10 * RATE]
        padded = np.pad(piece, (0, max(0, RATE - len(piece))))
        for i, frame in enumerate(models.embed(padded * amplitude)):
            center = start + RECEPTIVE / 2 + i * HOP
            if center - HOP / 2 < len(waveform) or (start == 0 and i == 0):
                frames.append(frame)
                times.append(center / RATE)
    return np.array(frames), np.array(times)


# ---------------------------------------------------------------- embeddings are right


@pytest.mark.parametrize("samples", [1, 399, 401, 15_999, 16_001, 31_417, 160_000, 160_001, 175_999, 333_333])
def test_frames_and_times_equal_numpy(plain: Encoder, samples: int) -> None:
    waveform = noise(samples)
    (embedding,) = plain.embed([waveform], RATE)
    frames, times = reference(waveform)
    assert embedding.frames.dtype == np.float32
    assert embedding.times.dtype == np.float64
    assert embedding.frames.shape == frames.shape
    np.testing.assert_allclose(embedding.frames, frames, atol=TOLERANCE)
    np.testing.assert_allclose(embedding.times, times, rtol=0, atol=1e-12)


def test_a_clip_depends_on_itself_alone(plain: Encoder) -> None:
    clips = [
        noise(samples, seed) * loudness for seed, (samples, loudness) in enumerate([(16_000, 0.01), (50_001, 1), (7, 1)])
    ]
    alone = [plain.embed([clip], RATE)[0] for clip in clips]
    orders = [[0, 1, 2], [2, 1, 0], [1, 0, 0, 2, 1]]
    for order in orders:
        for i, embedding in zip(order, plain.embed([clips[i] for i in order], RATE), strict=True):
            np.testing.assert_array_equal(embedding.frames, alone[i].frames)
            np.testing.assert_array_equal(embedding.times, alone[i].times)


def test_threads_change_no_bit_and_no_order(plain: Encoder) -> None:
    clips = [noise(2_000 * i + 5, i) for i in range(1, 40)]
    expected = plain.embed(clips, RATE)
    for threads in (1, 3, 8):
        spec = ModelSpec(plain.info, plain.spec.device, threads)
        for embedding, other in zip(Encoder(spec, plain.worker).embed(clips, RATE), expected, strict=True):
            np.testing.assert_array_equal(embedding.frames, other.frames)


def test_the_batches_of_a_gpu_change_no_clip(plain: Encoder) -> None:
    """Chunks of a window share a call where they are equally long; results then find back to their clips, in order."""
    clips = [noise(samples, seed) for seed, samples in enumerate([16_000, 16_000, 20_000, 16_000, 330_000, 5, 16_000])]
    sizes, counts = plain.worker.call(
        run_in_batches, plain.spec, clips, returns=list[list[int]], silence_limit=60, observer=ignore
    )
    # The first window ends with the second chunk of 160,000: both of those; 20,000; 16,000 three times.
    # The second holds the tail of 10,000, padded to a second, a short clip and 16,000: three times 16,000.
    assert sizes == [2, 1, 3, 3]
    assert counts == [len(embedding.frames) for embedding in plain.embed(clips, RATE)]


def run_in_batches(spec: ModelSpec, clips: list[np.ndarray], *, tell: Any) -> list[list[int]]:
    """In the worker: sizes of the calls, and the frames of each clip; every frame is compared with batch 1."""
    from xares_onnx.encoder.resolve import open_session
    from xares_onnx.encoder.runner import ChunkRunner, Job

    session, sizes = open_session(spec, tell), []
    run = session.run_taps
    single = [
        np.concatenate([frames for _, _, (frames,), _ in ChunkRunner(session, spec).run([Job(0, clip)])]) for clip in clips
    ]
    session.run_taps = lambda waveforms, *rest: (sizes.append(len(waveforms)), run(waveforms, *rest))[1]  # type: ignore
    try:
        runner = ChunkRunner(session, spec, batching=Batching(3, 480_000, 388_000), callers=1)
        parts: list[list[np.ndarray]] = [[] for _ in clips]
        for job, _, (frames,), _ in runner.run(Job(i, clip) for i, clip in enumerate(clips)):
            parts[job.tag].append(frames)
    finally:
        del session.run_taps
    for frames, expected in zip(parts, single, strict=True):
        np.testing.assert_allclose(np.concatenate(frames), expected, atol=1e-6)
    return [sizes, [len(np.concatenate(frames)) for frames in parts]]


def test_other_rates_are_resampled(plain: Encoder) -> None:
    waveform = noise(44_100)
    (embedding,) = plain.embed([waveform], 44_100)
    frames, times = reference(soxr.resample(waveform, 44_100, RATE, quality="HQ").astype(np.float32))
    np.testing.assert_allclose(embedding.frames, frames, atol=TOLERANCE)
    np.testing.assert_allclose(embedding.times, times, atol=1e-12)


def test_a_tone_is_where_it_was_after_resampling(plain: Encoder) -> None:
    """A click at 2.5 s of a 48 kHz clip is loudest in the frame whose centre is next to 2.5 s."""
    waveform = np.zeros(5 * 48_000)
    waveform[round(2.5 * 48_000)] = 1.0
    (embedding,) = plain.embed([waveform], 48_000)
    quiet = plain.embed([np.zeros(5 * 48_000)], 48_000)[0].frames
    moved = np.abs(embedding.frames - quiet).max(axis=1) > 1e-3
    assert np.abs(embedding.times[moved] - 2.5).max() <= RECEPTIVE / 2 / RATE + 1e-3


def test_embed_takes_lists_generators_and_nothing(plain: Encoder) -> None:
    waveform = noise(16_000).astype(np.float64)
    expected = plain.embed([waveform], RATE)[0].frames
    from_list, from_strided = plain.embed(
        (item for item in ([float(x) for x in waveform], np.repeat(waveform, 2)[::2])), RATE
    )
    np.testing.assert_array_equal(from_list.frames, expected)
    np.testing.assert_array_equal(from_strided.frames, expected)
    assert plain.embed([], RATE) == []


@pytest.mark.parametrize(
    ("waveform", "rate", "says"),
    [
        (np.zeros((2, 100)), RATE, r"shape \(samples,\), not \(2, 100\); mix channels down first"),
        (np.zeros(0), RATE, r"not \(0,\)"),
        (np.array([0.0, np.nan]), RATE, "a waveform must hold finite numbers"),
        (np.array([0.0, 1e39]), RATE, "a waveform must hold finite numbers"),
        (np.zeros(100, np.int16), RATE, "floats in .*, not int16; divide 16-bit samples by 32768"),
        (np.zeros(100, complex), RATE, "not complex128"),
        (["a"], RATE, "not <U1"),
        (None, RATE, "not object"),
        (np.zeros(100), 0, "rate=0 must be a sampling rate"),
        (np.zeros(1), 1_000_000, "1 samples at 1000000 Hz are too few to resample"),
    ],
)
def test_wrong_waveforms(plain: Encoder, waveform: Any, rate: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plain.embed([waveform], rate)


# ---------------------------------------------------------------- layouts, types, declarations

SAME: dict[str, Callable[[], ModelProto]] = {
    "[batch, dim, frames]": lambda: models.encoder(output_layout="BDT"),
    "[batch, 1, samples]": lambda: models.encoder("B1T"),
    "[batch, 1, samples] to [batch, dim, frames]": lambda: models.encoder("B1T", "BDT"),
    "[samples] to [frames, dim]": lambda: models.encoder("T", "TD"),
    "[samples] to [1, frames, dim]": lambda: models.encoder("T", "BTD", batch=1),
    "[1, samples]": lambda: models.encoder(batch=1),
    "[1, samples] to [frames, dim]": lambda: models.encoder("BT", "TD", batch=1),
    "nameless axes": lambda: models.encoder(samples=None, frames=None, batch=None),
    "a frames axis that lies": lambda: models.encoder(frames="samples//320"),
    "a frames axis that divides by zero": lambda: models.encoder(frames="samples//(samples - 48001)"),
    "a frames axis that is no arithmetic": lambda: models.encoder(frames="max(samples)"),
    "output of unknown rank": lambda: models.encoder(output_layout="any"),
    "lengths int64": models.with_lengths,
    "lengths int32": lambda: models.with_lengths(TensorProto.INT32, "audio_lens"),
    "several outputs": models.several_outputs,
    "nested functions": lambda: models.nested_functions(5),
}


@pytest.mark.parametrize("name", SAME)
def test_every_layout_gives_the_same(name: str, tmp_path: Path, plain: Encoder, shared_process: None) -> None:
    clips = [noise(31_417), noise(16_000, 1), noise(200_001, 2)]
    encoder = load(SAME[name](), tmp_path)
    assert (encoder.contract.hop_samples, encoder.contract.receptive_field_samples) == (HOP, RECEPTIVE)
    for embedding, expected in zip(encoder.embed(clips, RATE), plain.embed(clips, RATE), strict=True):
        np.testing.assert_allclose(embedding.frames, expected.frames, atol=TOLERANCE)
        np.testing.assert_array_equal(embedding.times, expected.times)


def test_float16_in_and_out(tmp_path: Path, shared_process: None) -> None:
    waveform = noise(31_417)
    encoder = load(models.encoder(kind=models.FLOAT16), tmp_path)
    (embedding,) = encoder.embed([waveform], RATE)
    assert embedding.frames.dtype == np.float32
    expected, _ = reference(waveform.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(embedding.frames, expected, atol=2e-3)


def test_float64_in_and_out(tmp_path: Path, shared_process: None) -> None:
    waveform = noise(31_417)
    (embedding,) = load(models.encoder(kind=TensorProto.DOUBLE), tmp_path).embed([waveform], RATE)
    np.testing.assert_allclose(embedding.frames, reference(waveform)[0], atol=TOLERANCE)


def test_clip_only(tmp_path: Path, shared_process: None) -> None:
    """Chunk vectors are averaged by the seconds of audio that they hold; there are no times."""
    encoder = load(models.encoder(output_layout="BD"), tmp_path)
    assert encoder.contract.clip_only
    assert encoder.contract.min_samples == 1_000
    waveform = noise(165_000) * np.linspace(0, 1, 165_000, dtype=np.float32)
    (embedding,) = encoder.embed([waveform], RATE)
    first, second = models.embed(waveform[:160_000]), models.embed(np.pad(waveform[160_000:], (0, 11_000)))
    mean = (first.mean(axis=0) * 160_000 + second.mean(axis=0) * 5_000) / 165_000
    np.testing.assert_allclose(embedding.frames, [mean], atol=TOLERANCE)
    assert embedding.times.shape == (0,)


def test_the_law_and_the_minimum_are_measured(plain: Encoder) -> None:
    contract = plain.contract
    assert (contract.hop_samples, contract.receptive_field_samples, contract.dim) == (HOP, RECEPTIVE, DIM)
    assert (contract.first_frame_center_samples, contract.min_samples) == (RECEPTIVE / 2, RECEPTIVE)
    assert (contract.chunk_samples, contract.sample_rate) == (160_000, 16_000)
    assert (contract.dynamic_batch, contract.batch_coupled) == (True, False)
    assert contract.sources["hop_samples"] == "measured"
    assert contract.sources["sample_rate"] == "default"
    assert contract.sources["first_frame_center_samples"] == "default (receptive field / 2)"


def test_int16_amplitude(tmp_path: Path, shared_process: None) -> None:
    waveform = noise(31_417)
    encoder = load(models.encoder(), tmp_path, contract=["amplitude=int16"])
    (embedding,) = encoder.embed([waveform], RATE)
    np.testing.assert_allclose(embedding.frames, reference(waveform, 32_768)[0], rtol=1e-5, atol=0.02)


def test_zscore_is_over_the_whole_clip(tmp_path: Path, shared_process: None) -> None:
    waveform = (noise(200_001) * np.linspace(0.1, 1, 200_001) + 0.3).astype(np.float32)
    encoder = load(models.encoder(metadata={"xares.normalize": "zscore"}), tmp_path)
    (embedding,) = encoder.embed([waveform], RATE)
    doubles = waveform.astype(np.float64)
    expected, _ = reference((doubles - doubles.mean()) / np.sqrt(doubles.var() + 1e-7))
    np.testing.assert_allclose(embedding.frames, expected, atol=5e-6)


def test_a_constant_clip_survives_zscore(tmp_path: Path, shared_process: None) -> None:
    encoder = load(models.encoder(metadata={"xares.normalize": "zscore"}), tmp_path)
    (embedding,) = encoder.embed([np.full(16_000, 0.5)], RATE)
    np.testing.assert_allclose(embedding.frames, models.embed(np.zeros(16_000)), atol=1e-4)


def test_declared_rate_centre_and_chunk(tmp_path: Path, shared_process: None) -> None:
    waveform = noise(20_000)
    encoder = load(
        models.encoder(),
        tmp_path,
        contract=["sample_rate=8000", "first_frame_center_samples=12.5", "chunk_samples=12000", "min_samples=500"],
    )
    assert encoder.contract.min_samples == 500
    (embedding,) = encoder.embed([waveform], 8_000)
    first, second = models.embed(waveform[:12_000]), models.embed(waveform[12_000:])
    np.testing.assert_allclose(embedding.frames, np.concatenate([first, second]), atol=TOLERANCE)
    centers = [*(12.5 + 160 * np.arange(len(first))), *(12_012.5 + 160 * np.arange(len(second)))]
    np.testing.assert_allclose(embedding.times, np.array(centers) / 8_000, atol=1e-12)


@pytest.mark.parametrize("most", [6_000, 17_000, 100_000])
def test_max_samples_bounds_every_chunk_and_every_probe(tmp_path: Path, most: int, shared_process: None) -> None:
    model = models.stops_growing((most - RECEPTIVE) // HOP + 1)
    encoder = load(model, tmp_path, contract=[f"max_samples={most}"])
    assert encoder.contract.chunk_samples == most
    waveform = noise(2 * most)
    (embedding,) = encoder.embed([waveform], RATE)
    expected = np.concatenate([models.embed(waveform[:most]), models.embed(waveform[most:])])
    np.testing.assert_allclose(embedding.frames, expected, atol=TOLERANCE)


def test_who_declares_wins(tmp_path: Path, shared_process: None) -> None:
    """--contract, then the file beside the model, its metadata, Hugging Face's config, the default."""
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 4000, "do_normalize": true}')
    bare, metadata = models.encoder(), models.encoder(metadata={"xares.sample_rate": "6000"})

    def rate_and_source(model: ModelProto, *contract: str) -> tuple[int, str]:
        encoder = load(model, tmp_path, contract=contract)
        assert encoder.contract.normalize == "zscore"  # nobody else says anything about it
        return encoder.contract.sample_rate, encoder.contract.sources["sample_rate"]

    assert rate_and_source(bare) == (4_000, "preprocessor_config.json")
    assert rate_and_source(metadata) == (6_000, "metadata")
    (tmp_path / "model.toml").write_text("sample_rate = 7000")
    assert rate_and_source(metadata) == (7_000, "model.toml")
    assert rate_and_source(metadata, "sample_rate=8000") == (8_000, "--contract")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "model.toml").unlink()
    encoder = load(bare, tmp_path)
    assert (encoder.contract.sample_rate, encoder.contract.sources["sample_rate"]) == (16_000, "default")


def test_what_is_assumed_is_said_once(tmp_path: Path, shared_process: None) -> None:
    told: list[Event] = []
    load(models.encoder(), tmp_path, observer=told.append)
    notes = [event.text for event in told if isinstance(event, Note)]
    assert notes == [
        "assumed, because the model does not declare it: sample_rate=16000, amplitude=unit, normalize=none "
        "(--contract changes it)"
    ]
    told.clear()
    load(
        models.encoder(), tmp_path, observer=told.append, contract=["sample_rate=16000", "amplitude=unit", "normalize=none"]
    )
    assert not [event for event in told if isinstance(event, Note)]


def test_a_batch_coupled_model_runs_alone_and_says_so(tmp_path: Path, shared_process: None) -> None:
    encoder = load(models.batch_coupled(), tmp_path)
    assert encoder.contract.batch_coupled
    assert encoder.info.batching.items == 1
    assert any("depends on its neighbours" in note for note in encoder.info.notes)
    quiet, loud = noise(16_000) * 0.1, noise(16_000, 1)
    np.testing.assert_array_equal(encoder.embed([quiet, loud], RATE)[0].frames, encoder.embed([quiet], RATE)[0].frames)


def test_a_named_output(tmp_path: Path, shared_process: None) -> None:
    encoder = load(models.two_hidden_states(), tmp_path, contract=["output=layer_2"])
    waveform = noise(16_000)
    np.testing.assert_allclose(encoder.embed([waveform], RATE)[0].frames, -models.embed(waveform), atol=TOLERANCE)


def test_a_named_output_without_frames(tmp_path: Path, shared_process: None) -> None:
    encoder = load(models.several_outputs(), tmp_path, contract=["output=embeddings"])
    assert encoder.contract.clip_only


@pytest.mark.parametrize("location", ["weights.bin", "sub/weights.bin"])
def test_external_data_loads_and_is_part_of_the_content(
    location: str, tmp_path: Path, plain: Encoder, shared_process: None
) -> None:
    path = save_external(tmp_path, location)
    encoder = load_encoder(path)
    waveform = noise(16_000)
    np.testing.assert_array_equal(encoder.embed([waveform], RATE)[0].frames, plain.embed([waveform], RATE)[0].frames)
    scan = encoder.info.scan
    assert scan.external == (location,)
    assert scan.bytes == path.stat().st_size + models.WEIGHTS.nbytes
    assert scan.parameters == plain.info.scan.parameters >= models.WEIGHTS.size + models.BIAS.size
    assert scan.sha256 != plain.info.scan.sha256
    weights = bytearray((tmp_path / location).read_bytes())
    weights[-1] ^= 1
    (tmp_path / location).write_bytes(weights)
    assert load_encoder(path).info.scan.sha256 != scan.sha256


# ---------------------------------------------------------------- what was measured before


def test_a_second_load_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = save(models.encoder(), tmp_path / "model.onnx"), tmp_path / "cache"
    waveform = noise(16_000)
    told: list[list[Event]] = [[], []]
    with load_encoder(path, cache=cache, observer=told[0].append) as first:
        expected = first.embed([waveform], RATE)[0].frames
    started = []
    popen = encoder_module.Worker._start
    monkeypatch.setattr(Worker, "_start", lambda worker: (started.append(worker), popen(worker))[1])
    with load_encoder(path, cache=cache, observer=told[1].append) as second:
        assert not started
        assert second.info == first.info
        assert told[0] == told[1] != []  # what was assumed is said again
        np.testing.assert_array_equal(second.embed([waveform], RATE)[0].frames, expected)
        assert len(started) == 1


def test_what_is_remembered_depends_on_all_that_shapes_it(
    tmp_path: Path, shared_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = save_external(tmp_path), tmp_path / "cache"
    weights = tmp_path / "weights.bin"
    calls, call = [], encoder_module.Worker.call
    monkeypatch.setattr(encoder_module.Worker, "call", lambda *a, **options: (calls.append(a), call(*a, **options))[1])

    def measured(**options: Any) -> bool:
        calls.clear()
        load_encoder(path, cache=cache, **options)
        return bool(calls)

    assert measured()
    assert not measured()
    assert measured(contract=["sample_rate=8000"])
    assert not measured(contract=["sample_rate=8000"])
    assert measured(device="cpu")
    (tmp_path / "model.toml").write_text("sample_rate = 9000")
    assert measured()
    (tmp_path / "model.toml").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert measured()
    (tmp_path / "preprocessor_config.json").unlink()
    assert not measured()

    stat = weights.stat()
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as old and as long as before
    assert measured()
    assert not measured()
    assert load_encoder(path, cache=cache).info.scan.sha256 == load_encoder(path).info.scan.sha256

    path.write_bytes(path.read_bytes())  # the same content, but who knows
    assert measured()

    for file in (cache / "models").iterdir():
        file.write_bytes(file.read_bytes()[:-20])  # a damaged memory is no memory
    assert measured()
    assert not measured()


def test_remembered_weights_that_are_gone(tmp_path: Path, shared_process: None) -> None:
    path, cache = save_external(tmp_path), tmp_path / "cache"
    load_encoder(path, cache=cache)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"keeps weights in 'weights\.bin', which does not exist"):
        load_encoder(path, cache=cache)


def test_a_model_is_remembered_whatever_path_it_is_reached_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    path, cache = save(models.encoder(), tmp_path / "there" / "model.onnx"), tmp_path / "cache"
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    monkeypatch.chdir(path.parent)
    load_encoder(link, cache=cache).close()
    link.unlink()
    with load_encoder("model.onnx", cache=cache) as encoder:
        monkeypatch.chdir(tmp_path)
        assert encoder.info.path == str(path)
        assert encoder.embed([noise(16_000)], RATE)[0].frames.shape == (98, DIM)


def test_a_cache_that_cannot_be_written(tmp_path: Path, shared_process: None) -> None:
    path = save(models.encoder(), tmp_path / "model.onnx")
    with pytest.raises(MachineError, match="cannot be written"):
        load_encoder(path, cache=path / "cache")


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", "", "CPU"])
def test_unknown_device(device: str, tmp_path: Path, shared_process: None) -> None:
    with pytest.raises(UsageError, match="must be auto, cpu, cuda, cuda:N or the name of an ONNX Runtime provider"):
        load(models.encoder(), tmp_path, device=device)


def test_a_provider_that_is_not_there(tmp_path: Path, shared_process: None) -> None:
    with pytest.raises(MachineError, match=r"this ONNX Runtime has no NoneSuchExecutionProvider; it has .*CPUExecution"):
        load(models.encoder(), tmp_path, device="NoneSuchExecutionProvider")


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads(threads: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"threads={threads} must be 1 or more"):
        load(models.encoder(), tmp_path, threads=threads)


@pytest.mark.parametrize("threads", [1, 64])
def test_memory_is_limited_by_the_model_and_the_threads(threads: int, plain: Encoder) -> None:
    with Worker() as worker:
        Encoder(ModelSpec(plain.info, "cpu", threads), worker).embed([noise(16_000)], RATE)
        limit = worker.call(address_space, returns=int, silence_limit=60, observer=ignore)
    assert (20 + threads) << 28 <= limit <= (21 + threads) << 28  # 5 GB and a quarter a thread


def address_space(*, tell: Callable[[Any], None]) -> int:
    """In the worker: its limit in bytes."""
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0]


@pytest.mark.skipif(cuda_may_work(), reason="`auto` may mean a GPU here")
def test_the_model_is_loaded_once(tmp_path: Path) -> None:
    """Measuring and embedding find the same session, also where `auto` means the CPU."""
    with load(models.encoder(), tmp_path, device="auto") as encoder:
        loads = encoder.worker.call(count_loads, encoder.spec, returns=int, silence_limit=60, observer=ignore)
    assert loads == 0


def count_loads(spec: ModelSpec, *, tell: Callable[[Any], None]) -> int:
    """In the worker: how many sessions `open_session` adds."""
    before = resolve._session.cache_info().misses
    resolve.open_session(spec, tell)
    return resolve._session.cache_info().misses - before


def test_the_door_is_public() -> None:
    assert xares_onnx.load_encoder is load_encoder


def test_a_closed_encoder_starts_again(tmp_path: Path) -> None:
    encoder = load(models.encoder(), tmp_path)
    waveform = noise(16_000)
    first = encoder.embed([waveform], RATE)[0].frames
    encoder.close()
    encoder.close()
    np.testing.assert_array_equal(encoder.embed([waveform], RATE)[0].frames, first)
    encoder.close()


def test_a_model_that_was_replaced_after_it_was_measured_is_not_used(tmp_path: Path) -> None:
    """Its embeddings would be stored under the name of another model."""
    path = save(models.encoder(), tmp_path / "m.onnx")
    with load_encoder(path) as loaded:
        loaded.close()  # the next call starts a new process
        save(models.encoder(metadata={"comment": "another"}), path)
        with pytest.raises(ModelError, match="replaced while it was in use; run again"):
            loaded.embed([noise(16_000)], RATE)


def test_a_frame_count_against_the_law_is_refused(plain: Encoder) -> None:
    """As of a model that keeps the law at the lengths that were probed, and nowhere else."""
    contract = msgspec.structs.replace(plain.contract, receptive_field_samples=RECEPTIVE - HOP)
    spec = msgspec.structs.replace(plain.spec, info=msgspec.structs.replace(plain.info, contract=contract))
    with pytest.raises(ContractError, match=r"frames for 16000 samples, but its frame law gives"):
        Encoder(spec, plain.worker).embed([noise(16_000)], RATE)
