"""Tables in a terminal: results, tasks, downloads, plans and the cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.catalog import part_globs, shipped_tasks
from ..data.inventory import Holding
from ..data.task import Task
from ..embedding.pieces import shard_of
from ..embedding.store import Header
from ..errors import foreign, printable
from ..evaluation.averages import published_averages, weight_shares
from ..evaluation.planning import Plan, PlanRow
from ..evaluation.record import SHOWN_GROUPS, Average, Result, TaskResult
from ..evaluation.settings import METHODS, Method
from .curves import shot_curves
from .profile import NOTE, aspects
from .tables import METRIC_NAMES, empty_table, grid_range, is_narrow
from .taps import print_taps
from .units import data_size, duration

if TYPE_CHECKING:
    from ..download.download import TaskReport

_NOT_COMPARABLE = "*"


def print_result(result: Result, console: Console, *, saved: str | None = None) -> None:
    """Print tasks with their scores and intervals, averages, and whatever went wrong; `saved` is where the result lies."""
    contract = result.encoder.contract
    console.print(
        Text.assemble(
            "encoder ",
            (foreign(result.encoder.file), "bold"),
            f"  {data_size(result.encoder.bytes)}, {result.encoder.parameters / 1e6:.1f} M parameters, "
            f"{contract['dim']['value']} dimensions, {_hop(result)}, "
            f"{result.environment['provider'].removesuffix('ExecutionProvider')}",
        )
    )
    by_task: dict[str, dict[Method, TaskResult]] = {}
    main = [record for record in result.tasks if record.tap is None]
    for record in main:
        by_task.setdefault(record.task, {})[record.family] = record
    words = ("task",) if is_narrow(console) else ("task", "domain", "metric")
    with_seeds = not is_narrow(console) and any(len(record.per_seed) > 1 for record in main)
    with_grid = not is_narrow(console) and any(record.tuning for record in main)
    spread = (*(["grid"] if with_grid else []), *(["seeds"] if with_seeds else []))
    table = empty_table(console, words, ("head", "95 %", *spread, "knn", "95 %", "tested", "dropped"))
    table.columns[0].no_wrap = False  # a long title may take two lines
    reasons = []
    for records in by_task.values():
        first = next(iter(records.values()))
        head = records.get("head")
        cells = [*_score_cells(head), *([_grid(head)] if with_grid else []), *([_spread(head)] if with_seeds else [])]
        cells += _score_cells(records.get("knn"))
        dropped = len(first.clips.dropped)
        table.add_row(
            *(foreign(first.title), first.domain, METRIC_NAMES[first.metric])[: len(words)],
            *cells,
            str(first.n_test) if first.n_test else "",
            Text(str(dropped), style="yellow") if dropped else "",
        )
        if first.status != "ok":
            reasons.append(f"{first.task}: {first.status}: {first.reason}")
        elif dropped:
            drop = first.clips.dropped[0]
            reasons.append(
                f"{first.task}: {dropped} of {first.clips.expected} clips dropped, the first {drop.key}: {drop.reason}"
            )
    console.print(table, soft_wrap=False)
    _print_profile(by_task, console)
    if any(group in SHOWN_GROUPS for group in result.averages):
        console.print(_averages_table(result, console), soft_wrap=False)
    print_taps(result, console)
    _print_shots(result, console)
    _print_published(main, console)
    settings = result.settings
    incomparable = [record for record in main if not record.comparable and record.status == "ok"]
    causes = [f"at most {settings['limit']} clips per split were used"] if settings["limit"] else []
    causes = causes or list(dict.fromkeys(f"{record.task}: {record.notes[-1]}" for record in incomparable if record.notes))
    if incomparable:
        reasons.append(f"{_NOT_COMPARABLE} not comparable with other results, and in no average: {'; '.join(causes)}")
    for reason in reasons:
        console.print(Text(printable(reason), style="yellow"))
    several_seeds = max((len(record.per_seed) for record in main), default=0) > 1
    seeds = f", {settings['seeds']} seed{'s' if settings['seeds'] > 1 else ''}" if several_seeds or not with_grid else ""
    error_titles = dict.fromkeys(record.title for record in main if not record.higher_is_better)
    exceptions = f", but lower for {', '.join(map(foreign, error_titles))}" if error_titles else ""
    notes = "; grid: lowest and highest score over the settings that were tried" if with_grid else ""
    notes += "; +- is the standard deviation over seeds" if with_seeds else ""
    console.print(f"protocol {settings['protocol']}{seeds}; scores are fractions, higher is better{exceptions}{notes}")
    if saved:
        console.print(f"saved {printable(saved)}")


def _print_profile(by_task: Mapping[str, Mapping[Method, TaskResult]], console: Console) -> None:
    """Print what an encoder keeps, by the tasks of the synthetic suite."""
    rows = aspects(by_task)
    if not rows:
        return
    table = empty_table(console, ("what is kept", "by the task", "metric"), ("chance", "head", "knn"))
    kept = ""
    for row in rows:
        scores = [_score_cells(by_task[row.task].get(method))[0] for method in METHODS]
        chance = "" if row.chance is None else f"{row.chance:.3f}"
        table.add_row("" if row.kept == kept else row.kept, row.title, row.metric, chance, *scores)
        kept = row.kept
    console.print(table, soft_wrap=False)
    console.print(NOTE)


def _print_shots(result: Result, console: Console) -> None:
    """Print scores by the number of training clips per class."""
    curves = list(shot_curves([result]))
    if not curves:
        return
    counts = sorted({step for curve in curves for step in curve.steps}, key=int)
    headings = [cell for count in counts for cell in ((count,) if is_narrow(console) else (count, "95 %"))]
    table = empty_table(console, ("training clips per class",), headings)
    for curve in curves:
        cells = dict(zip(curve.steps, zip(curve.scores, curve.ci95, strict=True), strict=True))
        row_cells = []
        for score, ci95 in (cells.get(count, (None, None)) for count in counts):
            row_cells += ["" if score is None else f"{score:.3f}", *([] if is_narrow(console) else [_interval(ci95)])]
        table.add_row(foreign(curve.title), *row_cells)
    console.print(table, soft_wrap=False)
    console.print("few clips: the mean of 10 draws of training clips, scored on the task's test clips")


def _print_published(records: Iterable[TaskResult], console: Console) -> None:
    """Print the scores beside the published ones: those of X-ARES, or of a user's own task file."""
    shown = [record for record in records if record.score is not None and record.published]
    if not shown:
        return
    encoders = list(dict.fromkeys(name for record in shown for name in record.published))
    table = empty_table(console, ("beside published scores", "method"), ("this model", *map(foreign, encoders)))
    for record in shown:
        published = [f"{record.published[name]:.3f}" if name in record.published else "" for name in encoders]
        table.add_row(foreign(record.title), record.method, _score_cells(record)[0], *published)
    table.add_section()
    for method in METHODS:
        rows = [record for record in shown if record.family == method and record.weight and record.comparable]
        if not rows:
            continue
        own = weight_shares([record.weight for record in rows]) @ np.array([record.score for record in rows], np.float64)
        averages = published_averages(rows, method)
        cells = [f"{averages[name]:.3f}" if name in averages else "" for name in encoders]
        table.add_row("weighted average of these", method, f"{own:.3f}", *cells)
    console.print(table, soft_wrap=False)
    shipped = shipped_tasks().keys() & {record.task for record in shown}
    if not shipped:
        return
    console.print(
        "published scores are X-ARES's, by its own protocol on its own copy of the data; averages are computed from its "
        "columns and weights: over the public tasks 0.694, 0.484, 0.626, 0.593 (MLP), where its README prints 0.699, 0.490, "
        "0.632, 0.598"
    )
    for task in sorted(shipped):
        published_scores = shipped_tasks()[task].published
        if published_scores and published_scores.note:
            console.print(f"{task}, published {published_scores.note}")


