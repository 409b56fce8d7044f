"""Packing Hugging Face data sets from disk: their layouts, their labels, and files that are not what they should be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from cli_world import run
from data_set_makers import AUDIO, AUDIO_TYPE, classes, sequence, table_of, values, write_arrow, write_hub, write_saved
from kind_makers import SIZES, write_bank
from pack_makers import short, tree, write_files, write_kind, write_table
from test_pack import packed_clips

from xares_onnx.errors import DataError, DataMissingError, UsageError
from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.packing import pack
from xares_onnx.packing.arrow_files import ParquetRows
from xares_onnx.progress import Event, Progress

FEATURES = {"audio": AUDIO, "label": classes("cat", "dog")}
NAMES = {"train": "train-{:05}-of-00002", "valid": "validation-{:05}-of-00002", "test": "test-{:05}-of-00002"}


def row(seed: int, label: Any = None, *, name: str | None = None, **more: Any) -> dict[str, Any]:
    """A row with its audio in it, of class 0 or 1 by turns."""
    cell = {"bytes": short(seed), "path": name or f"{seed}.wav"}
    return {"audio": cell, "label": seed % 2 if label is None else label, **more}


def rows(start: int, count: int = 7) -> list[dict[str, Any]]:
    return [row(seed) for seed in range(start, start + count)]


def of_splits(first: int = 0) -> dict[str, list[dict[str, Any]]]:
    return {split: rows(first + 100 * number) for number, split in enumerate(SIZES)}


def expected(split_rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {
        split: {
            f"{split}/{Path(each['audio']['path']).stem}": (each["audio"]["bytes"], {"label": ("cat", "dog")[each["label"]]})
            for each in members
        }
        for split, members in split_rows.items()
    }


# ---------------------------------------------------------------- layouts


def as_hub(folder: Path) -> None:
    """Two files per split below data/."""
    for split, members in of_splits().items():
        halves = {f"data/{NAMES[split].format(i)}.parquet": part for i, part in enumerate((members[:4], members[4:]))}
        write_hub(folder, halves, FEATURES)


def as_converted(folder: Path) -> None:
    """The hub's own conversion to parquet: a folder per split."""
    write_hub(folder, {f"default/{split}/0000.parquet": members for split, members in of_splits().items()}, FEATURES)


def as_saved(folder: Path) -> None:
    """A DatasetDict's `save_to_disk`."""
    for split, members in of_splits().items():
        write_saved(folder / split, [members[:4], members[4:]], FEATURES)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(SIZES)}))


