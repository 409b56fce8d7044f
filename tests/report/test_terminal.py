"""Terminal output holds no control sequences from hostile names."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from corpus import write_task
from rich.console import Console

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.data.inventory import Check, Damage, Holding
from xares_onnx.data.shards import Clips, Drop
from xares_onnx.data.task import load_task
from xares_onnx.download.download import TaskReport
from xares_onnx.embedding.store import Header
from xares_onnx.evaluation.averages import averages
from xares_onnx.evaluation.planning import Plan, PlanRow
from xares_onnx.evaluation.record import Encoder, Result, Seconds, TaskResult
from xares_onnx.progress import Note, Progress
from xares_onnx.report import observer as observers
from xares_onnx.report import terminal
from xares_onnx.scoring.shots import Shots

HOSTILE = "[red]\x1b[2J\x1b]0;owned\x07\r\n\u202ename[/red]:smile:"
SHOWN = r"[red]\x1b[2J\x1b]0;owned\x07\r\n\u202ename[/red]:smile:"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=["terminal", "file"])
def console(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Screen() if request.param == "terminal" else io.StringIO())
    return observers.stdout_console()


def printed(console: Console) -> str:
    """What was printed, without the colours of our own."""
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    own_styles = ("\x1b[0m", "\x1b[1m", "\x1b[33m")
    if console.is_terminal:
        assert any(style in text for style in own_styles)
    for style in own_styles:
        text = text.replace(style, "")
    return text


def record(**fields: Any) -> TaskResult:
    base: dict[str, Any] = {
        "task": "esc50",
        "title": HOSTILE,
        "domain": "environment",
        "status": "ok",
        "method": "linear",
        "metric": "accuracy",
        "score": 0.5,
        "ci95": (0.25, 0.75),
        "n_test": 10,
        "clips": Clips(expected=10, read=9, dropped=[Drop(HOSTILE, HOSTILE)]),
        "definition_digest": "",
        "seconds": Seconds(embed=0, train=0, score=0),
    }
    return TaskResult(**{**base, **fields})


def result(*tasks: TaskResult) -> Result:
    contract = {name: {"value": 16_000, "source": "default"} for name in ("dim", "hop_samples", "sample_rate")}
    return Result(
        encoder=Encoder(file=HOSTILE, sha256="", bytes=1, parameters=1, contract=contract, taps=[]),
        environment={"provider": "CPUExecutionProvider"},
        settings={"protocol": "corrected", "seeds": 1, "limit": None},
        created="",
        tasks=list(tasks),
        averages=averages(tasks, {}),
    )


def safe(text: str) -> None:
    """No control character but line ends, and the hostile text in full as escapes."""
    assert [c for c in text if not c.isprintable() and c != "\n"] == []
    assert SHOWN in text


def test_hostile_names_in_a_result(console: Console) -> None:
    failed = record(task="gtzan_genre", status="failed", reason=HOSTILE, score=None, ci95=None)
    terminal.print_result(result(record(), failed), console, saved=HOSTILE)
    text = printed(console)
    safe(text)
    assert text.count(SHOWN) == 7  # encoder, two titles, key and reason of a drop, reason of a failure, path


def test_published_scores_stand_beside_those_of_this_model(console: Console) -> None:
    """Whatever encoders each task has; averages are of the encoders that all have, and of comparable scores."""
    esc50 = record(title="ESC-50", score=0.25, weight=400, published={"one": 0.5, "two": 0.75})
    gtzan = record(task="gtzan_genre", title="GTZAN", score=0.75, weight=100, published={"two": 0.25, HOSTILE: 0.125})
    other = record(task="ravdess", title="RAVDESS", score=1.0, weight=360, published={"two": 1.0}, comparable=False)
    terminal.print_result(result(esc50, gtzan, other), console)
    text = printed(console)
    safe(text)
    lines = [line.replace("|", " ").split() for line in text.splitlines()]
    assert [line for line in lines if "linear" in line or line[:3] == ["weighted", "average", "of"]] == [
        ["ESC-50", "linear", "0.250", "0.500", "0.750"],
        ["GTZAN", "linear", "0.750", "0.250", "0.125"],
        ["RAVDESS", "linear", "1.000*", "1.000"],
        ["weighted", "average", "of", "these", "head", f"{(400 * 0.25 + 100 * 0.75) / 500:.3f}", "0.650"],
    ]
    assert "0.694, 0.484, 0.626, 0.593 (MLP), where its README prints 0.699, 0.490, 0.632, 0.598" in text


def test_without_published_scores_there_is_no_table_of_them(console: Console) -> None:
    terminal.print_result(result(record(title="ESC-50", score=None, ci95=None, published={"one": 0.5})), console)
    assert "published" not in printed(console)


def test_hostile_names_in_a_listing(console: Console, tmp_path: Path) -> None:
    path = write_task(tmp_path, "mine", classes=("a", "b"))
    path.write_text(
        path.read_text().replace('"Tones mine"', json.dumps(HOSTILE)).replace('["a", "b"]', json.dumps(["a", HOSTILE]))
    )
    task = load_task(path)
    damage = Check(damaged=[Damage(HOSTILE, HOSTILE)])
    held = Holding(task="mine", on_disk=HOSTILE, shards=1, record_bytes=1, license=HOSTILE, check=damage)
    terminal.print_tasks([(task, held)], Path(HOSTILE), console)
    terminal.print_task(task, held, Path(HOSTILE), console)
    terminal.print_download([TaskReport("mine", "1", HOSTILE, 1, 1)], console)
    header = Header(
        store_version=1,
        model=HOSTILE,
        model_sha256=HOSTILE,
        task=HOSTILE,
        shard="",
        expected=0,
        damage=None,
        audio_seconds=0,
    )
    terminal.print_cache([("key", header, 10, 0.0)], HOSTILE, console)
    terminal.print_plan(Plan([PlanRow("mine", 1, 1, 0.1, 10, 1, 1)], 0.1), console)
    safe(printed(console))


@pytest.mark.parametrize("live", [True, False])
def test_hostile_names_in_progress(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen() if live else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with observers.TerminalObserver() as observer:
        observer(Progress("embed", "[red]mine[/red]", 0, 10))
        observer(Note(HOSTILE))
        observer(Note(HOSTILE))
        observer(Progress("embed", "[red]mine[/red]", 10, 10))
    text = screen.getvalue()
    assert text.count(f"note: {SHOWN}") == 1  # printed once
    assert "\x1b[2J" not in text
    assert "\x1b]0;" not in text
    assert "[red]mine[/red]" in text


def test_a_long_download_prints_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no bar can move: every half minute, with the rate of this run and the time that is left."""
    stream, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(observers.time, "monotonic", lambda: now[0])
    with observers.TerminalObserver() as observer:
        for seconds, megabytes in ((0, 400), (10, 450), (31, 493), (40, 520), (62, 586), (100, 1000)):
            now[0] = 1000.0 + seconds
            observer(Progress("download", "esc50", megabytes * 1_000_000, 1_000_000_000))
    assert stream.getvalue().splitlines() == [
        "esc50: 493 MB of 1.0 GB, 3.0 MB/s, 3 min left",
        "esc50: 586 MB of 1.0 GB, 3.0 MB/s, 2 min left",
        "esc50: downloading done, 1.0 GB",
    ]


