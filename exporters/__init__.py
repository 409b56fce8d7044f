"""Audio encoders as ONNX files that follow the encoder contract.

`FAMILIES` maps each family to a module with `build(family, checkpoint) -> (torch module, Spec)`. To add a family, write such
a module, or a row in `speech`, and name it there. `core` exports the module, writes the metadata and checks the file against
the torch module; `pretrained` reads checkpoints, `kaldi` has filter banks, and `precision` makes files smaller.

Importing this package loads neither torch nor onnx nor transformers; the last comes with the `export` extra.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from xares_onnx.errors import UsageError, nearest

if TYPE_CHECKING:
    from xares_onnx.exporters.core import ExportReport

__all__ = ["FAMILIES", "export"]

# Family: the module that builds its encoder.
FAMILIES = {
    "ast": "spectrogram_transformer",
    "beats": "beats",
    "ced": "dasheng",
    "clap": "clap",
    "dasheng": "dasheng",
    "data2vec": "speech",
    "eat": "eat",
    "hubert": "speech",
    "logmel": "logmel",
    "mert": "speech",
    "resemblyzer": "resemblyzer",
    "torch": "torch",
    "wav2vec2": "speech",
    "wav2vec2-bert": "wav2vec2_bert",
    "wavlm": "speech",
    "whisper": "whisper",
}
DTYPES = ("fp32", "fp16")
QUANTIZATIONS = ("int8-dynamic",)


def export(
    family: str, checkpoint: str | None, output: Path, *, dtype: str = "fp32", quantize: str | None = None
) -> ExportReport:
    """Write an encoder as an ONNX file. After an error, the output path is as it was.

    Args:
        family: One of `FAMILIES`.
        checkpoint: For families with weights, a path or the name of a model in the local cache; for `torch`,
            `module:factory`.
        output: The file to write, in a folder that exists.
        dtype: Of weights and arithmetic: `fp32` or `fp16`.
        quantize: `int8-dynamic` makes linear layers smaller still.

    Returns:
        How closely the file agrees with the torch module.

    Raises:
        UsageError: The family is unknown, the checkpoint or the output path unusable, or torch or the weights are missing.
        ModelError: The exported file does not agree with the torch module.

    Example:
        export("wavlm", "checkpoints/wavlm-base-plus", Path("wavlm.onnx"))
    """
    if family not in FAMILIES:
        raise UsageError(f"unknown encoder family {family!r}{nearest(family, FAMILIES)}; known: {', '.join(FAMILIES)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} must be {' or '.join(DTYPES)}")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise UsageError(f"--quantize {quantize!r} must be {' or '.join(QUANTIZATIONS)}")
    if quantize and dtype != "fp32":
        raise UsageError(f"--quantize {quantize} starts from float32 weights; leave out --dtype {dtype}")
    try:
        core = import_module(f"{__name__}.core")
        builder = import_module(f"{__name__}.{FAMILIES[family]}")
    except ModuleNotFoundError as error:
        raise UsageError(f"exporting needs {error.name}; run: pip install 'xares-onnx[export]'") from error
    encoder, spec = builder.build(family, checkpoint)
    report: ExportReport = core.export_encoder(encoder, spec, output, precision=quantize or dtype)
    return report
