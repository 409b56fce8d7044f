"""What can be wrong with a table, its audio, its splits or the output: a sentence, and the exit code of its kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_world import run, said
from pack_makers import Rows, short, tree, write_files, write_table
from shard_makers import encoded, sine, small_disk

from xares_onnx.errors import DataError, UsageError
from xares_onnx.packing import pack
from xares_onnx.packing.tables import open_table


def refused(*arguments: str) -> tuple[int, str]:
    code, out, err = run("pack", *arguments, "--quiet")
    assert out == ""
    return code, said(err)


def refuse(folder: Path, table: Path, *options: str) -> tuple[int, str]:
    """Code and sentence; nothing is left in the output."""
    found = refused(str(folder), str(table), "-o", str(folder.parent / "out"), *options)
    assert not (folder.parent / "out").exists() or not list((folder.parent / "out").iterdir())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten clips: 0.wav to 9.wav."""
    return write_files(tmp_path / "audio", {f"{i}.wav": short(i) for i in range(10)})


def rows_of(count: int = 10, **columns: Any) -> Rows:
    """Rows of the clips, with columns that are functions of a clip's number."""
    given = {"label": lambda i: "ab"[i % 2], **columns}
    return [{"path": f"{i}.wav", **{name: make(i) for name, make in given.items()}} for i in range(count)]


def table_of(folder: Path, text: str, name: str = "labels.csv") -> Path:
    path = folder.parent / name
    path.write_bytes(text.encode("latin-1"))
    return path


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("text", "name", "code", "sentence"),
    [
        (
            "file name,label\n0.wav,a\n",
            "labels.csv",
            2,
            "labels.csv has no column 'path' with the files' names; it has 'file name', 'label'",
        ),
        (
            "path,lable\n0.wav,a\n",
            "labels.csv",
            2,
            "no column with labels: label, labels, events, transcript, score or caption",
        ),
        ("path,lable\n0.wav,a\n", "labels.csv", 2, "did you mean 'lable'?"),
        ("path,label,score\n0.wav,a,1\n", "labels.csv", 2, "several columns of labels; choose one: --target label or score"),
        ("path,label,label\n0.wav,a,b\n", "labels.csv", 2, "has two columns 'label'; rename one"),
        ("path;label\n0.wav;a\n", "labels.csv", 2, "seem to be separated by ';'; separate them by commas"),
        ("path,label\n0.wav,a\n", "labels.tsv", 2, "seem to be separated by ','; separate them by tabs, or name it .csv"),
        ("path,label,split,fold\n0.wav,a,train,1\n", "labels.csv", 2, "has a column split and a column fold; leave one out"),
        (
            "path,label,split\n0.wav,a,trian\n",
            "labels.csv",
            2,
            "labels.csv line 2 names the split 'trian', which is not one of",
        ),
        ("path,label,split\n0.wav,a,trian\n", "labels.csv", 2, "did you mean 'train'"),
        ("path,label,split\n0.wav,a,\n", "labels.csv", 2, "labels.csv line 2 names no split in its column 'split'"),
        ("path,label\n,a\n", "labels.csv", 2, "labels.csv line 2 names no file in its column 'path'"),
        (
            "path,label\n0.wav,Speech, adult\n",
            "labels.csv",
            4,
            "line 2 has 3 cells, its first line 2; a cell that holds a comma must stand",
        ),
        ("path,label\n\n0.wav\n", "labels.csv", 4, "labels.csv line 3 has 1 cells, its first line 2"),
        ('path,label\n0.wav,"a\n', "labels.csv", 4, "labels.csv line 2 cannot be read (unexpected end of data)"),
        ("path,label\n0.wav,\xe4\n", "labels.csv", 4, "is not UTF-8"),
        ("", "labels.csv", 4, "labels.csv is empty"),
        ("path,label\n", "labels.csv", 4, "labels.csv has no rows, so there is nothing to pack"),
        ("path,label\n0.wav,a\n", "labels.xlsx", 2, "must be csv, tsv, jsonl, parquet by its name"),
        ('{"path": "0.wav", "label": "a"}\n{"path"\n', "labels.jsonl", 4, "labels.jsonl line 2 is not json"),
        ('{"path": "0.wav", "label": "a"}\n[1]\n', "labels.jsonl", 4, "labels.jsonl line 2 is not an object"),
        ("[" * 100_000, "labels.jsonl", 4, "labels.jsonl line 1 is not json"),
        ("PAR1 not really", "labels.parquet", 4, "is not a readable parquet file"),
        (
            "path,label\n0.wav,a\n0.wav,b\n",
            "labels.csv",
            4,
            "'0.wav' is 'a' in labels.csv line 2 and 'b' in labels.csv line 3; a clip has one class",
        ),
        (
            "path,label,split\n0.wav,a,train\n./0.wav,a,test\n",
            "labels.csv",
            4,
            "line 3 says split or fold 'test' of '0.wav', labels.csv line 2 says 'train'",
        ),
        ("path,label\n0.wav,a\n1.wav,a\n", "labels.csv", 4, "every clip is of class 'a': there is nothing to tell apart"),
        ("path,labels\n0.wav,\n1.wav,\n", "labels.csv", 4, "no clip has any tags"),
        ("path,score\n0.wav,1\n1.wav,1\n", "labels.csv", 4, "every score is 1"),
        (
            "path,start,end,label\n0.wav,500,900,a\n1.wav,20,30,a\n",
            "labels.csv",
            4,
            "all 2 events begin after their clips have ended; give times in seconds",
        ),
        (
            "path,score\n0.wav,1\n1.wav,high\n2.wav,\n3.wav,nan\n",
            "labels.csv",
            4,
            "3 of 4 clips cannot be used, the first 1.wav (labels.csv line 3): its score 'high' is not a number",
        ),
        ('path,events\n0.wav,"[{"\n1.wav,7\n2.wav,[7]\n', "labels.csv", 4, "its events are not json"),
        (
            "path,onset,offset,label\n0.wav,2,1,a\n1.wav,1,,a\n2.wav,0,1,\n",
            "labels.csv",
            4,
            "an event 'a' ends before it starts",
        ),
        ("path,transcript\n0.wav,.\n1.wav,\n2.wav,?\n", "labels.csv", 4, "its transcript transcript is empty"),
        (
            "path,label\n0.wav,\n1.wav,a\n2.wav,\n3.wav,\n4.wav,b\n",
            "labels.csv",
            4,
            "3 of 5 clips cannot be used, the first 0.wav (labels.csv line 2): it has no label",
        ),
    ],
)
def test_a_table_that_cannot_be_used(folder: Path, text: str, name: str, code: int, sentence: str) -> None:
    found = refuse(folder, table_of(folder, text, name))
    assert found[0] == code
    assert sentence in found[1]


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    assert refuse(folder, tmp_path / "no.csv") == (4, f"table {tmp_path}/no.csv does not exist")
    table = write_table(tmp_path / "labels.csv", rows_of())
    assert refuse(tmp_path / "no", table) == (4, f"audio folder {tmp_path}/no does not exist")
    assert refused(str(folder), str(table)) == (2, "name the output folder with -o DIR, or only check with --check")
    (tmp_path / "empty").mkdir()
    assert refused(str(tmp_path / "empty"), "--check")[0] == 4


