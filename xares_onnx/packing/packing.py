"""From a table and its audio to shards and a task file.

Everything is checked before a shard is written: the table first, then the audio, then the splits. The clips are in a
scratch database (`index`), so that memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from ..data.catalog import shipped_tasks
from ..data.recordings import Recording, decode_recording
from ..data.shards import MAX_DROP_SHARE, MAX_DROPS, MAX_LABEL_BYTES, Drop, parse_label
from ..data.targets import Target
from ..data.task import MAX_GROUP, Data, Domain, Score, Task, load_task
from ..encoder.decoding import Decoder
from ..errors import DataError, DataMissingError, LabelError, UsageError, nearest, quoted
from ..progress import Note, Observer, Progress, ignore
from .balance import Balance, check_balance
from .columns import Columns, find_columns
from .index import Clip, Index
from .output import Manifest, Part, Source, check_output, put_in_place, scratch_folder
from .parts import name_parts
from .recordings import path_below
from .shard_writer import Member, key_of, write_shards
from .splits import SPLITS
from .tables import FolderTable, Table, open_table
from .task_file import Heading, write_task

Leaks = Literal["refuse", "drop", "keep"]
LEAKS: tuple[Leaks, ...] = get_args(Leaks)
DOMAINS = tuple(domain for domain in get_args(Domain) if domain != "synthetic")

_SHOWN = 3
_GROUP = "group"  # the key of a clip's json for its group; no kind of label uses it


class Packed(msgspec.Struct, frozen=True):
    """What was packed, or would be if there were an output."""

    task: Task
    columns: dict[str, str]
    """The meaning of each column that was read."""
    parts: dict[str, Part]
    classes: dict[str, dict[str, int]]
    """Clips of each class in each part."""
    dropped: list[Drop]
    """The clips that were left out."""
    notes: list[str]
    task_file: str | None
    command: str | None
    """The command that evaluates it; None if nothing was written."""


@dataclass
class _Run:
    """A packing in progress."""

    root: Path
    table: Table
    columns: Columns
    index: Index
    decoder: Decoder
    name: str
    observer: Observer
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.observer(Note(text))


def pack(
    audio: Path,
    labels: Path | None,
    output: Path | None,
    *,
    name: str = "mine",
    title: str | None = None,
    domain: str | None = None,
    target: str | None = None,
    kind: str | None = None,
    separator: str | None = None,
    group: str | None = None,
    seed: int = 0,
    low: float | None = None,
    high: float | None = None,
    crop_seconds: float | None = None,
    segment_seconds: float = 1.0,
    leaks: str = "refuse",
    allow_drops: bool = False,
    threads: int | None = None,
    observer: Observer = ignore,
) -> Packed:
    """Write `output/<name>/*.tar` and `output/<name>.toml` from the audio in a folder and a table of its labels.

    Shards contain the files as they are. The same files, labels and settings give the same bytes, whatever the order of
    rows.

    Args:
        audio: The folder; the table's paths start here.
        labels: The table: csv, tsv, jsonl or parquet. None if classes are the folder's sub-folders.
        output: The folder to write to; None to check everything and write nothing.
        name: Of the task.
        title: For reports; by default the name.
        domain: By default speech for transcripts, else environment.
        target: The column of labels, see `find_columns`.
        kind: The kind of label.
        separator: What separates tags in a cell.
        group: The column of groups, such as speakers, which are not split.
        seed: Another seed draws other splits.
        low: Lower bound of a number.
        high: Upper bound of a number.
        crop_seconds: Longer clips are cut into crops of this length.
        segment_seconds: The unit in which events are scored.
        leaks: What to do if recordings or groups cross the splits of the table: `refuse`, `drop` copies, or `keep`.
        allow_drops: Leave out missing and unusable clips, however many.
        threads: That decode audio; by default one per CPU.
        observer: Receives progress of the stages `inspect` and `write`, and notes.

    Raises:
        UsageError: A bad option, a missing or ambiguous column, a path outside the folder, another's files in the output.
        DataError: Missing or unusable files, rows that contradict each other, splits that give no score.
        MachineError: The output cannot be written.
    """
    heading = _heading(name, title, domain)
    if leaks not in LEAKS:
        raise UsageError(f"--leaks {quoted(leaks)} is not one of {', '.join(LEAKS)}{nearest(leaks, LEAKS)}")
    if not audio.is_dir():
        raise DataMissingError(f"audio folder {audio} does not exist")
    root = audio.resolve()
    table = open_table(labels) if labels is not None else FolderTable(root)
    columns = find_columns(table, target=target, kind=kind, group=group, separator=separator, low=low, high=high)
    label_kind = columns.labels.kind
    if domain is None and label_kind == "transcript":
        heading = Heading(heading.name, heading.title, "speech")
    try:
        Data(splits={"train": "*", "test": "*"}, crop_seconds=crop_seconds)
        Score(segment_seconds=segment_seconds)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if crop_seconds is not None and label_kind in ("events", "transcript"):
        raise UsageError(f"--crop-seconds would cut through the {label_kind} of a clip; leave it out")
    source = Source(root.name, labels.name if labels is not None else None)
    if output is not None:
        check_output(output, name, source)
    with scratch_folder(output, name) as scratch, Index(scratch) as index, Decoder([root]) as decoder:
        decoder.begin()  # while the table is read
        run = _Run(root, table, columns, index, decoder, name, observer)
        _read_rows(run)
        _join_rows(run)
        _check_missing(run, allow_drops)
        _decode_all(run, threads)
        _check_drops(run, allow_drops)
        _check_copies(run, leaks)
        balance = _read_labels(run)
        _check_drops(run, allow_drops)
        folds = name_parts(index, columns, seed, run.note)
        balance.count(index, columns.labels)
        for text in check_balance(balance, folds):
            run.note(text)
        numbers = index.numbers() if label_kind == "number" else (0.0, 0.0)
        sizes = {part: clips for part, (clips, _) in index.parts().items()}
        text = write_task(
            heading,
            columns.labels,
            parts=sizes,
            folds=folds,
            classes=balance.names,
            numbers=numbers,
            crop_seconds=crop_seconds,
            segment_seconds=segment_seconds,
            group=_GROUP if columns.group else None,
        )
        task = load_task(Path(f"{name}.toml"), text)
        index.make_keys_unique(lambda path: f"-{hashlib.sha256(path.encode()).hexdigest()[:8]}")
        shards = _write_shards(run, scratch / "fresh", folds) if output is not None else {}
        parts = {part: Part(clips, seconds, shards.get(part, 0)) for part, (clips, seconds) in index.parts().items()}
        packed = Packed(
            task=task,
            columns=_meanings(columns),
            parts={part: parts[part] for part in (sorted(parts, key=int) if folds else SPLITS) if part in parts},
            classes=balance.table(),
            dropped=[Drop(path, f"{reason} ({table.at(line)})") for path, line, reason in index.faults(*_LOSSES)],
            notes=run.notes,
            task_file=str(output / f"{name}.toml") if output is not None else None,
            command=_command(output, name) if output is not None else None,
        )
        if output is not None:
            manifest = Manifest(source, packed.columns, seed, packed.parts, packed.dropped, packed.notes)
            for note in put_in_place(scratch / "fresh", output, name, text, manifest):
                run.note(note)
    return packed


_LOSSES: tuple[Any, ...] = ("missing", "unusable", "copy")


def _heading(name: str, title: str | None, domain: str | None) -> Heading:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"--name {quoted(name)} may hold letters, digits, `_`, `-` and `.` only")
    if name in shipped_tasks():
        raise UsageError(f"--name {quoted(name)} is already a task of X-ARES or of the built-in suite; choose another")
    if domain is not None and domain not in DOMAINS:
        raise UsageError(f"--domain {quoted(domain)} is not one of {', '.join(DOMAINS)}{nearest(domain, DOMAINS)}")
    if title is not None and not title.isprintable():
        raise UsageError(f"--title {quoted(title)} contains characters that cannot be printed")
    return Heading(name, title or name, domain or "environment")


def _meanings(columns: Columns) -> dict[str, str]:
    meanings = {columns.path: "path"}
    meanings |= dict.fromkeys(columns.labels.columns, columns.labels.kind)
    for column, meaning in ((columns.split, "split"), (columns.fold, "fold"), (columns.group, "group")):
        if column is not None:
            meanings[column] = meaning
    return meanings


def _command(output: Path, name: str) -> str:
    return f"xares-onnx evaluate MODEL --tasks {shlex.quote(str(output / f'{name}.toml'))} --data {shlex.quote(str(output))}"


# ---------------------------------------------------------------- the table


def _read_rows(run: _Run) -> None:
    """Every row into the index. Cells that contradict each other are errors; an unusable label is a fault of its clip."""
    columns, index = run.columns, run.index
    for line, cells in run.table.rows(columns.wanted):
        where = run.table.at(line)
        name = cells[columns.path]
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"{where} names no file in its column {quoted(columns.path)}")
        path = path_below(run.root, name, where)
        part, team = columns.part(cells, where), _team(cells.get(columns.group or ""), where)
        known = index.find(path)
        if known is None:
            clip = index.add(path, key_of(path), line, part, team)
            if not (run.root / path).exists():
                index.leave_out([("there is no such file", clip)], "missing")
        else:
            clip = known.id
            for word, new, old in (("split or fold", part, known.part), ("group", team, known.team)):
                if new != old:
                    raise DataError(
                        f"{where} says {word} {quoted(new)} of {quoted(path)}, {run.table.at(known.line)} says {quoted(old)}"
                    )
        try:
            index.state(clip, line, json.dumps(columns.labels.read(cells)))
        except LabelError as error:
            if known is None or known.fault is None:
                index.leave_out([(str(error), clip)], "unusable")
    index.finish()
    if not index.count()[0]:
        in_folders = run.table.path == run.root
        empty = f"{run.root} has no sub-folders with audio" if in_folders else f"{run.table.path} has no rows"
        raise DataError(f"{empty}, so there is nothing to pack")


def _team(value: Any, where: str) -> str | None:
    """A group's name; None for an empty cell, whose clip is a group of its own."""
    text = "" if value is None else str(value).strip()
    if len(text) > MAX_GROUP:
        raise DataError(f"{where} names a group of {len(text)} characters; a name has at most {MAX_GROUP}")
    return text or None