def print_tasks(rows: Sequence[tuple[Task, Holding]], folder: Path, console: Console) -> None:
    """Print tasks with kind, metric and weight, and their data in `folder`, with record size and licence if known."""
    title = () if is_narrow(console) else ("title",)
    with_record = any(held.record_bytes is not None for _, held in rows) and not is_narrow(console)
    with_check = any(held.check for _, held in rows)
    table = empty_table(
        console,
        ("name", *title, "domain", "kind", "metric"),
        ("weight", *(["record"] if with_record else [])),
        (*(["licence"] if with_record else []), "on disk", *(["checked"] if with_check else [])),
    )
    for column in table.columns[-2 if with_check else -1 :]:
        column.no_wrap = False
    for task, held in rows:
        weight = f"{task.weight:g}" if task.weight is not None else "-"
        words = (task.name, *(foreign(task.title) for _ in title), task.domain, task.kind, METRIC_NAMES[task.score.metric])
        record = (data_size(held.record_bytes) if held.record_bytes is not None else "", foreign(held.license or ""))
        on_disk = printable(held.on_disk) + (", private" if task.private else "")
        if held.unfinished_bytes:
            on_disk += f", {data_size(held.unfinished_bytes)} of unfinished downloads"
        table.add_row(*words, weight, *(record if with_record else ()), on_disk, *([_checked(held)] if with_check else []))
    console.print(table, soft_wrap=False)
    _print_damage(rows, console)
    console.print(f"data folder: {printable(str(folder))}")


