"""Every family with a checkpoint at real size, random weights: parity with the publisher's pipeline at 10 s, and speed.

Usage: PYTHONPATH=tests/helpers python bench/families.py [FAMILY...]; takes minutes and 5 GB of memory.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from dasheng_reference import BASE as DASHENG_BASE
from dasheng_reference import BASE_CED, Reference, save
from patch_references import BeatsReference, EatReference, save_beats, save_eat
from random_checkpoints import MUSIC, Plain, edit_json, save_model

from xares_onnx.exporters import export

SECONDS = 10
THREADS = 2
TOLERANCE = 1e-4
BASE = {
    "wav2vec2": transformers.Wav2Vec2Config(mask_time_prob=0.0),
    "hubert": transformers.HubertConfig(mask_time_prob=0.0),
    "wavlm": transformers.WavLMConfig(mask_time_prob=0.0),
    "data2vec": transformers.Data2VecAudioConfig(mask_time_prob=0.0),
    "mert": transformers.HubertConfig(mask_time_prob=0.0),
    "ast": transformers.ASTConfig(),
    "clap": transformers.ClapConfig(),
    "wav2vec2-bert": transformers.Wav2Vec2BertConfig(mask_time_prob=0.0),
    "whisper": transformers.WhisperConfig(
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_layers=1,
        decoder_attention_heads=8,
    ),
}
EXTRACTORS = {
    "whisper": transformers.WhisperFeatureExtractor(),
    "mert": transformers.Wav2Vec2FeatureExtractor(sampling_rate=24_000),
    "ast": transformers.ASTFeatureExtractor(),
    "clap": transformers.ClapFeatureExtractor(truncation="rand_trunc"),
    "wav2vec2-bert": transformers.SeamlessM4TFeatureExtractor(),
}
BEATS_BASE = {
    "embed_dim": 512,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "num_buckets": 320,
    "max_distance": 800,
}
EAT_BASE = {"embed_dim": 768, "num_heads": 12, "depth": 12, "mlp_ratio": 4.0, "img_size": [1024, 128]}
OWN = ["beats", "ced", "dasheng", "eat"]  # in their checkpoints' own layout


def seconds(run: Callable[[], object], times: int = 5) -> float:
    """The fastest of several, as other work may share the machine."""
    run()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def make(family: str, folder: Path) -> Callable[[Path], torch.nn.Module]:
    """A random checkpoint, and what runs it as its publisher does."""
    if family in ("dasheng", "ced"):
        save(folder, DASHENG_BASE if family == "dasheng" else BASE_CED)
        return Reference
    if family == "beats":
        save_beats(folder, **BEATS_BASE)
        return BeatsReference
    if family == "eat":
        save_eat(folder, **EAT_BASE)
        return EatReference
    save_model(BASE[family], folder)
    EXTRACTORS.get(family, transformers.Wav2Vec2FeatureExtractor()).save_pretrained(folder)
    if family == "mert":
        edit_json(folder / "config.json", **MUSIC)
    return Plain


def main(families: list[str]) -> None:
    torch.set_num_threads(THREADS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    worst = 0.0
    for family in families or [*BASE, *OWN]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, family)
            publisher = make(family, folder)
            start = time.perf_counter()
            report = export(family, str(folder), Path(name, f"{family}.onnx"))
            took = time.perf_counter() - start
            session = onnxruntime.InferenceSession(report.path, options, providers=["CPUExecutionProvider"])
            plain = publisher(folder).eval()
            rate = int(session.get_modelmeta().custom_metadata_map["sample_rate"])
            audio = 0.1 * torch.randn(1, SECONDS * rate, generator=torch.Generator().manual_seed(0))
            feeds = {"audio": audio.numpy()}
            with torch.inference_mode():
                expected = plain(audio).numpy()
                error = float(np.abs(session.run(None, feeds)[0] - expected).max() / np.abs(expected).max())
                ratio = seconds(lambda: session.run(None, feeds)) / seconds(lambda: plain(audio))  # noqa: B023
        worst = max(worst, error)
        print(
            f"{family:13} {report.parameters / 1e6:5.1f} M, exported and checked in {took:.0f} s; at {SECONDS} s "
            f"{error:.1e} of the largest value from the publisher's pipeline, {ratio:.2f}x its time",
            flush=True,
        )
    sys.exit(f"more than {TOLERANCE} apart" if worst > TOLERANCE else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