def test_parquet_without_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, sentence = refuse(folder, table_of(folder, "", "labels.parquet"))
    assert (code, "pip install 'xares-onnx[parquet]'" in sentence) == (2, True)


def test_a_line_without_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xares_onnx.packing.tables.MAX_LINE_BYTES", 1000)
    code, sentence = refuse(folder, table_of(folder, '{"path": "' + "x" * 2000, "labels.jsonl"))
    assert (code, "line 1 is longer than" in sentence) == (4, True)
    code, sentence = refuse(folder, table_of(folder, "path,label\n0.wav," + "x" * 2000))
    assert (code, "line 2 cannot be read (field larger than field limit (1000))" in sentence) == (4, True)


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "name", ["../secret.wav", "a/../../secret.wav", "/etc/hostname", "link.wav", "linked/secret.wav", "zero\0.wav"]
)
def test_a_path_that_leads_out_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    write_files(tmp_path, {"secret.wav": short(0)})
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "linked").symlink_to(tmp_path)
    table = write_table(tmp_path / "labels.jsonl", [*rows_of(), {"path": name, "label": "a"}])
    code, sentence = refuse(folder, table)
    assert code == 2
    assert sentence.startswith("labels.jsonl line 11 names ")
    assert "lies outside" in sentence or "which cannot exist" in sentence


