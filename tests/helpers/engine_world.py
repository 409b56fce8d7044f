"""Two tasks with a shard in common, an encoder, and what runs of them leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bank_model import write_model
from shard_makers import RATE, encoded, noise, sine, task_toml, write_shard

from xares_onnx.evaluation.evaluation import Evaluation, evaluate

TASKS = {"first": {"train": 3, "valid": 1, "test": 2}, "second": {"train": 2, "valid": 1, "test": 1}}
SHARDS = sum(count for parts in TASKS.values() for count in parts.values()) - 1  # that differ
CLIPS = 9


class EngineWorld:
    """A folder with a model, two tasks and their data."""

    def __init__(self, folder: Path, *, slow: bool = False) -> None:
        self.folder, self.data = folder, folder / "data"
        self.model = write_model(folder / "bank.onnx", slow=slow)
        self.tasks = []
        hum, number = noise(2), 0
        for name, parts in TASKS.items():
            self.tasks.append(folder / f"{name}.toml")
            self.tasks[-1].write_text(task_toml(name))
            for part, count in parts.items():
                for i in range(count):
                    seed = 0 if (part, i) == ("train", 0) else (number := number + 1)  # the first shard of both is the same
                    clips = {}
                    for n in range(CLIPS + seed % 3):
                        start = (n * 37 + seed * 101) % RATE
                        samples = hum[start : start + RATE // 2] / 2 + sine(300 + 60 * (n % 3), 0.5, amplitude=0.2)
                        clips[f"{n:02}"] = (encoded(samples), {"label": "abc"[n % 3]})
                    write_shard(self.data / name / f"{part}{i}.tar", clips)

    def run(self, room: Path, **options: Any) -> Evaluation:
        """Evaluate both tasks into a folder of this run's own, on one thread per worker."""
        arguments: dict[str, Any] = {
            "data": self.data,
            "cache": room / "cache",
            "output": room / "out" / "r.json",
            "seeds": 1,
            "device": "cpu",
            "threads": options.get("workers", 1),
            **options,
        }
        return evaluate(self.model, [str(task) for task in self.tasks], **arguments)


def left(room: Path) -> dict[str, Any]:
    """What a run leaves, without what may differ between two: the result, predictions and store, byte by byte."""
    result = json.loads((room / "out" / "r.json").read_bytes())
    for field in ("created", "environment"):
        del result[field]
    for task in result["tasks"]:
        del task["seconds"], task["rtf"]
    assert [task["status"] for task in result["tasks"]] == ["ok"] * 4, result["tasks"]
    files = [path for path in room.rglob("*") if path.suffix in (".npz", ".safetensors", ".jsonl")]
    assert len(files) == 4 + 2 * SHARDS, "predictions of two methods per task, and two files per shard"
    return {"result": json.dumps(result), **{str(path.relative_to(room)): path.read_bytes() for path in files}}
