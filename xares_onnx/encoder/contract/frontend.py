"""The front end of a model that takes features: its settings, presets for them, and how many frames it gives.

A preset names a front end, and single keys change parts of it. `features` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import msgspec

from ...errors import ContractError
from .frame_law import FrameLaw

Preset = Literal["whisper", "kaldi", "librosa", "wespeaker", "nemo", "ced", "vggish", "yamnet", "musicnn"]
PRESETS: tuple[str, ...] = get_args(Preset)
MAX_BINS = 1024


class Frontend(msgspec.Struct, frozen=True, kw_only=True):
    """Log-mel energies of a waveform at `sample_rate`: the fields are its steps in order. Each clip by itself; no dither.

    Lengths are in samples. Frame i begins `hop_samples` after frame i - 1.
    """

    preset: Preset
    sample_rate: int
    padding: Literal["none", "reflect", "zeros", "symmetric"]
    """`none`: whole windows only. `reflect`, `zeros`: frame i is centred on sample i * hop, the ends are mirrored or silent,
    as `torch.stft` and librosa do. `symmetric`: Kaldi's snip_edges=false; frame i is centred on (i + 1/2) * hop."""
    window_samples: int
    hop_samples: int
    fft_samples: int
    drop_last_frame: bool
    remove_dc: bool
    """The mean of each window is subtracted from it."""
    preemphasis: float
    """This share of the previous sample is subtracted, within each window; the first sample's previous one is itself."""
    window: Literal["hann", "hamming", "povey", "rectangular"]
    window_periodic: bool
    power: float
    """Of the magnitude: 2 for energies, 1 for magnitudes."""
    mels: int
    low_hz: float
    high_hz: float
    """0 and below count from half the sampling rate."""
    mel_scale: Literal["slaney", "htk"]
    mel_norm: Literal["none", "slaney"]
    """`slaney`: each filter has unit area in Hz."""
    mel_triangles: Literal["hertz", "mel"]
    """The scale on which filters are triangles: Kaldi's are on the mel scale."""
    log: Literal["none", "natural", "log10", "decibel"]
    log_offset: float
    """Added before the logarithm."""
    log_floor: float
    """Smaller values are raised to this before the logarithm."""
    log_reference: Literal["unit", "max"]
    """`max`: the clip's loudest value becomes 0."""
    log_range: float
    """Values farther than this below the clip's loudest, in the logarithm's unit, are raised; 0 for no limit."""
    normalize: Literal["none", "cmn", "cmvn", "per_feature"]
    """Over the clip's frames, the mean of each band is subtracted (`cmn`); `cmvn` also divides by its standard deviation,
    and `per_feature` by that plus 1e-5, as NeMo does."""
    fill: Literal["silence", "zeros", "repeat"]
    """What follows a clip that is shorter than its input: silent samples, frames of zeros, or as many copies of the clip as
    fit, then silence."""
    mean: float
    std: float
    """Last, (feature - mean) / std."""
    stack_frames: int
    """This many consecutive frames become one; a remainder is left out."""
    preemphasis_over: Literal["window", "clip"] | msgspec.UnsetType = msgspec.UNSET
    """`clip`: over the whole clip, before it is padded, in place of each window. Unset is `window`, so that front ends from
    before this field keep their names in the store."""

    @property
    def bins(self) -> int:
        """Values per frame."""
        return self.mels * self.stack_frames

    @property
    def frame_samples(self) -> int:
        """The hop from one frame to the next, once they are stacked."""
        return self.hop_samples * self.stack_frames

    @property
    def receptive_samples(self) -> int:
        """The constant of its `law`."""
        return self.window_law.receptive_field + (self.stack_frames - 1) * self.hop_samples

    @property
    def window_law(self) -> FrameLaw:
        """How many windows it cuts from samples: its frames before they are stacked."""
        if self.padding == "none":
            constant = self.window_samples
        elif self.padding == "symmetric":
            constant = self.hop_samples - self.hop_samples // 2
        else:
            constant = self.fft_samples % 2
        dropped = self.hop_samples if self.drop_last_frame else 0
        return FrameLaw(self.hop_samples, constant + dropped)

    @property
    def first_center_samples(self) -> float:
        """The centre of the first frame."""
        centers = {"none": self.window_samples / 2, "symmetric": self.hop_samples / 2}
        return centers.get(self.padding, 0.0) + (self.stack_frames - 1) * self.hop_samples / 2

    @property
    def law(self) -> FrameLaw:
        """How many frames it makes of samples, once they are stacked."""
        return FrameLaw(self.frame_samples, self.receptive_samples)

    def frames(self, samples: int) -> int:
        return self.law.frames(samples)

    def frames_held(self, samples: int) -> int:
        """How many frames, at least 1, belong to the first samples; if frames are centred, those centred on one of them."""
        if self.padding in ("reflect", "zeros"):
            return max(1, -(-samples // self.hop_samples) // self.stack_frames)
        return max(1, self.frames(samples))

    def samples_for(self, frames: int) -> int:
        """The shortest waveform that gives this many frames, in samples."""
        return max(1, self.law.first_length_with(frames))

    def described(self) -> str:
        """One line for the user."""
        top = self.high_hz if self.high_hz > 0 else self.sample_rate / 2 + self.high_hz
        return (
            f"{self.mels} mel bands of {self.low_hz:g} to {top:g} Hz, {self.window} windows of {self.window_samples} "
            f"samples every {self.hop_samples}, padding {self.padding}, log {self.log}, normalize {self.normalize}"
        )


# ---------------------------------------------------------------- declarations


def _flag(text: str) -> str:
    return {"1": "true", "yes": "true", "0": "false", "no": "false"}.get(text.lower(), text.lower())


# What may be declared of a front end, with `frontend.` before each, and how its text is read.
_TYPES = {
    field.name: get_args(field.type)[0] if field.default is msgspec.UNSET else field.type
    for field in msgspec.structs.fields(Frontend)
    if field.name != "sample_rate"
}
PREFIX = "frontend."
KEYS: dict[str, Callable[[str], Any]] = {
    PREFIX + name: _flag if kind is bool else kind if kind in (int, float) else str for name, kind in _TYPES.items()
}
CHOICES: dict[str, frozenset[str]] = {
    PREFIX + name: frozenset({"true", "false"} if kind is bool else kind.__args__)
    for name, kind in _TYPES.items()
    if kind not in (int, float)
}
MODEL_KEYS: dict[str, Callable[[str], Any]] = {PREFIX + "model": str, PREFIX + "scale": float, PREFIX + "offset": float}
"""Of a front end that is a graph."""
RANGES: dict[str, tuple[float, float]] = {
    PREFIX + "mels": (1, MAX_BINS),
    PREFIX + "stack_frames": (1, 16),
    **{PREFIX + name: (1, 1 << 16) for name in ("window_samples", "hop_samples", "fft_samples")},
    PREFIX + "power": (0.1, 4),
    PREFIX + "preemphasis": (0, 1),
    PREFIX + "std": (1e-6, 1e6),
    PREFIX + "log_range": (0, 1e4),
    PREFIX + "log_offset": (0, 1e9),
    PREFIX + "log_floor": (0, 1e9),
    PREFIX + "low_hz": (0, 1e6),
}


def make_frontend(declared: Mapping[str, Any], sample_rate: int, mels: int | None = None) -> Frontend:
    """A preset with the declared values.

    Args:
        declared: Values by key without the prefix; `preset` is one of them.
        sample_rate: In Hz.
        mels: The number of bands, if none is declared.

    Raises:
        ContractError: No preset is declared, or values do not fit each other.
    """
    if "preset" not in declared:
        raise ContractError(
            f"{', '.join(PREFIX + key for key in declared)} needs a preset; set --contract {PREFIX}preset="
            f"{', '.join(PRESETS[:-1])} or {PRESETS[-1]}"
        )
    changes = {key: value == "true" if _TYPES[key] is bool else value for key, value in declared.items()}
    preset: str = changes["preset"]
    values = {**_preset(preset, sample_rate), **({"mels": mels} if mels else {}), **changes}
    if preset not in _FFT:  # the next power of two
        values.setdefault("fft_samples", 1 << (values["window_samples"] - 1).bit_length())
    else:
        values.setdefault("fft_samples", max(values["window_samples"], _FFT[preset]))
        if "window_samples" not in changes:
            values["window_samples"] = values["fft_samples"]
    frontend = Frontend(sample_rate=sample_rate, **values)
    _check(frontend)
    return frontend


# The amplitude that a preset is defined for; by default [-1, 1].
AMPLITUDES: dict[str, str] = {"wespeaker": "int16"}
# The hop, by length, of the windows of frames that a preset's models are used with.
WINDOWS: dict[str, dict[int, int]] = {
    "vggish": {96: 48},  # 0.96 s every 0.48 s
    "yamnet": {96: 48},
    "musicnn": {187: 93, 128: 62},  # MusiCNN, and Discogs-EffNet on the same features
}
_FFT = {"whisper": 400, "librosa": 2048, "ced": 512, "musicnn": 512}  # at least; the window is as long
_PLAIN: dict[str, Any] = {
    "drop_last_frame": False,
    "remove_dc": False,
    "preemphasis": 0.0,
    "window": "hann",
    "window_periodic": True,
    "power": 2.0,
    "low_hz": 0.0,
    "high_hz": 0.0,
    "mel_scale": "slaney",
    "mel_norm": "slaney",
    "mel_triangles": "hertz",
    "log_offset": 0.0,
    "log_floor": 1e-10,
    "log_reference": "unit",
    "log_range": 0.0,
    "normalize": "none",
    "fill": "silence",
    "mean": 0.0,
    "std": 1.0,
    "stack_frames": 1,
}


def _preset(name: str, sample_rate: int) -> dict[str, Any]:
    """Sources: transformers' WhisperFeatureExtractor; Kaldi's and torchaudio's fbank, of 80 bands, without dither; librosa's
    melspectrogram and power_to_db (0.10 and later); WeSpeaker's fbank with its mean subtracted; NeMo's
    AudioToMelSpectrogramPreprocessor, without dither; CED's and Dasheng's feature extractor, which is torchaudio's
    MelSpectrogram and AmplitudeToDB; vggish_input.py and YAMNet's features.py of TensorFlow's models; Essentia's
    TensorflowInputMusiCNN.
    """
    short = {"window_samples": max(1, round(0.025 * sample_rate)), "hop_samples": max(1, round(0.010 * sample_rate))}
    htk = {"mel_scale": "htk", "mel_norm": "none"}
    kaldi = {
        **short,
        **htk,
        "padding": "none",
        "remove_dc": True,
        "preemphasis": 0.97,
        "window": "povey",
        "window_periodic": False,
        "mels": 80,
        "low_hz": 20.0,
        "mel_triangles": "mel",
        "log": "natural",
        "log_floor": 2.0**-23,  # float32's epsilon
    }
    vggish = {
        **short,
        **htk,
        "padding": "none",
        "power": 1.0,
        "mels": 64,
        "low_hz": 125.0,
        "high_hz": 7500.0,
        "mel_triangles": "mel",
        "log": "natural",
        "log_offset": 0.01,
        "log_floor": 0.0,
    }
    own: dict[str, dict[str, Any]] = {
        "whisper": {
            "padding": "reflect",
            "window_samples": 400,
            "hop_samples": 160,
            "drop_last_frame": True,
            "mels": 80,
            "high_hz": 8000.0,
            "log": "log10",
            "log_range": 8.0,
            "mean": -4.0,
            "std": 4.0,
        },
        "kaldi": kaldi,
        "librosa": {
            "padding": "zeros",
            "window_samples": 2048,
            "hop_samples": 512,
            "mels": 128,
            "log": "decibel",
            "log_range": 80.0,
        },
        "wespeaker": {**kaldi, "window": "hamming", "normalize": "cmn"},
        "nemo": {
            **short,
            "padding": "zeros",
            "drop_last_frame": True,  # which NeMo masks
            "preemphasis": 0.97,
            "preemphasis_over": "clip",
            "window_periodic": False,
            "mels": 80,
            "log": "natural",
            "log_offset": 2.0**-24,
            "log_floor": 0.0,
            "normalize": "per_feature",
            "fill": "zeros",
        },
        "ced": {
            **htk,
            "padding": "reflect",
            "window_samples": 512,
            "hop_samples": 160,
            "mels": 64,
            "log": "decibel",
            "log_range": 120.0,
        },
        "vggish": vggish,
        "yamnet": {**vggish, "log_offset": 0.001},
        "musicnn": {
            "padding": "zeros",
            "window_samples": 512,
            "hop_samples": 256,
            "window_periodic": False,
            "mels": 96,
            "log": "log10",
            "log_offset": 1e-4,  # log10(1 + 10,000 x), four less
            "log_floor": 0.0,
            "mean": -4.0,
        },
    }
    return {**_PLAIN, "preset": name, **own[name]}


def _check(frontend: Frontend) -> None:
    half = frontend.sample_rate / 2
    top = frontend.high_hz if frontend.high_hz > 0 else half + frontend.high_hz
    if frontend.window_samples > frontend.fft_samples:
        problem = f"window_samples={frontend.window_samples} is more than fft_samples={frontend.fft_samples}"
    elif not frontend.low_hz < top:
        problem = f"low_hz={frontend.low_hz:g} is not below the highest band's {top:g} Hz"
    elif frontend.low_hz >= half:
        problem = f"low_hz={frontend.low_hz:g} is not below half the sampling rate, {half:g} Hz"
    elif frontend.log != "none" and not frontend.log_floor + frontend.log_offset > 0:
        problem = "the logarithm of silence needs a log_floor or log_offset above 0"
    elif frontend.log == "none" and (frontend.log_range or frontend.log_reference != "unit"):
        problem = "log_range and log_reference need a logarithm"
    else:
        return
    raise ContractError(f"the declared front end is impossible: {problem}; correct its frontend.* keys")
