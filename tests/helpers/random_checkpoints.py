"""Checkpoints of two random layers in the layout of `transformers`, and the plain way to run one: extractor, then model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

transformers.utils.logging.disable_progress_bar()

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
LAYER_NORM = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
SPEECH: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "wav2vec2": (transformers.Wav2Vec2Config, LAYER_NORM),
    "hubert": (transformers.HubertConfig, {}),
    "wavlm": (transformers.WavLMConfig, {"num_buckets": 32, "max_bucket_distance": 60}),
    "data2vec": (transformers.Data2VecAudioConfig, {"conv_pos_kernel_size": 5, "conv_bias": True}),
}


def save_speech(family: str, folder: Path, **preprocessor: Any) -> Path:
    kind, changes = SPEECH[family]
    save_model(kind(**(TINY | changes)), folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(**({"do_normalize": True} | preprocessor))
    extractor.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\ntags:\n- speech\nlicense: mit\n---\n# {family}\n")
    return folder


def save_whisper(folder: Path, *, seconds: int = 3, bands: int = 80, **preprocessor: Any) -> Path:
    """Whisper with a window of `seconds`: the real 30 take seconds to run."""
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        vocab_size=100,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        num_mel_bins=bands,
        max_source_positions=50 * seconds,
    )
    save_model(config, folder)
    settings = {"feature_size": bands, "chunk_length": seconds} | preprocessor
    transformers.WhisperFeatureExtractor(**settings).save_pretrained(folder)
    return folder


def save_model(config: Any, folder: Path) -> None:
    """Weights and biases of one size, so that every layer matters: initial biases are 0, and other weights tiny."""
    torch.manual_seed(5)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "original0" not in name:
                parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


class Plain(nn.Module):
    """The checkpoint as its publisher runs it: float32 [1, samples] -> [1, frames, dim], by NumPy and `transformers` alone.

    `changes` are of the preprocessor: what an exporter would do that forgot a part of it.
    """

    def __init__(self, folder: Path, **changes: Any) -> None:
        super().__init__()
        self.extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, **changes)
        model = transformers.AutoModel.from_pretrained(folder)
        self.model = getattr(model, "encoder", model) if model.config.model_type == "whisper" else model

    def forward(self, audio: Tensor) -> Tensor:
        rate = self.extractor.sampling_rate
        inputs = self.extractor(audio[0].numpy().astype(np.float64), sampling_rate=rate, return_tensors="pt")
        (values,) = (value for name, value in inputs.items() if name.startswith("input_"))
        hidden: Tensor = self.model(values.float()).last_hidden_state
        frames = -(-audio.shape[1] // 320) if self.model.config.model_type == "whisper" else None
        return hidden[:, :frames]


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a json file, or remove those that are None."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
