"""Known families at their real size, with random weights: export, parity with PyTorch, and speed on 10 s of audio.

    python bench/families.py [FAMILY…]

Two threads for both. PyTorch runs the model as `transformers` makes it, with its own attention.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

from xares_onnx.exporters import export

SECONDS, RATE, THREADS, RUNS = 10, 16_000, 2, 5
SPEECH = {
    "wav2vec2": transformers.Wav2Vec2Config,
    "hubert": transformers.HubertConfig,
    "wavlm": transformers.WavLMConfig,
    "data2vec": transformers.Data2VecAudioConfig,
}


def checkpoint(family: str, folder: Path) -> Any:
    """A folder as `transformers` saves one, at the size of the family's base model; and the model."""
    torch.manual_seed(0)
    if family == "whisper":
        config = transformers.WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048)
        model = transformers.WhisperModel(config)
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
    else:
        model = transformers.AutoModel.from_config(SPEECH[family]())
        transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    model.save_pretrained(folder)
    return model.eval()


def fastest(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    families = parser.parse_args().families or [*SPEECH, "whisper"]
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    audio = 0.1 * np.random.default_rng(0).standard_normal((1, SECONDS * RATE)).astype(np.float32)
    for family in families:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            model = checkpoint(family, Path(folder))
            report = export(family, folder, Path(folder) / f"{family}.onnx")
            session = onnxruntime.InferenceSession(report.path, options, providers=["CPUExecutionProvider"])
            onnx_seconds = fastest(lambda session=session: session.run(None, {"audio": audio}))
            if family == "whisper":
                inputs = transformers.WhisperFeatureExtractor()(audio[0], sampling_rate=RATE, return_tensors="pt")
                torch_seconds = fastest(lambda model=model, inputs=inputs: model.encoder(inputs.input_features))
            else:
                inputs = torch.from_numpy((audio - audio.mean()) / audio.std())
                torch_seconds = fastest(lambda model=model, inputs=inputs: model(inputs))
            print(
                f"{family}: {report.parameters / 1e6:.0f} M parameters, at most {report.max_abs_error:.1e} from PyTorch; "
                f"{SECONDS} s of audio in {onnx_seconds:.2f} s, {onnx_seconds / torch_seconds:.2f}x of PyTorch's time",
                flush=True,
            )


if __name__ == "__main__":
    main()
