"""What a GPU does: placement, agreement with the CPU, scores, throughput against bare ONNX Runtime, heads.

    python bench/gpu.py [--sections provider,check,suite,throughput,heads] [--device cuda] [--output FILE] [--folder FOLDER]
    python bench/gpu.py --dry    # all of it on the CPU, with tiny models

Needs no network. Every section runs in a process of its own, so that one that fails, hangs or crashes costs no other; what
it measured before stands. Random weights of real size stand for published ones. Models that `--folder` holds are not made
again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import wave
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "bench")]

import numpy as np  # noqa: E402

STARTED = float(os.environ.get("GPU_BENCH_STARTED", time.time()))
MODELS = ("logmel", "resemblyzer", "wav2vec2", "dasheng")
LIMITS = {"models": 150, "provider": 90, "check": 150, "suite": 200, "throughput": 240, "heads": 120}  # seconds
RATE = 16_000
STAGES = (("models",), ("provider",), ("check", "suite"), ("throughput",), ("heads",))  # no times matter of those together
SHARDS = 4  # of each kind of audio, so that 1, 2 and 4 workers embed the same


@dataclass
class Bench:
    """What a section is given: where, how, and where its rows go."""

    folder: Path
    rows: Path
    device: str
    dry: bool

    def row(self, what: str, figure: str, **values: Any) -> None:
        say(f"  {what}: {figure}")
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "figure": figure, **values}) + "\n")

    def models(self, *names: str) -> dict[str, Path]:
        """Those of the models that there are."""
        paths = {name: self.folder / f"{name}.onnx" for name in names or MODELS}
        return {name: path for name, path in paths.items() if path.exists()}

    def guarded(self, what: str, act: Callable[[], None]) -> None:
        """A part of a section; what is left of the section goes on where it fails."""
        try:
            act()
        except Exception:
            traceback.print_exc()
            self.row(what, f"FAILED: {traceback.format_exc().strip().splitlines()[-1][:300]}", failed=True)


def say(text: str) -> None:
    print(f"[{time.time() - STARTED:6.1f} s] {text}", flush=True)


# ---------------------------------------------------------------- models


def make_models(bench: Bench) -> None:
    """Each in a process of its own: a trace and its check keep one core busy for ten seconds."""
    names = ("logmel", "wav2vec2") if bench.dry else MODELS
    missing = [name for name in names if name not in bench.models()]
    begun = time.time()
    code = "import sys, gpu; gpu.make_model(sys.argv[1], gpu.Path(sys.argv[2]), sys.argv[3] == 'True')"
    made = {
        name: subprocess.Popen([sys.executable, "-c", code, name, str(bench.folder), str(bench.dry)]) for name in missing
    }
    for name, process in made.items():
        if process.wait():
            bench.row(f"export of {name}", f"FAILED with exit code {process.returncode}", failed=True)
    bench.row("models", f"{', '.join(bench.models())} in {time.time() - begun:.0f} s")


def make_model(name: str, folder: Path, dry: bool) -> None:
    """Export one of `MODELS`, with random weights where no published ones can be had offline."""
    from xares_onnx.exporters import export

    checkpoint = folder / f"{name}-checkpoint"
    if name == "dasheng":
        from dasheng_reference import BASE, SMALL, save

        save(checkpoint, SMALL if dry else BASE)
    elif name == "wav2vec2":
        import transformers
        from random_checkpoints import save_model, save_speech

        if dry:
            save_speech("wav2vec2", checkpoint)
        else:
            save_model(transformers.Wav2Vec2Config(mask_time_prob=0.0), checkpoint)
            transformers.Wav2Vec2FeatureExtractor().save_pretrained(checkpoint)
    export(name, str(checkpoint) if checkpoint.exists() else None, folder / f"{name}.onnx")


# ---------------------------------------------------------------- provider and placement


def provider(bench: Bench) -> None:
    import onnxruntime

    from xares_onnx.encoder.cuda import load_libraries
    from xares_onnx.encoder.encoder import load_encoder
    from xares_onnx.encoder.session import CPU, Session

    names = ("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "onnx", "numpy")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    bench.row("versions", ", ".join(f"{name} {version}" for name, version in versions.items()), versions=versions)
    bench.row("onnxruntime", f"{onnxruntime.__version__} in {Path(onnxruntime.__file__).parent}")
    bench.row("GPU", gpu_name())
    missing = load_libraries(onnxruntime)
    bench.row("libraries", f"missing: {', '.join(missing)}" if missing else "all of CUDA and cuDNN load", missing=missing)

    def load(name: str, path: Path) -> None:
        begun = time.time()
        with load_encoder(path, device=bench.device, cache=bench.folder / "cache") as encoder:
            info, seconds = encoder.info, time.time() - begun
        bench.row(
            f"{name}, loaded and measured",
            f"{seconds:.1f} s on {info.provider}; a shared call changes {info.batch_difference} of the largest",
            seconds=seconds,
            provider=info.provider,
            batch_difference=info.batch_difference,
            notes=info.notes,
        )
        placed = Session(path, bench.device, record_placement=True).placement
        if placed is None:
            bench.row(f"{name}, placement", "not told by this ONNX Runtime")
        else:
            fallen = Counter(operator for where, operator in placed if where == CPU)
            listed = ", ".join(f"{count} {operator}" for operator, count in fallen.most_common())
            bench.row(
                f"{name}, placement",
                f"{fallen.total()} of {len(placed)} nodes on the CPU: {listed or 'none'}",
                nodes=len(placed),
                fallen=dict(fallen),
            )

    with ThreadPoolExecutor() as pool:
        for name, path in bench.models().items():
            pool.submit(bench.guarded, name, lambda name=name, path=path: load(name, path))


def gpu_name() -> str:
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip() or "none"
    except (OSError, subprocess.SubprocessError):
        return "none"


# ---------------------------------------------------------------- check


def check(bench: Bench) -> None:
    from xares_onnx.checking import check as check_model

    def one(name: str, path: Path) -> None:
        report = check_model(path, device=bench.device, threads=4, cache=bench.folder / "cache")
        counts = Counter(finding.status for finding in report.findings)
        told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        bench.row(
            f"{name}, check on {report.provider}",
            f"exit {report.exit_code}: {told}, {report.seconds:.0f} s",
            unusable=report.unusable,
        )
        for finding in report.findings:
            if finding.status in ("fail", "warn") or finding.property in ("devices", "batch-invariance", "determinism"):
                bench.row(f"{name}, {finding.property}", f"{finding.status}: {finding.says}", measured=finding.measured)

    with ThreadPoolExecutor() as pool:  # the checks time nothing that matters here
        for name, path in bench.models().items():
            pool.submit(bench.guarded, name, lambda name=name, path=path: one(name, path))


# ---------------------------------------------------------------- scores


def suite(bench: Bench) -> None:
    from xares_onnx.data import synthetic
    from xares_onnx.evaluation.comparison import compare

    cache = bench.folder / "cache"
    swept = ("synthetic_captions", "synthetic_transcript")  # minutes of training on the CPU, whatever embedded them
    tasks = ["synthetic_vowel"] if bench.dry else [task for task in synthetic.TASKS if task not in swept]
    code = (
        "import pathlib, sys; from xares_onnx.data import synthetic; synthetic.build(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    built = [
        subprocess.Popen([sys.executable, "-c", code, task, str(cache / f"synthetic-{synthetic.VERSION}" / task)])
        for task in tasks
    ]
    for process in built:
        process.wait()
    say("  the suite is built")
    runs = []
    models = bench.models("logmel") if bench.dry else bench.models("logmel", "resemblyzer")
    for name, path in models.items():
        for number, device in enumerate(("cpu", bench.device)):
            output = bench.folder / f"{name}-{number}.json"
            command = [sys.executable, "-m", "xares_onnx", "evaluate", str(path), "--tasks", ",".join(tasks)]
            command += ["--device", device, "--seeds", "1", "--threads", "4", "--quiet"]
            command += ["--cache", str(cache), "--output", str(output)]
            runs.append((name, device, subprocess.Popen(command), time.time()))
    for name, device, process, begun in runs:
        code_of_exit = process.wait()
        bench.row(f"{name} on {device}, suite", f"exit {code_of_exit} within {time.time() - begun:.0f} s")

    def paired(name: str) -> None:
        found = compare(bench.folder / f"{name}-0.json", bench.folder / f"{name}-1.json")
        differences = [of.difference for of in found.tasks]
        if bench.dry and any(differences):
            raise AssertionError(f"{name}: the CPU twice gives other scores")
        sure = [f"{of.task}:{of.method}" for of in found.tasks if of.ci95 and (of.ci95[0] > 0 or of.ci95[1] < 0)]
        bench.row(
            f"{name}, {bench.device} less CPU over {len(differences)} scores",
            f"mean {np.mean(differences):+.2e}, largest {max(np.abs(differences), default=0):.2e}; "
            f"95 % interval without 0: {', '.join(sure) or 'none'}",
            tasks=[{"task": of.task, "method": of.method, "cpu": of.a, "gpu": of.b, "ci95": of.ci95} for of in found.tasks],
        )

    for name in models:
        bench.guarded(name, lambda name=name: paired(name))


# ---------------------------------------------------------------- throughput


def lengths_of(kind: str, hours: float) -> list[int]:
    """Samples of each clip: 10 s, or as long as utterances are, whose lengths hardly ever agree."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < hours * 3600 * RATE:
        seconds = 10.0 if kind == "10 s" else float(np.clip(rng.lognormal(np.log(6.0), 0.6), 1.0, 20.0))
        lengths.append(int(seconds * 1000) * RATE // 1000)
    return lengths


def write_shards(folder: Path, lengths: list[int]) -> list[Path]:
    """Noise as 16-bit wav: no shard costs more to decode or to resample than it must."""
    import io
    import tarfile

    rng = np.random.default_rng(1)
    pool = (rng.standard_normal(40 * RATE) * 3000).astype("<i2")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.tar" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i, length in enumerate(lengths[number::SHARDS]):
                content = io.BytesIO()
                with wave.open(content, "wb") as clip:
                    clip.setnchannels(1)
                    clip.setsampwidth(2)
                    clip.setframerate(RATE)
                    start = int(rng.integers(0, len(pool) - length))
                    clip.writeframes(pool[start : start + length].tobytes())
                for name, data in ((f"{i:05}.wav", content.getvalue()), (f"{i:05}.json", b'{"label": 0}')):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def throughput(bench: Bench) -> None:
    kinds = {kind: lengths_of(kind, 0.01 if bench.dry else 1.0) for kind in ("10 s", "speech")}
    shards = {kind: write_shards(bench.folder / f"audio-{kind[:2]}", lengths) for kind, lengths in kinds.items()}
    say(f"  audio: {', '.join(f'{len(lengths)} clips of {kind}' for kind, lengths in kinds.items())}")
    for name, path in bench.models("wav2vec2", "dasheng").items():
        bench.guarded(name, lambda name=name, path=path: model_throughput(bench, name, path, kinds, shards))


def model_throughput(
    bench: Bench, name: str, path: Path, kinds: dict[str, list[int]], shards: dict[str, list[Path]]
) -> None:
    """Hours of audio in an hour: of bare loops, of the runner on decoded audio, and from shards to the store."""
    from xares_onnx.encoder.encoder import load_encoder
    from xares_onnx.encoder.walls import Walls

    def told(kind: str, what: str, seconds: float) -> None:
        rate = sum(kinds[kind]) / RATE / seconds
        best = bare.setdefault(kind, rate)
        bench.row(
            f"{name}, {kind}, {what}",
            f"{rate:.0f}x real time, {rate / best:.2f} of the bare loop",
            rate=rate,
            ratio=rate / best,
        )

    bare: dict[str, float] = {}
    counts = (1, 2) if bench.dry else (1, 2, 4)
    options: dict[str, Any] = {"device": bench.device, "threads": 4, "cache": bench.folder / "cache"}
    encoders = [load_encoder(path, **options) for _ in range(counts[-1])]
    for encoder in encoders:  # which were opened for waveforms alone
        encoder.worker.close()
        encoder.worker.walls = Walls(gpu=True)
    try:
        for kind, lengths in kinds.items():
            told(kind, "bare loop with IOBinding", bare_seconds(path, bench.device, encoders[0], lengths, binding=True))
            told(kind, "bare loop without", bare_seconds(path, bench.device, encoders[0], lengths, binding=False))
            told(kind, "bare loop, a chunk a call", bare_seconds(path, bench.device, encoders[0], lengths, alone=True))
            for callers in (1, 2) if bench.dry else (1, 2, 4):
                seconds = runner_seconds(path, bench.device, encoders[0], lengths, callers)
                told(kind, f"runner on decoded audio, {callers} calling", seconds)
        with ThreadPoolExecutor() as pool:  # each process loads CUDA at its first call
            list(pool.map(lambda encoder: encoder.embed([np.zeros(10 * RATE)], RATE), encoders))
        for kind in kinds:
            for count in counts:
                seconds = embed_seconds(shards[kind], encoders[:count])
                told(kind, f"shards to store, {count} worker{'s' if count > 1 else ''}", seconds)
    finally:
        for encoder in encoders:
            encoder.close()


def bare_seconds(
    path: Path, device: str, encoder: Any, lengths: list[int], *, binding: bool = True, alone: bool = False
) -> float:
    """All the audio on ONNX Runtime alone: one caller, decoded and cut before, embeddings back in memory.

    Chunks share calls as ours do in one window of everything, unless each is `alone`.
    """
    import onnxruntime

    from xares_onnx.encoder.batching import Batching
    from xares_onnx.encoder.chunking import plan_chunks
    from xares_onnx.encoder.cuda import load_libraries
    from xares_onnx.encoder.session import CUDA, CUDA_OPTIONS, provider_of

    load_libraries(onnxruntime)
    name, chosen = provider_of(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    provider = (name, {**CUDA_OPTIONS, **chosen} if name == CUDA else chosen)
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    contract, batching = encoder.contract, Batching() if alone else encoder.info.batching
    chunks = [chunk.length for length in lengths for chunk in plan_chunks(length, contract)]
    noise = (np.random.default_rng(2).standard_normal((batching.items, contract.chunk_samples)) * 0.1).astype(np.float32)
    batches = [noise[: len(group), : chunks[group[0]]].copy() for group in batching.groups(chunks)]

    def call(batch: np.ndarray) -> None:
        if not binding:
            session.run([contract.output], {contract.input: batch})
            return
        bound = session.io_binding()
        bound.bind_cpu_input(contract.input, batch)
        bound.bind_output(contract.output, "cuda" if name == CUDA else "cpu", int(chosen.get("device_id", 0)))
        session.run_with_iobinding(bound)
        bound.copy_outputs_to_cpu()

    call(batches[0])
    begun = time.perf_counter()
    for batch in batches:
        call(batch)
    return time.perf_counter() - begun


def runner_seconds(path: Path, device: str, encoder: Any, lengths: list[int], callers: int) -> float:
    """The runner alone in this process: windows, batches, order, frames cut; decoded audio."""
    from xares_onnx.encoder.runner import ChunkRunner, Job
    from xares_onnx.encoder.session import Session

    runner = ChunkRunner(Session(path, device), encoder.spec, callers=callers)
    noise = (np.random.default_rng(2).standard_normal(max(lengths)) * 0.1).astype(np.float32)
    list(runner.run([Job(-1, noise[:RATE])]))
    begun = time.perf_counter()
    for _ in runner.run(Job(number, noise[:length]) for number, length in enumerate(lengths)):
        pass
    return time.perf_counter() - begun


def embed_seconds(shards: list[Path], encoders: list[Any]) -> float:
    """All shards, decoded, embedded, pooled and stored, each worker with its share of them."""
    from xares_onnx.data.audio import CropSettings
    from xares_onnx.embedding.embed import EmbedSpec, ShardReport, embed_shard
    from xares_onnx.files import stamp

    def embed(number: int) -> None:
        for shard in shards[number :: len(encoders)]:
            spec = EmbedSpec(
                model=encoders[number].spec,
                task="bench",
                shard=shard,
                shard_digest=shard.name,
                shard_stamp=stamp(shard),
                crops=CropSettings(None),
                frames=False,
                selected=None,
                store=Path(store),
            )
            encoders[number].call(embed_shard, spec, returns=ShardReport)

    with tempfile.TemporaryDirectory() as store, ThreadPoolExecutor() as pool:
        begun = time.perf_counter()
        list(pool.map(embed, range(len(encoders))))
        return time.perf_counter() - begun


# ---------------------------------------------------------------- heads


def heads(bench: Bench) -> None:
    from gpu_heads import converged, knn, linear_head, same_choice

    clips, dim, classes = (2000, 32, 10) if bench.dry else (138_361, 768, 1_251)
    device = "cpu" if bench.device == "cpu" else "cuda"
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((classes, dim), dtype=np.float32) * np.float32(0.35)
    labels = rng.integers(0, classes, clips)
    x = centres[labels] + rng.standard_normal((clips, dim), dtype=np.float32)
    test = np.arange(clips) % 17 == 0  # 8,139 of them, as many as VoxCeleb1's test
    bench.row("data", f"{clips} x {dim}, {classes} classes, of which {int(test.sum())} to test")
    known = (x, labels, test, classes)
    for what, act in (
        (f"kNN on {device}", lambda: knn(x, labels, test, device)),
        (f"converged head on {device}", lambda: converged(*known, device)),
        (f"converged head of 100 classes on {device} and the CPU", lambda: same_choice(*known, device)),
        ("kNN of 1,000 test clips on the CPU", lambda: knn(x, labels, test, None, queries=1000)),
        ("linear head, 1 fold x 1 seed x 1 epoch on the CPU", lambda: linear_head(*known)),
    ):
        bench.guarded(what, lambda what=what, act=act: bench.row(what, act()))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "models": make_models,
    "provider": provider,
    "check": check,
    "suite": suite,
    "throughput": throughput,
    "heads": heads,
}


def run_section(name: str, bench: Bench) -> dict[str, Any]:
    """One section in a process of its own, with what it measured however it ended."""
    bench.rows.unlink(missing_ok=True)
    begun = time.time()
    command = [sys.executable, __file__, "--section", name, "--folder", str(bench.folder), "--device", bench.device]
    limit = LIMITS[name] * (4 if bench.dry else 1)  # a busy machine may run it dry
    process = subprocess.Popen(
        command + ["--dry"] * bench.dry,
        env={**os.environ, "GPU_BENCH_STARTED": str(STARTED), **({"OMP_NUM_THREADS": "1"} if bench.dry else {})},
        start_new_session=True,
    )
    try:
        ended = f"exit code {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its workers too: they would go on using the GPU
        process.wait()
        ended = f"stopped after {limit} s"
    lines = bench.rows.read_text(encoding="utf-8").splitlines() if bench.rows.exists() else []
    rows = [json.loads(line) for line in lines]
    whole = ended == "exit code 0" and not any(row.get("failed") for row in rows)
    return {"ok": whole, "ended": ended, "seconds": round(time.time() - begun, 1), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}; models are made first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny models and little audio")
    parser.add_argument("--folder", type=Path, help="where models are kept from run to run")
    parser.add_argument("--output", type=Path, help="JSON of all that was measured")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = "cpu" if given.dry else given.device
    if given.section:
        SECTIONS[given.section](Bench(given.folder, given.folder / f"{given.section}.rows", device, given.dry))
        return
    chosen = {"models", *given.sections.split(",")}
    if unknown := chosen - SECTIONS.keys():
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    measured: dict[str, Any] = {"device": device, "gpu": gpu_name(), "dry": given.dry, "sections": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for names in filter(None, ([name for name in stage if name in chosen] for stage in STAGES)):
            say(f"{' and '.join(names)}: within {max(LIMITS[name] for name in names)} s")
            benches = [Bench(folder, folder / f"{name}.rows", device, given.dry) for name in names]
            with ThreadPoolExecutor() as pool:
                measured["sections"] |= dict(zip(names, pool.map(run_section, names, benches), strict=True))
            if given.output:
                given.output.parent.mkdir(parents=True, exist_ok=True)
                given.output.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    print("\n| section | what | figure |\n|---|---|---|")
    for name, section in measured["sections"].items():
        for row in section["rows"]:
            print(f"| {name} | {row['what']} | {row['figure']} |")
        print(f"| {name} | **{'whole' if section['ok'] else 'NOT WHOLE'}** | {section['ended']}, {section['seconds']} s |")
    sys.exit(not all(section["ok"] for section in measured["sections"].values()))


if __name__ == "__main__":
    main()
