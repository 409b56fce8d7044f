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
    "mert": (transformers.HubertConfig, {}),
}
# What a MERT's own config adds to a HuBERT's.
MUSIC = {"model_type": "mert_model", "feature_extractor_cqt": False, "deepnorm": False, "attention_relax": 32.0}


def save_speech(family: str, folder: Path, **preprocessor: Any) -> Path:
    kind, changes = SPEECH[family]
    save_model(kind(**(TINY | changes)), folder)
    rate = 24_000 if family == "mert" else 16_000
    extractor = transformers.Wav2Vec2FeatureExtractor(**({"do_normalize": True, "sampling_rate": rate} | preprocessor))
    extractor.save_pretrained(folder)
    if family == "mert":
        edit_json(folder / "config.json", **MUSIC)
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


def save_patches(family: str, folder: Path, **preprocessor: Any) -> Path:
    """A transformer on features: AST with a window of 3 s, CLAP with one of 2 s at 8 kHz, or wav2vec 2.0 BERT."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if family == "ast":
        save_model(transformers.ASTConfig(**sizes, max_length=300), folder)
        extractor: Any = transformers.ASTFeatureExtractor(**({"max_length": 300} | preprocessor))
    elif family == "wav2vec2-bert":
        save_model(transformers.Wav2Vec2BertConfig(**sizes, mask_time_prob=0.0), folder)
        extractor = transformers.SeamlessM4TFeatureExtractor(**preprocessor)
    else:
        save_model(transformers.ClapConfig(audio_config=CLAP_AUDIO, text_config=CLAP_TEXT, projection_dim=8), folder)
        extractor = transformers.ClapFeatureExtractor(**(CLAP_FRONT | preprocessor))
    extractor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


CLAP_AUDIO = {
    "hidden_size": 32,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "patch_embeds_hidden_size": 16,
    "spec_size": 64,
    "num_mel_bins": 16,
    "window_size": 4,
    "num_hidden_layers": 2,
}
CLAP_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
CLAP_FRONT = {
    "feature_size": 16,
    "sampling_rate": 8000,
    "hop_length": 80,
    "max_length_s": 2,
    "fft_window_size": 256,
    "frequency_max": 4000,
    "truncation": "rand_trunc",
}


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
        if '"mert_model"' in (folder / "config.json").read_text():
            model: Any = transformers.HubertModel.from_pretrained(folder)
        else:
            model = transformers.AutoModel.from_pretrained(folder)
        part = {"whisper": "encoder", "clap": "audio_model"}.get(model.config.model_type, "")
        self.model = getattr(model, part, model)

    def forward(self, audio: Tensor) -> Tensor:
        rate, kind = self.extractor.sampling_rate, self.model.config.model_type
        inputs = self.extractor(audio[0].numpy().astype(np.float64), sampling_rate=rate, return_tensors="pt")
        (values,) = (value for name, value in inputs.items() if name.startswith("input_"))
        own = {"attention_mask": inputs["attention_mask"]} if kind == "wav2vec2-bert" else {}
        hidden: Tensor = self.model(values.float(), **own).last_hidden_state
        return self._of_audio(hidden, audio.shape[1], kind)

    def _of_audio(self, hidden: Tensor, samples: int, kind: str) -> Tensor:
        """What belongs to the audio, of a model that pads."""
        if kind == "whisper":
            return hidden[:, : -(-samples // 320)]
        if kind == "wav2vec2-bert":  # a frame without its second half is masked
            return hidden[:, : ((samples - 400) // 160 + 1) // 2]
        if kind == "audio-spectrogram-transformer":
            patches = hidden[:, 2:].reshape(1, 12, -1, hidden.shape[2])[:, :, : (samples - 2800) // 1600 + 1]
            return torch.cat([hidden[:, :2], patches.reshape(1, -1, hidden.shape[2])], dim=1)
        if kind == "clap_audio_model":  # [1, dim, bands, times]
            tower, front = self.model.config, self.extractor
            stretched = tower.spec_size * (tower.spec_size // tower.num_mel_bins)
            merged = tower.patch_stride[1] * 2 ** (len(tower.depths) - 1)
            hop = round(merged * (front.nb_max_samples // front.hop_length * front.hop_length) / (stretched - 1))
            return hidden[..., : -(-samples // hop)].flatten(2).transpose(1, 2)
        return hidden


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a json file, or remove those that are None."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