def _join_rows(run: _Run) -> None:
    """Make each clip's label of what its rows state."""
    repeated = 0
    for batch in run.index.clips():
        joined = []
        for clip in batch:
            statements = run.index.statements(clip.id)
            different = list({value: line for line, value in reversed(statements)}.items())
            if len(different) > 1 and not run.columns.labels.adds_up:
                (new, first), (old, second) = different[-1], different[-2]
                raise DataError(
                    f"{quoted(clip.path)} is {quoted(json.loads(new))} in {run.table.at(first)} and "
                    f"{quoted(json.loads(old))} in "
                    f"{run.table.at(second)}; a clip has one {run.columns.labels.kind}"
                )
            repeated += len(statements) - len(different)
            joined.append((json.dumps(run.columns.labels.join([json.loads(value) for _, value in statements])), clip.id))
        run.index.set_labels(joined)
    if repeated:
        run.note(f"{repeated} rows repeat what another row says about the same clip")


def _check_missing(run: _Run, allow_drops: bool) -> None:
    missing = run.index.faults("missing")
    if missing and not allow_drops:
        first = ", ".join(f"{path} ({run.table.unit} {line})" for path, line, _ in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataMissingError(
            f"{len(missing)} of {run.index.count()[0]} files are not in {run.root}: {first}{more}; put them there, or leave "
            "them out by --allow-drops"
        )


def _check_drops(run: _Run, allow_drops: bool) -> None:
    lost = run.index.faults("unusable")
    expected, left = run.index.count()
    if (lost and not left) or (not allow_drops and len(lost) > MAX_DROPS and len(lost) > MAX_DROP_SHARE * expected):
        path, line, reason = lost[0]
        remedy = "repair them" + (", or leave them out by --allow-drops" if left else "")
        raise DataError(
            f"{len(lost)} of {expected} clips cannot be used, the first {path} ({run.table.at(line)}): {reason}; {remedy}"
        )


# ---------------------------------------------------------------- audio and labels


def _decode_all(run: _Run, threads: int | None) -> None:
    """Decode every clip: its recording into the index, or its fault."""
    _, total = run.index.count()
    done = 0
    for batch in run.index.clips():
        run.observer(Progress("inspect", run.name, done, total))
        recordings, faults = [], []
        paths = [run.root / clip.path for clip in batch]
        results = run.decoder.each(decode_recording, paths, Recording, threads or os.cpu_count() or 1)
        for clip, result in zip(batch, results, strict=True):
            if isinstance(result, str):
                faults.append((result, clip.id))
            else:
                recordings.append((result.content, result.seconds, result.size, clip.id))
        run.index.set_recordings(recordings)
        run.index.leave_out(faults, "unusable")
        done += len(batch)
    run.observer(Progress("inspect", run.name, total, total))


def _check_copies(run: _Run, leaks: str) -> None:
    """Note the recordings that occur more than once; if they cross the splits of the table, do as `leaks` says."""
    index = run.index
    parts_column = run.columns.split or run.columns.fold
    if parts_column:
        recordings, pair = index.across("content")
        if recordings and leaks == "drop":
            parts = list(index.parts())
            ranks = [part for part in reversed(SPLITS) if part in parts] if run.columns.split else sorted(parts)
            copies = index.copies(ranks)
            index.leave_out([("its recording is in another split or fold too", clip) for _, clip in copies], "copy")
            run.note(f"{_clips(len(copies))} left out whose recordings are in another part of {quoted(parts_column)} too")
        elif recordings:
            count = f"{recordings} recording{'s' if recordings > 1 else ''}"
            leak = f"{count} in several parts of {quoted(parts_column)}, such as {_both(pair)}"
            remedy = "remove the copies, leave them out by --leaks drop, or keep them by --leaks keep"
            _refuse_or_note(run, leaks, leak, remedy)
        teams, pair = index.across("team")
        if teams:
            count = f"{teams} group{'s' if teams > 1 else ''}"
            leak = f"{count} in several parts of {quoted(parts_column)}, such as that of {_both(pair)}"
            remedy = "correct the table, or keep them by --leaks keep"
            _refuse_or_note(run, "refuse" if leaks == "drop" else leaks, leak, remedy)
    number, paths = index.pairs_of_content(same_label=False)
    if paths:
        run.note(f"{number} of the recordings have more than one label, such as {paths[0]} and {paths[1]}")
    number, paths = index.pairs_of_content(same_label=True)
    if paths:
        kept = "" if parts_column else ", kept in one split"
        run.note(f"{number} of the recordings occur more than once{kept}, such as {paths[0]} and {paths[1]}")


def _both(pair: Sequence[tuple[str, str]]) -> str:
    (a, part_a), (b, part_b) = pair[:2]
    return f"{a} ({part_a}) and {b} ({part_b})"


def _refuse_or_note(run: _Run, leaks: str, leak: str, remedy: str) -> None:
    if leaks != "keep":
        raise DataError(f"the test would contain training clips: {leak}; {remedy}")
    run.note(f"{leak}: scores may be too high")


def _clips(number: int) -> str:
    return f"{number} clip{'' if number == 1 else 's'}"


def _read_labels(run: _Run) -> Balance:
    """The vocabulary of the usable clips; a clip whose label an evaluation would refuse is left out."""
    labels, index = run.columns.labels, run.index
    balance = Balance(labels.kind)
    for batch in index.clips():
        for clip in batch:
            balance.add(labels.classes(json.loads(clip.label or "")))
    balance.check_vocabulary()
    numbers = index.numbers() if labels.kind == "number" else (0.0, 0.0)
    fields = labels.target(balance.names, numbers)
    if labels.kind == "number" and not fields["low"] < fields["high"]:
        raise DataError(f"every score is {numbers[0]:g}, or --low is not below --high: there is nothing to learn")
    if labels.kind == "number" and math.isinf(fields["high"] - fields["low"]):
        raise DataError(
            f"scores from {fields['low']:g} to {fields['high']:g} lie too far apart to compute with; rescale them"
        )
    target = msgspec.convert({"kind": labels.kind, **fields}, Target)
    events = late = 0
    for batch in index.clips():
        faults, strata = [], []
        for clip in batch:
            try:
                if len(clip.label or "") > MAX_LABEL_BYTES:
                    raise LabelError(f"its label is larger than {MAX_LABEL_BYTES >> 20} MiB")
                target.encode(parse_label(clip.label or ""))
            except LabelError as error:
                faults.append((str(error), clip.id))
                continue
            label = json.loads(clip.label or "")
            strata.append((balance.stratum(labels.classes(label)), clip.id))
            if labels.kind == "events":
                events += len(label)
                late += sum(event["start"] >= (clip.seconds or 0) for event in label)
        index.leave_out(faults, "unusable")
        index.set_strata(strata)
    if late and late == events:
        raise DataError(f"all {events} events begin after their clips have ended; give times in seconds")
    if late:
        run.note(f"{late} of {events} events begin after their clips have ended, and are ignored; give times in seconds")
    return balance


# ---------------------------------------------------------------- files


def _write_shards(run: _Run, fresh: Path, folds: bool) -> dict[str, int]:
    """Write the shards of each part. Returns their number by part."""
    fresh.mkdir()
    _, total = run.index.count()
    done = 0

    def members(part: str) -> Iterator[Member]:
        nonlocal done
        for clip in run.index.of_part(part):
            run.observer(Progress("write", run.name, done, total))
            yield _member(run, clip)
            done += 1

    shards = {}
    for part in run.index.parts():
        stem = f"fold-{part}" if folds else part
        shards[part] = len(write_shards(str(fresh / f"{stem}-{{:06}}.tar"), members(part)))
    run.observer(Progress("write", run.name, total, total))
    return shards


def _member(run: _Run, clip: Clip) -> Member:
    label = json.loads(clip.label or "")
    if run.columns.group:  # a clip without a group is a group of its own
        label = {**parse_label(clip.label or ""), _GROUP: clip.team or clip.path}
    return Member(clip.key, run.root / clip.path, clip.size or 0, json.dumps(label, ensure_ascii=False).encode())