def as_cached(folder: Path) -> None:
    """The library's cache: files named for the data set, results of `map` beside them."""
    folder.mkdir()
    for split, members in of_splits().items():
        write_arrow(folder / f"test_sounds-{split}.arrow", table_of(members, FEATURES, stated=False))
    write_arrow(folder / "cache-0123456789abcdef.arrow", pyarrow.table({"length": [1, 2]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))


@pytest.mark.parametrize("write", [as_hub, as_converted, as_saved, as_cached])
def test_each_layout_is_read_split_by_split_with_the_names_of_its_classes(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / "sounds")
    packed = pack(tmp_path / "sounds", None, tmp_path / "out")
    assert packed_clips(tmp_path / "out/mine") == expected(of_splits())
    assert packed.task.kind == "class"
    assert packed.dropped == []
    assert not any("left out" in note for note in packed.notes)
    assert packed.columns == {"audio": "path", "label": "class", "split": "split"}
    pack(tmp_path / "sounds", None, tmp_path / "again")
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_a_data_set_scores_as_its_files_and_table_do(tmp_path: Path) -> None:
    table = write_kind(tmp_path / "audio", "tags")
    pack(tmp_path / "audio", write_table(tmp_path / "labels.csv", table), tmp_path / "files")
    names = sorted({name for each in table for name in each["labels"].split(",") if name})
    members = [
        {
            "audio": {"bytes": (tmp_path / "audio" / each["path"]).read_bytes(), "path": each["path"]},
            "labels": [names.index(name) for name in each["labels"].split(",") if name],
            "split": each["split"],
        }
        for each in sorted(table, key=lambda each: each["path"])
    ]
    features = {"audio": AUDIO, "labels": sequence(classes(*names)), "split": values("string")}
    write_hub(tmp_path / "set", {"train.parquet": members}, features)
    pack(tmp_path / "set", None, tmp_path / "rows")
    assert packed_clips(tmp_path / "rows/mine") == packed_clips(tmp_path / "files/mine")
    model = write_bank(tmp_path / "bank.onnx")
    scores = [
        evaluate(model, [str(tmp_path / where / "mine.toml")], data=tmp_path / where, cache=tmp_path / where, seeds=1)
        for where in ("files", "rows")
    ]
    assert scores[0].result.tasks[0].score == scores[1].result.tasks[0].score is not None


def test_splits_are_made_if_the_files_name_one_alone_and_do_not_depend_on_how_rows_lie_in_files(tmp_path: Path) -> None:
    members = rows(0, 30)
    write_hub(tmp_path / "one", {"train-00000-of-00001.parquet": members}, FEATURES, group_rows=30)
    halves = {f"data/train-{i:05}-of-00002.parquet": part for i, part in enumerate((members[:11], members[11:]))}
    write_hub(tmp_path / "two", halves, FEATURES)
    write_saved(tmp_path / "saved", [members], FEATURES, batch_rows=4)
    for where in ("one", "two", "saved"):
        packed = pack(tmp_path / where, None, tmp_path / "out" / where)
        assert {split: part.clips for split, part in packed.parts.items()} == {"train": 22, "valid": 4, "test": 4}
    assert tree(tmp_path / "out/one") == tree(tmp_path / "out/two") == tree(tmp_path / "out/saved")


def test_a_fold_per_file_and_a_column_of_folds_are_cross_validated(tmp_path: Path) -> None:
    write_hub(tmp_path / "files", {f"fold{n}-00000-of-00001.parquet": rows(100 * n) for n in (1, 2)}, FEATURES)
    packed = pack(tmp_path / "files", None, tmp_path / "out")
    assert packed.task.data.folds is not None
    assert set(packed_clips(tmp_path / "out/mine")) == {"fold-1", "fold-2"}
    members = [row(seed, fold=seed // 2 % 3 + 1) for seed in range(24)]
    write_hub(tmp_path / "column", {"data/train.parquet": members}, {**FEATURES, "fold": values("int64")})
    assert {part.clips for part in pack(tmp_path / "column", None, None).parts.values()} == {8}


def test_a_validation_split_is_the_test_if_there_is_no_other_and_that_is_noted(tmp_path: Path) -> None:
    files = {"train.parquet": rows(0), "validation.parquet": rows(100), "other.parquet": rows(200)}
    packed = pack(write_hub(tmp_path / "sounds", files, FEATURES), None, None)
    assert {split: part.clips for split, part in packed.parts.items()} == {"train": 7, "test": 7}
    assert "no file is named for a test split: valid is the test" in packed.notes
    assert "1 files are left out, whose names tell no split, such as other.parquet" in packed.notes


# ---------------------------------------------------------------- labels and audio


def test_every_kind_of_label(tmp_path: Path) -> None:
    event = {"start": values("float32"), "end": values("float32"), "label": classes("bark", "meow")}
    features = {
        "audio": AUDIO,
        "tones": sequence(values("string")),
        "events": sequence(event),
        "spans": {name: sequence(feature) for name, feature in event.items()},
        "listed": [event],
        "text": values("string"),
        "caption": values("string"),
        "mos": values("float32"),
        "speaker": values("string"),
    }

    def one_event(seed: int) -> Any:
        return [{"start": 0.0, "end": pytest.approx(0.02), "label": ("bark", "meow")[seed % 2]}]

    members = [
        {
            "audio": row(seed)["audio"],
            "tones": ["low", "high"][: seed % 3],
            "events": {"start": [0.0, 0.01], "end": [0.02, 0.03], "label": [seed % 2, 1]},
            "spans": {"start": [0.0], "end": [0.02], "label": [seed % 2]},
            "listed": [{"start": 0.0, "end": 0.02, "label": seed % 2}],
            "text": f"word {seed}",
            "caption": f"sound {seed}",
            "mos": seed % 5 + 0.5,
            "speaker": f"s{seed // 4}",
        }
        for seed in range(40)
    ]
    write_hub(tmp_path / "sounds", {"train.parquet": members}, features)
    wanted: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
        "tones": ({}, lambda seed: {"labels": sorted(["low", "high"][: seed % 3])}),
        "events": (
            {},
            lambda seed: [
                {"start": 0.0, "end": pytest.approx(0.02), "label": ("bark", "meow")[seed % 2]},
                {"start": pytest.approx(0.01), "end": pytest.approx(0.03), "label": "meow"},
            ],
        ),
        "spans": ({}, one_event),
        "listed": ({}, one_event),
        "text": ({"kind": "transcript"}, lambda seed: {"transcript": f"word {seed}"}),
        "caption": ({}, lambda seed: {"caption_1": f"sound {seed}"}),
        "mos": ({}, lambda seed: {"score": seed % 5 + 0.5}),
    }
    for column, (options, label) in wanted.items():
        pack(tmp_path / "sounds", None, tmp_path / column, target=column, group="speaker", **options)
        clips = {
            int(key): got for part in packed_clips(tmp_path / column / "mine").values() for key, (_, got) in part.items()
        }
        assert len(clips) == 40
        for seed, got in clips.items():
            got = got.get("events", got) if column in ("events", "spans", "listed") else got
            group = {} if column in ("events", "spans", "listed") else {"group": f"s{seed // 4}"}
            assert got == (label(seed) if column in ("events", "spans", "listed") else label(seed) | group)


def test_the_command_names_the_label(tmp_path: Path) -> None:
    features = {"audio": AUDIO, "species": classes("cat", "dog"), "mood": classes("calm", "cross")}
    members = [{"audio": row(seed)["audio"], "species": seed % 2, "mood": seed // 2 % 2} for seed in range(40)]
    write_hub(tmp_path / "sounds", {"train.parquet": members}, features)
    code, _, err = run("pack", str(tmp_path / "sounds"), "--check")
    assert code == 2
    assert "choose one: --target species or mood" in err
    code, out, err = run("pack", str(tmp_path / "sounds"), "--label", "mood", "-o", str(tmp_path / "out"))
    assert code == 0, err
    assert "read audio as path, mood as class" in out


def test_files_of_one_name_are_kept_apart_and_rows_about_one_file_add_up(tmp_path: Path) -> None:
    features = {"audio": AUDIO, "caption": values("string")}
    cells = [{"bytes": short(seed), "path": "C:\\sounds\\a.wav"} for seed in (1, 2)]
    cells += [{"bytes": short(3), "path": "/somewhere/else/../b.mp3"}, {"bytes": short(4), "path": None}]
    members = [{"audio": cell, "caption": f"{n} {i}"} for n, cell in enumerate(cells) for i in range(2)]
    files = {"train.parquet": members, "test.parquet": [{"audio": row(n)["audio"], "caption": f"test {n}"} for n in (8, 9)]}
    pack(write_hub(tmp_path / "sounds", files, features), None, tmp_path / "out")
    train = packed_clips(tmp_path / "out/mine")["train"]
    assert {tuple(label.values()) for _, label in train.values()} == {(f"{n} 0", f"{n} 1") for n in range(4)}
    assert {data for data, _ in train.values()} == {short(seed) for seed in range(1, 5)}
    named = {key.partition("-")[0] for key in train}
    assert len(train) == 4
    assert {"train/a", "train/b"} < named


def test_an_unlabelled_clip_and_audio_that_is_none_are_left_out_by_name(tmp_path: Path) -> None:
    members = [*rows(0, 30), row(50, -1), {"audio": {"bytes": b"no audio", "path": "x.wav"}, "label": 1}]
    packed = pack(write_hub(tmp_path / "sounds", {"all.parquet": members}, FEATURES), None, None)
    assert [drop.key for drop in packed.dropped] == ["50.wav", "x.wav"]
    assert packed.dropped[0].reason == "it has no label (all.parquet row 31)"


def test_audio_beside_the_files_is_read_and_none_from_outside(tmp_path: Path) -> None:
    root = tmp_path / "sounds"
    names = [f"clips/{seed}.wav" for seed in range(12)]
    write_files(root / "data", {name: short(seed) for seed, name in enumerate(names)})
    write_files(tmp_path, {"secret.wav": short(99)})
    members = [{"audio": {"bytes": None, "path": name}, "label": seed % 2} for seed, name in enumerate(names)]
    write_hub(root, {"data/train.parquet": members}, FEATURES)
    packed = pack(root, None, tmp_path / "out")
    assert sum(part.clips for part in packed.parts.values()) == 12
    for outside in ("../secret.wav", "../../secret.wav", str(tmp_path / "secret.wav"), "link.wav"):
        (root / "link.wav").unlink(missing_ok=True)
        (root / "link.wav").symlink_to(tmp_path / "secret.wav")
        write_hub(
            root, {"data/train.parquet": [*members, {"audio": {"bytes": None, "path": outside}, "label": 1}]}, FEATURES
        )
        with pytest.raises(UsageError, match=r"row 13 names '.*', which lies outside"):
            pack(root, None, None)
    write_hub(root, {"data/train.parquet": [*members, {"audio": {"bytes": None, "path": "none.wav"}, "label": 1}]}, FEATURES)
    with pytest.raises(DataMissingError, match=r"1 of 13 files are not in .*none\.wav"):
        pack(root, None, None)


def test_a_copy_in_train_and_test_is_a_leak(tmp_path: Path) -> None:
    files = {"train.parquet": rows(0), "test.parquet": [*rows(100), row(0)]}
    write_hub(tmp_path / "sounds", files, FEATURES)
    with pytest.raises(DataError, match=r"the test would contain training clips: .*test/0\.wav \(test\)"):
        pack(tmp_path / "sounds", None, None)
    assert len(pack(tmp_path / "sounds", None, None, leaks="drop").dropped) == 1


# ---------------------------------------------------------------- refusals, and files that mean harm


def test_what_is_no_data_set_of_audio_is_refused_with_what_to_do(tmp_path: Path) -> None:
    def refused(message: str, error: type[Exception] = UsageError) -> None:
        with pytest.raises(error, match=message):
            pack(tmp_path / "sounds", None, None)
        for path in sorted((tmp_path / "sounds").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    write_hub(tmp_path / "sounds", {"en/train.parquet": rows(0), "fr/train.parquet": rows(9)}, FEATURES)
    refused(r"holds several data sets, such as in .*en and .*fr; name one of these folders")
    write_hub(tmp_path / "sounds", {"labels.parquet": [{"label": 1}]}, {"label": classes("a", "b")})
    refused(r"has no column of audio; it has 'label'. If it is a table of labels, name it after the folder")
    table = pyarrow.table({"audio": [{"array": [0.0], "sampling_rate": 16000}], "label": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "sounds/train.parquet")
    refused(r"column 'audio' of train\.parquet holds struct<array.*save the data set with it cast to Audio\(\)")
    features = {"first": AUDIO, "second": AUDIO, "label": values("string")}
    write_hub(tmp_path / "sounds", {"train.parquet": []}, features)
    refused(r"several columns of audio, 'first' and 'second'; leave one in it")
    saved = write_saved(tmp_path / "sounds", [rows(0)], FEATURES)
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    refused(r"saved with an indices mapping; save it again after Dataset\.flatten_indices\(\)", DataError)
    (saved / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": "../other.arrow"}]}))
    refused(r"names a file that lies elsewhere", DataError)
    write_hub(tmp_path / "sounds", {"train.parquet": rows(0)}, FEATURES)
    write_hub(tmp_path / "sounds", {"validation.parquet": [{"audio": row(1)["audio"]}]}, {"audio": AUDIO})
    refused(r"validation\.parquet has no column 'label', which train\.parquet has", DataError)


def test_damaged_files_are_errors_with_their_names(tmp_path: Path) -> None:
    """A byte of a small file turned, at many places: an error of ours or clips that still decode, and no crash."""
    whole = write_hub(tmp_path / "sounds", {"train.parquet": rows(0, 6)}, FEATURES) / "train.parquet"
    saved = write_arrow(tmp_path / "saved.arrow", table_of(rows(0, 6), FEATURES))
    random = np.random.default_rng(0)
    errors = 0
    for source, name in ((whole, "train.parquet"), (saved, "train.arrow")):
        data = source.read_bytes()
        metadata = [*range(1500), *range(len(data) - 2500, len(data))]
        cuts = [data[: len(data) // 2], data[:-1], data[:9], b""]
        for damaged in [*cuts, *(_flipped(data, int(place)) for place in random.choice(metadata, 60))]:
            folder = write_files(tmp_path / "damaged", {name: damaged})
            with suppress(UsageError, DataError):
                pack(folder, None, None)
                continue
            errors += 1
        (tmp_path / "damaged" / name).unlink()
    assert errors > 20


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def test_a_value_that_many_rows_name_is_in_memory_once(tmp_path: Path) -> None:
    """A file of a few kB, whose dictionary holds 1 MB once and names it in 40 rows."""
    cells = pyarrow.array([{"bytes": bytes(1_000_000), "path": f"{n}.wav"} for n in range(40)], AUDIO_TYPE)
    (tmp_path / "sounds").mkdir()
    table = pyarrow.table({"audio": cells, "label": ["x"] * 40})
    pyarrow.parquet.write_table(table, tmp_path / "sounds/train.parquet", compression="zstd")
    assert (tmp_path / "sounds/train.parquet").stat().st_size < 10_000
    del cells, table
    before, most = pyarrow.total_allocated_bytes(), 0
    with ParquetRows(tmp_path / "sounds/train.parquet") as file:
        for cells in file.rows():
            assert len(cells["audio"]["bytes"]) == 1_000_000
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 1e6 < most < 5e6  # the page, the dictionary and a row
    with pytest.raises(DataError, match="40 of 40 clips cannot be used"):
        pack(tmp_path / "sounds", None, None)


def test_compressed_batches_and_dictionaries_are_refused_before_they_are_read(tmp_path: Path) -> None:
    table = table_of(rows(0, 6), FEATURES)
    (tmp_path / "sounds").mkdir()
    write_arrow(tmp_path / "sounds/train.arrow", table, compression="zstd")
    with pytest.raises(DataError, match="has dictionaries or compressed batches, which are not read; save it as parquet"):
        pack(tmp_path / "sounds", None, None)
    coded = table.append_column("word", pyarrow.array(["x"] * 6).dictionary_encode())
    write_arrow(tmp_path / "sounds/train.arrow", coded)
    with pytest.raises(DataError, match="has dictionaries or compressed batches"):
        pack(tmp_path / "sounds", None, None)


def test_a_file_that_changes_while_it_is_packed_is_an_error(tmp_path: Path) -> None:
    write_hub(tmp_path / "sounds", {"train.parquet": rows(0), "test.parquet": rows(10)}, FEATURES)

    def change(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.done) == ("inspect", event.total):
            (tmp_path / "sounds/test.parquet").unlink()
            write_hub(tmp_path / "sounds", {"test.parquet": rows(50)}, FEATURES)

    with pytest.raises(DataError, match=r"test\.parquet row \d+ changed while this ran; run again"):
        pack(tmp_path / "sounds", None, tmp_path / "out", observer=change)


def test_an_arrow_file_with_a_footer_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    table = table_of(rows(0, 12), FEATURES)
    sink = pyarrow.OSFile(str(tmp_path / "sounds/train.arrow"), "wb")
    with sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, 5)
    assert sum(part.clips for part in pack(tmp_path / "sounds", None, None).parts.values()) == 12
