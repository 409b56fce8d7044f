"""`export` and `annotate`: write a model file, or a copy that declares its contract."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import printable
from .app import app, put, reported
from .options import DebugOption, TrustOption

_ARITHMETIC = {
    "exact": "measured on a processor that adds 8-bit products in 32 bits",
    "saturating": "measured on a processor that adds pairs of 8-bit products in 16 bits (no VNNI)",
    "unknown": "measured on a processor that does not tell how it adds 8-bit products",
}


@app.command()
@reported
def export(
    family: Annotated[
        str,
        typer.Argument(
            help="ast, beats, ced, clap, dasheng, data2vec, eat, hubert, logmel, mert, resemblyzer, torch, wav2vec2, "
            "wav2vec2-bert, wavlm or whisper."
        ),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Weights: a file or folder, or the name of a model in the local cache; nothing is downloaded. For torch, "
            "module:factory: your own code, which is imported and run here."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="[default: <family>.onnx]")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or fp16: of weights and arithmetic behind the front end.")] = "fp32",
    quantize: Annotated[
        str | None, typer.Option(help="int8-dynamic: linear layers in 8 bits, correct on every CPU; one clip per call.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Export a known encoder family to ONNX, checked against its PyTorch module."""
    from .. import exporters

    report = exporters.export(family, checkpoint, output or Path(f"{family}.onnx"), dtype=dtype, quantize=quantize)
    text = (
        f"{report.path}: {report.parameters / 1e6:.1f} M parameters, at most {report.max_abs_error:.1e} from PyTorch "
        f"over {len(report.lengths)} lengths x {len(report.batches)} batch sizes"
    )
    if report.pair_sums is not None:
        text += f", {_ARITHMETIC[report.pair_sums]}"
    put(f"{printable(text)}\n", sys.stdout)


@app.command()
@reported
def annotate(
    model: Annotated[Path, typer.Argument(help="An .onnx file, or a folder with one.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; never the model itself.")],
    contract: Annotated[
        list[str] | None, typer.Option("--contract", help="KEY=VALUE to declare, such as sample_rate=16000; repeatable.")
    ] = None,
    frontend: Annotated[
        Path | None,
        typer.Option(
            help="A graph in the model's folder that makes its features: both are joined into one that takes audio."
        ),
    ] = None,
    trust: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a copy of a model that declares its contract in its own metadata; graph and weights stay as they are."""
    from ..encoder.annotate import annotate as write
    from ..encoder.joining import join
    from ..report.observer import TerminalObserver

    if frontend is not None:
        with TerminalObserver() as observer:
            joined = join(model, frontend, contract or (), output, trust=trust, observer=observer)
        declares = ", ".join(f"{key}={value}" for key, value in joined.written.items())
        text = (
            f"{joined.path}: {declares}; at most {joined.difference:.1e} of the largest value from the two files over "
            f"{len(joined.lengths)} lengths"
        )
        put(f"{printable(text)}\n", sys.stdout)
        return
    with TerminalObserver() as observer:
        annotation = write(model, contract or (), output, trust=trust, observer=observer)
    changes = [
        f"{key}={value}" + (f" (was {annotation.replaced[key]})" if key in annotation.replaced else "")
        for key, value in annotation.written.items()
    ]
    changes += [
        f"{key} dropped (was {value})" for key, value in annotation.replaced.items() if key not in annotation.written
    ]
    text = f"{annotation.path}: {', '.join(changes) or 'nothing new'}"
    for title, names in (("unchanged", annotation.kept), ("weights copied", annotation.copied)):
        if names:
            text += f"; {title}: {', '.join(names)}"
    put(f"{printable(text)}\n", sys.stdout)