def print_download(reports: Sequence[TaskReport], console: Console, *, plan: bool = False) -> None:
    """Print what was fetched; with `plan`, what a download would fetch."""
    table = empty_table(console, ("task", "record", "licence"), ("files", "size", "to fetch" if plan else "fetched"))
    total = 0
    for report in reports:
        fetched = sum(file.bytes for file in report.files if file.status in ("fetched", "unpacked"))
        transfer = report.missing_bytes if plan else fetched
        total += transfer
        cells = (str(len(report.files)), data_size(report.bytes), data_size(transfer))
        table.add_row(report.task, report.record, foreign(report.license or "not stated"), *cells)
    table.add_section()
    table.add_row("total", "", "", "", "", data_size(total))
    console.print(table, soft_wrap=False)


def _checked(held: Holding) -> str | Text:
    """What a check of the shards gave; empty without a check."""
    check = held.check
    if check is None or not (held.shards or check.damaged):
        return ""
    if check.damaged:
        return Text(f"{len(check.damaged)} damaged", style="yellow")
    counts = [f"{check.by_checksum} by checksum"] if check.by_checksum else []
    if check.by_headers:
        unusable = f", {check.unusable} unusable" if check.unusable else ""
        counts.append(f"{check.by_headers} by headers: {check.clips} clips{unusable}")
    return f"good: {'; '.join(counts)}"


def _print_damage(rows: Sequence[tuple[Task, Holding]], console: Console) -> None:
    for _, held in rows:
        for damage in held.check.damaged if held.check else ():
            console.print(Text(printable(f"{held.task}/{damage.shard}: {damage.reason}"), style="yellow"))


def print_task(task: Task, held: Holding, folder: Path, console: Console) -> None:
    """Print all about one task, and which of its data lie in `folder`."""
    names = task.target.class_names
    shown = ", ".join(names[:12]) + (f", ... ({len(names) - 12} more)" if len(names) > 12 else "")
    rows = [
        ("name", task.name),
        ("title", task.title),
        ("domain", f"{task.domain}, private" if task.private else task.domain),
        ("kind", f"{task.kind}, {len(names)} classes" if names else task.kind),
        *([("classes", shown)] if names else []),
        ("target", _target(task)),
        ("crops", f"{task.data.crop_seconds:g} s" if task.data.crop_seconds else "none, whole clips"),
        (
            "head",
            f"{task.head.kind}, {task.head.epochs} epochs, batches of {task.head.batch_size}, "
            f"learning rate {task.head.learning_rate:g}"
            + (f", positive targets count {task.head.positive_weight:g} times" if task.head.positive_weight != 1 else ""),
        ),
        ("metric", f"{_metric(task)}, {'also' if task.knn else 'not'} by kNN"),
        ("weight", f"{task.weight:g}" if task.weight is not None else "none, so in no average"),
    ]
    if task.data.zenodo:
        rows.append(("data", f"https://zenodo.org/records/{task.data.zenodo}"))
    if held.record_bytes is not None:
        rows += [("size", data_size(held.record_bytes)), ("licence", held.license or "not stated by the record")]
    elif task.data.zenodo:
        rows.append(("licence", f"that of the record; `xares-onnx download {task.name} --plan` shows it, and the size"))
    if task.domain == "synthetic":
        rows.append(("data", "built in"))
    else:
        rows.append(("folder", str(folder / task.name)))
        kind = "fold" if task.data.folds else "split"
        for part, glob in part_globs(task).items():
            sizes = [path.stat().st_size for path in (folder / task.name).glob(glob)]
            shards = f"{len(sizes)} shard{'' if len(sizes) == 1 else 's'}, {data_size(sum(sizes))}" if sizes else "no shards"
            rows.append((f"{kind} {part}", f"{glob}: {shards}"))
        if held.unfinished_bytes:
            rows.append(("unfinished", f"{data_size(held.unfinished_bytes)} of downloads"))
        if held.check:
            rows.append(("checked", str(_checked(held)) or "nothing is there"))
    if task.published:
        for method, scores in (("linear", task.published.linear), ("knn", task.published.knn)):
            if scores:
                rows.append((f"published {method}", ", ".join(f"{name} {score:.3f}" for name, score in scores.items())))
        if task.published.note:
            rows.append(("note", task.published.note))
    for label, value in rows:
        console.print(Text.assemble((f"{printable(label):<18}", "bold"), printable(value)))
    _print_damage([(task, held)], console)


def _target(task: Task) -> str:
    """The fields of a clip's json that hold the target."""
    fields = {
        name: value for name, value in msgspec.structs.asdict(task.target).items() if name != "classes" and value is not None
    }
    return ", ".join(f"{name} {value!r}" for name, value in fields.items()) or "every text in a clip's json"