def test_a_path_may_be_absolute_or_a_link_within(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    (folder / "link.wav").symlink_to(folder / "9.wav")
    rows = rows_of(9)
    rows[0]["path"] = str(tmp_path / "alias/0.wav")
    rows.append({"path": "link.wav", "label": "b"})
    done = pack(tmp_path / "alias", write_table(tmp_path / "labels.csv", rows), None)
    assert sum(part.clips for part in done.parts.values()) == 10


def test_missing_files_are_named_with_their_lines(folder: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "labels.csv", rows_of(15))
    code, sentence = refuse(folder, table)
    assert code == 4
    named = "10.wav (line 12), 11.wav (line 13), 12.wav (line 14) and 2 more"
    assert sentence.startswith(
        f"5 of 15 files are not in {folder}: {named}; put them there, or leave them out by --allow-drops"
    )
    done = pack(folder, table, tmp_path / "out", allow_drops=True)
    assert [drop.key for drop in done.dropped] == [f"{i}.wav" for i in range(10, 15)]
    assert done.dropped[0].reason == "there is no such file (labels.csv line 12)"


# ---------------------------------------------------------------- audio

NAN = encoded(np.full(100, np.nan), subtype="FLOAT")
UNUSABLE = {
    "noise.wav": (b"no audio at all", "audio cannot be decoded"),
    "zero.wav": (b"", "audio cannot be decoded"),
    "silent.wav": (encoded(np.zeros(0)), "audio holds no samples"),
    "nan.wav": (NAN, "audio holds NaN or infinite samples"),
    "cut.flac": (encoded(sine(440, 1), container="FLAC")[:3000], ""),
    "phone.m4a": (b"", "m4a audio is not supported; convert it, as by `ffmpeg -i phone.m4a phone.flac`"),
    "notes.txt": (b"", "this kind of file is not supported"),
    "folder.wav": (None, "it is not a regular file"),
    "pipe.wav": (None, "it is not a regular file"),
}


def test_unusable_audio_is_left_out_by_name_and_too_much_of_it_is_an_error(folder: Path, tmp_path: Path) -> None:
    write_files(folder, {name: data for name, (data, _) in UNUSABLE.items() if data is not None})
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    rows = [*rows_of(), *({"path": name, "label": "a"} for name in UNUSABLE)]
    table = write_table(tmp_path / "labels.csv", rows)
    code, sentence = refuse(folder, table)
    assert code == 4
    assert sentence.startswith(f"{len(UNUSABLE)} of 19 clips cannot be used, the first noise.wav (labels.csv line 12): ")
    assert sentence.endswith("; repair them, or leave them out by --allow-drops")
    code, out, _ = run("pack", str(folder), str(table), "-o", str(tmp_path / "out"), "--allow-drops")
    assert code == 0
    assert "left out: noise.wav: audio cannot be decoded" in out
    assert "left out: 4 more, all named in packed.json" in out
    for name, (_, why) in UNUSABLE.items():
        assert why in next(drop.reason for drop in pack(folder, table, None, allow_drops=True).dropped if drop.key == name)


def test_a_few_unusable_clips_are_reported_and_no_error(folder: Path, tmp_path: Path) -> None:
    write_files(folder, {"bad.wav": b"", "worse.wav": b""})
    rows = [*rows_of(), {"path": "bad.wav", "label": "a"}, {"path": "worse.wav", "label": "never else"}]
    done = pack(folder, write_table(tmp_path / "labels.csv", rows), None)
    assert [drop.key for drop in done.dropped] == ["bad.wav", "worse.wav"]
    assert done.task.target.class_names == ("a", "b")  # a class that no usable clip has is none


def test_no_usable_clip(folder: Path, tmp_path: Path) -> None:
    write_files(folder, {f"{i}.wav": b"" for i in range(2)})
    code, sentence = refuse(folder, write_table(tmp_path / "labels.csv", rows_of(2)), "--allow-drops")
    assert (code, sentence.startswith("2 of 2 clips cannot be used, the first 0.wav")) == (4, True)


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("count", "columns", "sentence"),
    [
        (1, {"score": lambda i: i, "label": None}, "every score is 0"),
        (1, {"transcript": lambda i: "a", "label": None}, "there is only one clip"),
        (2, {}, "no class has clips for both training and test"),
        (1, {}, "every clip is of class 'a'"),
        (8, {"group": lambda i: "one"}, "all 8 clips belong together"),
        (8, {"split": lambda i: ("train", "valid")[i % 2]}, "no clip is in the split test, only in train, valid"),
        (8, {"split": lambda i: "test"}, "no clip is in the split train, only in test"),
        (8, {"fold": lambda i: 3}, "every clip is in fold '3'"),
        (
            8,
            {"split": lambda i: "train" if i < 7 else "test", "label": lambda i: "aaabbbbc"[i]},
            "class 'c' is tested in test but has no training clip",
        ),
        (
            8,
            {"fold": lambda i: i // 4, "label": lambda i: "ababbabc"[i]},
            "class 'c' is tested in fold 1 but has no training clip",
        ),
        (
            8,
            {"split": lambda i: "train" if i < 7 else "test", "label": lambda i: "aaaaaaaa"[i]},
            "every clip is of class 'a'",
        ),
        (
            8,
            {"split": lambda i: "train" if i < 7 else "test", "label": None, "labels": lambda i: "a;" if i < 7 else ""},
            "no clip of test has any tags",
        ),
        (
            8,
            {"split": lambda i: "train" if i < 7 else "test", "label": None, "caption": lambda i: "a dog"},
            "captions need two test clips or more",
        ),
    ],
)
def test_splits_that_would_give_no_score(folder: Path, tmp_path: Path, count: int, columns: Any, sentence: str) -> None:
    given = {"label": lambda i: "ab"[i % 2], **columns}
    rows = [{"path": f"{i}.wav", **{n: make(i) for n, make in given.items() if make}} for i in range(count)]
    code, found = refuse(folder, write_table(tmp_path / "labels.csv", rows))
    assert code == 4
    assert sentence in found


def test_a_recording_in_two_splits_is_refused_dropped_or_kept(folder: Path, tmp_path: Path) -> None:
    """Even as another file: what is heard is compared."""
    signal = np.round(sine(440, 0.1) * 2**15) / 2**15
    copies = {
        "copy.wav": encoded(signal, subtype="PCM_16"),
        "copy.flac": encoded(signal, container="FLAC", subtype="PCM_16"),
    }
    write_files(folder, copies)
    rows = rows_of(split=lambda i: ("train", "valid", "test")[i % 3], label=lambda i: "ab"[i // 3 % 2])
    rows += [{"path": "copy.wav", "split": "train", "label": "a"}, {"path": "copy.flac", "split": "test", "label": "b"}]
    table = write_table(tmp_path / "labels.csv", rows)
    code, sentence = refuse(folder, table)
    assert code == 4
    assert "the test would contain training clips: 1 recording in several parts of 'split'" in sentence
    assert "such as copy.flac (test) and copy.wav (train)" in sentence
    kept = pack(folder, table, None, leaks="keep")
    assert sum(part.clips for part in kept.parts.values()) == 12
    assert any("1 recording in several parts" in note for note in kept.notes)
    assert "1 of the recordings have more than one label, such as copy.flac and copy.wav" in kept.notes
    dropped = pack(folder, table, None, leaks="drop")
    assert [drop.key for drop in dropped.dropped] == ["copy.wav"]
    assert dropped.parts["test"].clips == kept.parts["test"].clips


def test_copies_in_folds_are_kept_in_the_first(folder: Path, tmp_path: Path) -> None:
    write_files(folder, {"copy.wav": (folder / "1.wav").read_bytes()})
    rows = [*rows_of(fold=lambda i: 1 + i // 4 % 2), {"path": "copy.wav", "label": "b", "fold": 2}]
    table = write_table(tmp_path / "labels.csv", rows)
    assert refuse(folder, table)[0] == 4
    assert [drop.key for drop in pack(folder, table, None, leaks="drop").dropped] == ["copy.wav"]


def test_a_group_in_two_splits_of_the_table_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = rows_of(split=lambda i: "train" if i < 6 else "test", speaker=lambda i: f"s{i // 4}" if i else "")
    table = write_table(tmp_path / "labels.csv", rows)
    for leaks in ("refuse", "drop"):
        code, sentence = refuse(folder, table, "--group", "speaker", "--leaks", leaks)
        assert code == 4
        assert "1 group in several parts of 'split', such as that of 4.wav (train) and 6.wav (test)" in sentence
    assert any("1 group in several parts" in note for note in pack(folder, table, None, group="speaker", leaks="keep").notes)
    assert pack(folder, table, None).parts["test"].clips == 4  # no column was named, so there are no groups


def test_a_repeated_row_is_noted(folder: Path, tmp_path: Path) -> None:
    done = pack(folder, write_table(tmp_path / "labels.csv", [*rows_of(), *rows_of(2)]), None)
    assert "2 rows repeat what another row says about the same clip" in done.notes
    assert sum(part.clips for part in done.parts.values()) == 10


# ---------------------------------------------------------------- the output


def test_files_that_pack_did_not_write_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "labels.csv", rows_of())
    for files in ({"mine/train-000000.tar": b"theirs"}, {"mine.toml": b"theirs"}, {"mine/packed.json": b"{}"}):
        out = write_files(tmp_path / f"out{len(next(iter(files)))}", files)
        before = tree(out)
        code, sentence = refused(str(folder), str(table), "-o", str(out))
        assert code == 2
        assert "choose another --name or -o, or move it" in sentence
        assert tree(out) == before
    assert refused(str(folder), str(table), "-o", str(tmp_path / "a,b"))[0] == 2


def test_a_second_run_replaces_the_first_and_keeps_a_changed_task_file(folder: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "labels.csv", rows_of())
    pack(folder, table, tmp_path / "out")
    first = tree(tmp_path / "out")
    pack(folder, table, tmp_path / "out")
    assert tree(tmp_path / "out") == first
    task_file = tmp_path / "out/mine.toml"
    task_file.write_text(task_file.read_text() + "# mine\n")
    write_files(tmp_path / "out", {".mine.part/index.sqlite": b"of a run that was killed"})
    write_table(table, rows_of(8))
    done = pack(folder, table, tmp_path / "out")
    assert done.notes[-1] == "mine.toml is written anew; the older one is kept as mine.toml.before"
    assert (tmp_path / "out/mine.toml.before").read_text().endswith("# mine\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine", "mine.toml", "mine.toml.before"]
    other = write_table(tmp_path / "other.csv", rows_of())
    with pytest.raises(UsageError, match=r"was packed from labels\.csv and audio"):
        pack(folder, other, tmp_path / "out")
    pack(folder, other, tmp_path / "out", name="other")


def test_a_failure_leaves_what_was_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path / "labels.csv", rows_of())
    pack(folder, table, tmp_path / "out")
    first = tree(tmp_path / "out")
    for replace in ("missing", "other"):
        from xares_onnx.packing import packing

        def spoil(*arguments: Any, replace: str = replace, real: Any = packing._write_shards) -> Any:
            (folder / "5.wav").unlink()
            if replace == "other":
                (folder / "5.wav").write_bytes(b"another size")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(packing, "_write_shards", spoil)
            with pytest.raises(DataError, match=r"5\.wav changed while this ran"):
                pack(folder, table, tmp_path / "out")
        assert tree(tmp_path / "out") == first
        write_files(folder, {"5.wav": short(5)})


def test_a_full_disk(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "audio", {f"{i}.wav": short(i, seconds=4) for i in range(10)})
    table = write_table(tmp_path / "labels.csv", rows_of())
    with small_disk(tmp_path / "small", 600):
        code, sentence = refused(str(folder), str(table), "-o", str(tmp_path / "small"))
        assert (code, "disk is full" in sentence) == (5, True)
        assert list((tmp_path / "small").iterdir()) == []


# ---------------------------------------------------------------- size


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    """The second row of a table is not looked at before the first one is used."""
    for ending in ("csv", "jsonl"):
        path = write_table(tmp_path / f"a.{ending}", [{"path": str(i), "label": "x"} for i in range(5)])
        path.write_text(path.read_text() + ('{"path": \n' if ending == "jsonl" else '"a'))
        rows = open_table(path).rows({"path"})
        assert [next(rows)[1] for _ in range(5)] == [{"path": str(i)} for i in range(5)]
        with pytest.raises(DataError):
            next(rows)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_the_clips(tmp_path: Path) -> None:
    """Four hundred clips with 90 kB of text each take no more than thirty."""
    script = (
        "import sys; from pathlib import Path; from xares_onnx.packing import pack\n"
        "pack(Path(sys.argv[1]), Path(sys.argv[2]), None)\n"
        "assert 'torch' not in sys.modules\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    write_files(tmp_path / "audio", {f"{i}.wav": short(i, 0.002) for i in range(400)})
    text = "words " * 15_000
    peaks = []
    for count in (30, 400):
        table = write_table(tmp_path / f"{count}.jsonl", [{"path": f"{i}.wav", "transcript": text} for i in range(count)])
        command = [sys.executable, "-c", script, str(tmp_path / "audio"), str(table)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 20_000  # kB, of 36 MB of text