def test_what_goes_on_at_the_same_time_has_bars_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task is embedded while the head of another is trained; a bar that has ended goes."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Screen())
    with observers.TerminalObserver() as observer:

        def visible() -> list[str]:
            return [bar.description for bar in observer._progress.tasks if bar.visible]

        observer(Progress("embed", "one", 0, 10))
        observer(Progress("embed", "one", 10, 10))
        observer(Progress("train", "one", 0, 5))
        observer(Progress("embed", "two", 0, 10))
        observer(Progress("train", "one", 4, 5))
        assert visible() == ["training one", "embedding two"]
        for name in "abc":
            observer(Progress("train", name, 0, 5))
        assert visible() == ["training a", "training b", "training c"]


def test_a_download_has_a_bar_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with observers.TerminalObserver() as observer:
        observer(Progress("download", "esc50", 100_000_000, 600_000_000))
        observer(Progress("download", "esc50", 300_000_000, 600_000_000))
    assert "downloading esc50" in screen.getvalue()
    assert "300 MB/600 MB" in screen.getvalue()


def test_scores_are_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", Screen())
    console = observers.stdout_console()
    tasks = [record(title="Libri Speech Male Female", score=0.123, clips=Clips(expected=1, read=1, dropped=[]))]
    tasks.append(record(title="Libri Speech Male Female", method="knn", score=0.456))
    terminal.print_result(result(*tasks), console)
    rows = [(task, Holding(task.name, "12 shards, 10.34 GB", record_bytes=1)) for task in shipped_tasks().values()]
    terminal.print_tasks(rows, Path("data"), console)
    text = printed(console)
    for whole in ("0.123", "0.456", "0.250-0.750", "dropped", "weight", "12 shards,", "librispeechmalefemale"):
        assert whole in text
    assert "…" not in text
    assert max(len(line) for line in text.splitlines() if "0.123" in line or "accuracy" in line) <= 80


def shots(clips: int, score: float | None) -> Shots:
    ci95 = None if score is None else (score - 0.1, score + 0.1)
    return Shots(clips_per_class=clips, score=score, ci95=ci95, draws=[], note=None)


def test_few_clips_have_a_table(console: Console) -> None:
    terminal.print_result(result(record(shots=[shots(1, 0.25), shots(16, 0.75), shots(64, None)])), console)
    lines = printed(console).splitlines()
    heading = next(i for i, line in enumerate(lines) if "training clips per class" in line)
    assert [word for word in lines[heading].replace("95 %", "").split() if word.isdigit()] == ["1", "16", "64"]
    row = next(line for line in lines[heading:] if "0.250" in line)
    assert row.index("0.250") < row.index("0.150-0.350") < row.index("0.750") < row.index("0.650-0.850")
    assert SHOWN in row


def test_without_few_clips_there_is_no_table(console: Console) -> None:
    terminal.print_result(result(record()), console)
    assert "training clips per class" not in printed(console)