def _metric(task: Task) -> str:
    segment = f" over segments of {task.score.segment_seconds:g} s" if task.score.segment_seconds else ""
    return f"{METRIC_NAMES[task.score.metric]}{segment}"


def print_plan(plan: Plan, console: Console) -> None:
    """Print what an evaluation would read and write, and how long it would take."""
    table = empty_table(console, ("task",), ("clips", "hours", "to embed", "disk", "embedding", "heads"))
    for row in plan.rows:
        table.add_row(row.task, *_plan_cells(row))
    table.add_section()
    total = plan.total
    table.add_row("total", *_plan_cells(total))
    console.print(table, soft_wrap=False)
    console.print(
        f"about {duration(total.embed_seconds + total.train_seconds)} on this machine: the model takes {plan.rtf:.4f} s per "
        "second of audio; hours are estimated from a sample of the clips"
    )


def print_cache(entries: Sequence[tuple[str, Header, int, float]], root: str, console: Console) -> None:
    """Print stored embeddings by model and task.

    Args:
        entries: Key, header, size in bytes and time of last use (seconds since 1970) per stored shard, or piece of one.
        root: The folder of the store.
        console: Where to print.
    """
    groups: dict[tuple[str, str, str], list[tuple[str, Header, int, float]]] = {}
    for entry in entries:
        header = entry[1]
        groups.setdefault((header.model, header.model_sha256[:8], header.task), []).append(entry)
    table = empty_table(console, ("model", "sha256", "task"), ("shards", "hours", "size", "last used"))
    for (model, sha256, task), shards in sorted(groups.items()):
        hours = sum(header.audio_seconds for _, header, *_ in shards) / 3600
        latest = max(last_used for *_, last_used in shards)
        table.add_row(
            foreign(model),
            foreign(sha256),
            foreign(task),
            str(len({shard_of(key) for key, *_ in shards})),
            f"{hours:.2f}",
            data_size(sum(size for *_, size, _ in shards)),
            f"{datetime.fromtimestamp(latest, UTC):%Y-%m-%d}",
        )
    console.print(table, soft_wrap=False)
    console.print(f"{data_size(sum(size for *_, size, _ in entries))} in {printable(root)}")


def _averages_table(result: Result, console: Console) -> Table:
    mean = () if is_narrow(console) else ("plain mean",)
    headings = [heading for method in METHODS for heading in (method, "95 %", *mean, "tasks")]
    table = empty_table(console, ("weighted average",), headings)
    for group, methods in result.averages.items():
        if group not in SHOWN_GROUPS:
            continue
        cells = [cell for method in METHODS for cell in _average_cells(methods.get(method), len(mean))]
        table.add_row(group, *cells)
    return table


def _average_cells(average: Average | None, means: int) -> list[str]:
    """Cells of one average; `means` is 1 with the column of plain means, else 0."""
    if average is None:
        return [""] * (3 + means)
    tasks = f"{average.tasks}" if average.complete else f"{average.tasks} of {average.tasks + len(average.missing)}"
    return [f"{average.weighted:.3f}", _interval(average.ci95), *[f"{average.mean:.3f}"] * means, tasks]


def _score_cells(record: TaskResult | None) -> tuple[Text | str, str]:
    """The score, or the status without one, and its interval."""
    if record is None:
        return "", ""
    if record.score is None:
        return Text(record.status.replace("_", " "), style="yellow"), ""
    mark = "" if record.comparable else _NOT_COMPARABLE
    return Text(f"{record.score:.3f}{mark}", style="bold"), _interval(record.ci95)


def _grid(record: TaskResult | None) -> str:
    """The range of test scores over the settings that were tried."""
    return _interval(grid_range(record)) if record is not None else ""


def _spread(record: TaskResult | None) -> str:
    """Standard deviation over seeds."""
    return f"+-{np.std(record.per_seed, ddof=1):.3f}" if record is not None and len(record.per_seed) > 1 else ""


def _plan_cells(row: PlanRow) -> tuple[str, ...]:
    return (
        str(row.clips),
        f"{row.hours:.2f}",
        str(row.clips_to_embed),
        data_size(row.disk_bytes),
        duration(row.embed_seconds),
        duration(row.train_seconds),
    )


def _interval(ci95: tuple[float, float] | None) -> str:
    return f"{ci95[0]:.3f}-{ci95[1]:.3f}" if ci95 else ""


def _hop(result: Result) -> str:
    hop, rate = result.encoder.contract["hop_samples"]["value"], result.encoder.contract["sample_rate"]["value"]
    return f"a frame every {1000 * hop / rate:g} ms" if hop else "clip-only"
