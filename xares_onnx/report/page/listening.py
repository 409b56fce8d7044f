"""Short copies of the worst clips for the page, if the data that were scored are available."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.catalog import Digests, cache_folder, data_folder, shipped_tasks, task_folder
from ...data.recordings import Sound, sound_of
from ...data.selection import TaskData, prepare
from ...data.shards import index_shard
from ...encoder.decoding import Decoder
from ...errors import DataError, DataMissingError, foreign
from ...evaluation.record import TaskResult
from ...progress import ignore
from .mistakes import Mistakes

MAX_CLIP_BYTES = 64 << 20  # of a clip's audio file
MAX_PAGE_BYTES = 6 << 20

Sounds = dict[tuple[str, str], str]  # data: URIs by task and key


@dataclass
class Listening:
    """`sounds` by task and key; `notes` say what was left out."""

    sounds: Sounds
    notes: list[str]


def load_sounds(mistakes: Sequence[Mistakes], data: Path | None, cache: Path | None) -> Listening:
    """The first 6 s of each worst clip as mono MP3, up to 6 MiB in all, for tasks whose data are those that were scored.

    Args:
        mistakes: Whose worst clips are wanted.
        data: Folder of the shards; None for the usual one.
        cache: Folder of the shards' digests and of the synthetic suite; None for the usual one.

    Raises:
        DataMissingError: If the folder `data` does not exist.
    """
    folder, cache = data_folder(data), cache_folder(cache)
    listening, bytes_left = Listening({}, []), MAX_PAGE_BYTES
    wanted: dict[str, tuple[TaskResult, dict[str, None]]] = {}
    for of_task in mistakes:
        keys = wanted.setdefault(of_task.row.task, (of_task.row.record, {}))[1]
        keys.update(dict.fromkeys(clip.key for clip in of_task.clips))
    for task, (record, keys) in wanted.items():
        try:
            scored = _scored_data(record, folder, cache)
            for key, sound in _sounds(scored, keys):
                if len(sound) > bytes_left:
                    listening.notes.append(
                        f"{foreign(task)}: some clips are left out, since a page holds at most {MAX_PAGE_BYTES >> 20} MiB"
                    )
                    break
                bytes_left -= len(sound)
                listening.sounds[task, key] = sound
        except DataError as error:
            listening.notes.append(f"{foreign(task)}: its clips cannot be heard here: {error}")
    return listening


def _scored_data(record: TaskResult, folder: Path, cache: Path) -> TaskData:
    """Raises `DataMissingError` or `DataError` if the shards are not those of the record."""
    task = shipped_tasks().get(record.task)
    if task is None:
        raise DataMissingError("sound is available for shipped tasks only")
    task_data = prepare(task, task_folder(task, folder, cache), Digests(cache), None, ignore)
    if task_data.digest() != record.data_digest:
        raise DataError(f"the shards in {task_data.folder} are not those that were scored")
    return task_data


def _sounds(data: TaskData, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Key and sound of the clips that can be decoded."""
    remaining = set(keys)
    shards = sorted({path for paths in data.parts.values() for path in paths})
    with Decoder(shards) as decoder:
        for shard in shards:
            yield from _sounds_of(data, shard, remaining, decoder)


def _sounds_of(data: TaskData, shard: Path, remaining: set[str], decoder: Decoder) -> Iterator[tuple[str, str]]:
    if not any(key.startswith(data.key(shard, "")) for key in remaining):
        return
    for sample in index_shard(shard).samples:
        key = data.key(shard, sample.key)
        if key in remaining and sample.audio.size <= MAX_CLIP_BYTES:
            remaining.discard(key)
            (sound,) = decoder.each(sound_of, [(shard, sample.audio)], Sound)
            if isinstance(sound, Sound):  # else the evaluation has already reported the dropped clip
                yield key, sound.uri
