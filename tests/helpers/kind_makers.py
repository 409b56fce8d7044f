"""A small task of every kind, all about the four tones of `corpus`, in X-ARES's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from corpus import CLASSES, DIM, PITCHES, Clips, wav
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from shard_makers import RATE, write_shard

SIZES = {"train": 48, "valid": 16, "test": 24}
_LETTERS = dict(zip("abcd", CLASSES, strict=True)) | {" ": "bell"}
_BELL = 1750.0  # Hz
_NAMES = list(CLASSES)
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "tags": {
        "target": {"key": "tags", "separator": ";", "classes": _NAMES},
        "score": {"metric": "mean_average_precision"},
        "head": {"epochs": 30, "learning_rate": 0.02},
    },
    "events": {
        "target": {"start": "onset", "end": "offset", "label": "label", "classes": _NAMES},
        "score": {"metric": "segment_f1_macro", "segment_seconds": 0.25},
        "head": {"epochs": 20, "batch_size": 4, "learning_rate": 0.02},
    },
    "captions": {
        "target": {},
        "score": {"metric": "recall_at_1"},
        "head": {"kind": "retrieval", "epochs": 8},
    },
    "transcript": {
        "target": {"key": "trans"},
        "score": {"metric": "one_minus_wer"},
        "head": {"kind": "ctc", "epochs": 30, "batch_size": 4, "learning_rate": 0.03},
    },
    "number": {
        "target": {"key": "score", "low": 0, "high": 10},
        "score": {"metric": "mse"},
        "head": {"epochs": 200, "learning_rate": 0.05},
    },
}
KINDS = tuple(TABLES)
Signal = NDArray[np.float64]


def write_bank(path: Path, *, hop: int = 160, gain: float = 1.0) -> Path:
    """Levels of twelve pitches in windows of 25 ms, whatever their phase: an encoder that hears the tones."""
    times, pitches = np.arange(400) / RATE, np.geomspace(200, 1800, DIM)
    waves = np.exp(2j * np.pi * pitches[:, None] * times) * np.hanning(400) / 100
    weights = {
        "filters": (gain * np.concatenate([waves.real, waves.imag])[:, None]).astype(np.float32),
        "pairs": np.tile(np.eye(DIM, dtype=np.float32), 2)[:, :, None],
        "channel": np.array([1]),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["audio", "channel"], ["signal"]),
        helper.make_node("Conv", ["signal", "filters"], ["waves"], strides=[hop]),
        helper.make_node("Abs", ["waves"], ["parts"]),
        helper.make_node("Conv", ["parts", "pairs"], ["levels"]),
        helper.make_node("Transpose", ["levels"], ["embeddings"], perm=[0, 2, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "bank",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "samples"])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", "frames", DIM])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def write_kind(
    folder: Path, kind: str, name: str | None = None, *, weight: int | None = None, epochs: int | None = None, **clips: Clips
) -> Path:
    """Shards of a task `name` in `folder/data` and its task file; `clips` replaces whole splits."""
    name = name or kind
    for number, (split, count) in enumerate(SIZES.items()):
        made = clips[split] if split in clips else clips_of(kind, split, count, seed=number)
        write_shard(folder / "data" / name / f"{split}-0.tar", made)
    heading = f'name = "{name}"\ntitle = "{name}"\ndomain = "music"\n' + (f"weight = {weight}\n" if weight else "")
    data = '[data]\nsplits = { train = "train-*.tar", valid = "valid-*.tar", test = "test-*.tar" }\n'
    path = folder / f"{name}.toml"
    tables = {**TABLES[kind], "target": {"kind": kind, **TABLES[kind]["target"]}}
    if epochs is not None:
        tables["head"] = {**tables["head"], "epochs": epochs}
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    ]
    path.write_text(heading + data + "".join(lines))
    return path


def clips_of(kind: str, prefix: str, count: int, seed: int) -> Clips:
    rng = np.random.default_rng([seed, *kind.encode()])
    clips: Clips = {}
    for i in range(count):
        signal, label = _MAKERS[kind](rng)
        noisy = signal + 0.05 * rng.standard_normal(len(signal))
        clips[f"{prefix}-{i:03}"] = (wav((0.2 * noisy).astype(np.float32)), label)
    return clips


def burst(letter: str, seconds: float, rng: np.random.Generator) -> Signal:
    """The tone of a letter a to d, or of a space."""
    return _sine(_LETTERS[letter], seconds, rng)


def _sine(name: str, seconds: float, rng: np.random.Generator) -> Signal:
    times = np.arange(round(seconds * RATE)) / RATE
    return np.asarray(np.sin(2 * np.pi * PITCHES.get(name, _BELL) * times + rng.uniform(0, 6)))


def _tags(rng: np.random.Generator) -> tuple[Signal, Any]:
    chosen = sorted(rng.choice(len(CLASSES), rng.integers(1, 4), replace=False))
    return sum((_sine(CLASSES[c], 0.5, rng) for c in chosen), np.zeros(RATE // 2)), {
        "tags": ";".join(CLASSES[c] for c in chosen)
    }


def _events(rng: np.random.Generator) -> tuple[Signal, Any]:
    signal, events = np.zeros(2 * RATE), []
    for _ in range(rng.integers(1, 4)):
        name, onset, length = CLASSES[rng.integers(4)], rng.uniform(0, 1.2), rng.uniform(0.2, 0.7)
        start = round(onset * RATE)
        signal[start : start + round(length * RATE)] += _sine(name, length, rng)
        events.append({"onset": onset, "offset": onset + length, "label": name})
    return signal, events


def _captions(rng: np.random.Generator) -> tuple[Signal, Any]:
    first, second = rng.choice(len(CLASSES), 2, replace=False)
    a, b = CLASSES[first], CLASSES[second]
    signal = 2 * _sine(a, 0.5, rng) + 0.7 * _sine(b, 0.5, rng)
    return signal, {"one": f"a loud {a} tone over a soft {b} tone", "two": f"soft {b} under loud {a}"}


def _transcript(rng: np.random.Generator) -> tuple[Signal, Any]:
    words = ["".join(rng.permutation(list("abcd"))[: rng.integers(2, 4)]) for _ in range(2)]
    text = " ".join(words)
    # Short bursts, the space one of its own: a head of single frames cannot tell one pause from another.
    gap = np.zeros(RATE // 25)
    parts = [part for letter in text for part in (burst(letter, rng.uniform(0.03, 0.05), rng), gap)]
    return np.concatenate([gap, *parts]), {"trans": text.upper()}


def _number(rng: np.random.Generator) -> tuple[Signal, Any]:
    share = rng.uniform()
    signal = share * _sine("low", 0.5, rng) + (1 - share) * _sine("top", 0.5, rng)
    return signal, {"score": round(10 * share, 2)}


_MAKERS = {"tags": _tags, "events": _events, "captions": _captions, "transcript": _transcript, "number": _number}
