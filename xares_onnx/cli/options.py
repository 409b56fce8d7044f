"""Options that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError

ModelArgument = Annotated[Path, typer.Argument(help="An .onnx file, or a folder with one.")]
TasksOption = Annotated[
    list[str] | None, typer.Option("--tasks", help="Names, patterns such as 'vox*', or task files; comma-separated.")
]
SuiteOption = Annotated[str | None, typer.Option(help="all, public, speech, environment, music, private or synthetic.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder with one folder of shards per task. [default: $XARES_ONNX_DATA, ./env]")
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Folder of stored embeddings. [default: $XARES_ONNX_CACHE, the user's cache]")
]
MethodOption = Annotated[list[str] | None, typer.Option("--method", help="head, knn; both by default.")]
SeedsOption = Annotated[int | None, typer.Option(help="Heads per fold. [default: 3; 1 under xares]")]
LimitOption = Annotated[int | None, typer.Option(help="At most N clips per split, chosen by key hash.")]
HeadOption = Annotated[
    list[str] | None, typer.Option("--head", help="TASK=KIND, a head in place of the task's own: librispeech=llm.")
]
LanguageModelOption = Annotated[
    str | None, typer.Option("--lm", help="Folder of a causal language model, for the llm head.")
]
VocabularyOption = Annotated[Path | None, typer.Option(help="BERT's vocab.txt, for captions under --protocol xares.")]
ContractOption = Annotated[
    list[str] | None, typer.Option("--contract", help="KEY=VALUE that is not declared yet, such as sample_rate=8000.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or an ONNX Runtime provider.")]
DevicesOption = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:N, cuda:0,cuda:1, cuda:all or an ONNX Runtime provider."),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads that call the model. [default: all cores]")]
WorkersOption = Annotated[
    int | None, typer.Option(help="Encoder processes, which share the threads. [default: 1 on a CPU, 1 to 4 per GPU]")
]
EngineOption = Annotated[
    str,
    typer.Option("--engine", help="local; ray, for a Ray cluster of this run's own; ray:auto or ray:HOST:PORT to join one."),
]
ProtocolOption = Annotated[str, typer.Option(help="corrected, or xares for X-ARES's own choices.")]
TapsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--taps",
        help="Outputs or inner tensors to score in one pass, comma-separated; all-layers; mix for their learned sum.",
    ),
]
DropsOption = Annotated[bool, typer.Option("--allow-drops", help="Score in spite of many dropped clips.")]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Lift the limits on the model's size, memory and time: you trust its origin.")
]
FormatOption = Annotated[str, typer.Option("--format", help="text, json, junit or github.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback of an error.")]


def check_counts(**counts: int | None) -> None:
    """Raise `UsageError` if an option that is a count is below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"--{name} {count} must be 1 or more")
