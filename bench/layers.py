"""All layers of a model with twelve of them against its output alone: one clip task, head and kNN, from tar to score.

    PYTHONPATH=tests/helpers python bench/layers.py [--clips N]

The model is wav2vec 2.0 of base size with random weights; takes some minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import transformers
from corpus import tones, write_task
from random_checkpoints import save_model
from shard_makers import write_shard

from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.exporters import export


def write_clips(data: Path, clips: int) -> None:
    for number, (split, share) in enumerate({"train": 0.6, "valid": 0.15, "test": 0.25}.items()):
        made = tones(round(share * clips), number, seconds=4.0, noise=3.0, prefix=split)
        write_shard(data / "tones" / f"{split}-0.tar", made)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=240)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(transformers.Wav2Vec2Config(mask_time_prob=0.0), folder / "checkpoint")
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder / "checkpoint")
        model = export("wav2vec2", str(folder / "checkpoint"), folder / "model.onnx").path
        write_clips(folder / "data", given.clips)
        task = write_task(folder, "tones")
        seconds = {}
        for taps in ((), ("all-layers",)):
            started = time.perf_counter()
            cache = folder / f"cache-{len(taps)}"
            done = evaluate(model, [str(task)], data=folder / "data", cache=cache, taps=taps, device="cpu")
            seconds[taps] = time.perf_counter() - started
        print(
            f"all layers of a model of twelve, {len(done.result.encoder.taps)} taps, {given.clips} clips of 4 s: "
            f"{seconds[('all-layers',)] / seconds[()]:.2f}x of its output alone ({seconds[('all-layers',)]:.0f} s against "
            f"{seconds[()]:.0f} s)"
        )


if __name__ == "__main__":
    main()
