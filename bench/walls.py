"""What the walls around a model's process cost: the time until a process has answered its first call, with and without.

python bench/walls.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from xares_onnx.encoder import worker
from xares_onnx.encoder.resolve import _runtime_version
from xares_onnx.encoder.walls import Walls
from xares_onnx.progress import ignore


def answer(*, tell: object) -> str:
    return _runtime_version()


def seconds(start: str) -> float:
    worker._START = start
    began = time.perf_counter()
    with worker.Worker(Walls(model="model.onnx", reads=("data",), writes=("cache",))) as process:
        process.call(answer, returns=str, silence_limit=None, observer=ignore)
    return time.perf_counter() - began


def main(rounds: int) -> None:
    sys.modules["walls"] = sys.modules["__main__"]  # under this name the child imports this file
    answer.__module__ = "walls"
    sys.path.insert(0, str(Path(__file__).parent))
    within = worker._START
    without = within.replace("raise_walls(Walls(**json.loads(sys.argv[1])))", "()")
    assert without != within
    times = [(seconds(without), seconds(within)) for _ in range(rounds)]
    costs = [with_walls - bare for bare, with_walls in times]
    bare = statistics.median(bare for bare, _ in times)
    print(f"a process answers after {bare:.3f} s without walls (median of {rounds})")
    print(f"walls add {1e3 * statistics.median(costs):.1f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
