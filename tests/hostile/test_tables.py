"""Tables, tars, results and arrays that are made to cost time or memory: linear, or refused in a sentence."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import escapes
import made_results
import msgspec
import numpy as np
import pytest
from bounds import Outcome, bounded, refused
from pack_makers import short
from shard_makers import clip_members, encoded, noise, write_tar

from xares_onnx.data import audio as audio_module
from xares_onnx.data.recordings import Recording, StoredFile, decode_recording
from xares_onnx.data.shards import MAX_LABEL_BYTES, MAX_SHARD_LABEL_BYTES, index_shard
from xares_onnx.encoder.decoding import Decoder
from xares_onnx.errors import ClipError
from xares_onnx.foreign import ForeignFileError, read_arrays

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")

CLIPS = 12


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    for number in range(CLIPS):
        (folder / f"{number}.wav").write_bytes(short(number))
    return folder


def packed(audio: Path, table: Path, *options: str) -> Outcome:
    return bounded("pack", audio, table, "--check", "--quiet", *options, seconds=60, memory=1 << 30)


def objects(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- pack


def test_a_hundred_thousand_columns(audio: Path, tmp_path: Path) -> None:
    names = ["path", *(f"column{number}" for number in range(100_000))]
    (tmp_path / "wide.csv").write_text(",".join(names) + "\n")
    refused(packed(audio, tmp_path / "wide.csv"), 4, "wide.csv has 100001 columns; leave out those that mean nothing here")


def test_ten_thousand_columns_that_mean_nothing(audio: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text(",".join(f"column{number}" for number in range(9_999)) + "\n")
    refused(packed(audio, tmp_path / "wide.csv"), 2, "has no column 'path' with the files' names")


def test_many_tags_of_a_clip(audio: Path, tmp_path: Path) -> None:
    many = [f"{number:x}" for number in range(60_000)]
    rows = [{"path": f"{number}.wav", "labels": ["a"] if number else many} for number in range(CLIPS)]
    outcome = packed(audio, objects(tmp_path / "tags.jsonl", *rows))
    assert outcome.code == 0


def test_many_classes_of_events(audio: Path, tmp_path: Path) -> None:
    each = 30_000 // CLIPS
    rows: list[dict[str, object]] = [
        {
            "path": f"{clip}.wav",
            "events": [{"start": 0, "end": 0.01, "label": f"{clip}-{event}"} for event in range(each)],
        }
        for clip in range(CLIPS)
    ]
    assert packed(audio, objects(tmp_path / "events.jsonl", *rows)).code == 0


def test_a_label_that_an_evaluation_would_refuse(audio: Path, tmp_path: Path) -> None:
    long = "é" * (MAX_LABEL_BYTES // 6 + 1)  # six characters each in ASCII
    rows: list[dict[str, object]] = [
        {"path": f"{n}.wav", "transcript": "a word" if n else long, "split": ("train", "test")[n % 2]} for n in range(CLIPS)
    ]
    outcome = packed(audio, objects(tmp_path / "long.jsonl", *rows), "--json")
    (drop,) = json.loads(outcome.out)["dropped"]
    assert drop["reason"].startswith("its label is larger than 1 MiB")
    assert (outcome.code, outcome.err) == (0, "")


def test_a_fold_per_clip(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    folder.mkdir()
    sound = short(1)
    for number in range(1_001):
        (folder / f"{number}.wav").write_bytes(sound[:-2] + number.to_bytes(2, "little"))
    rows = "".join(f"{number}.wav,{'ab'[number % 2]},f{number}\n" for number in range(1_001))
    (tmp_path / "folds.csv").write_text(f"path,label,fold\n{rows}")
    refused(packed(folder, tmp_path / "folds.csv"), 4, "names 1001 folds, and each would train a head of its own")


def test_a_quoted_cell_of_16_mb(audio: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.tsv").write_text('path\tlabel\n0.wav\t"' + '""' * ((1 << 23) - 100) + '"\n')
    refused(packed(audio, tmp_path / "wide.tsv"), 4, "")


def test_a_name_that_no_file_has(audio: Path, tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"path,label\n{'x' * 300}.wav,a\n1.wav,b\n")
    refused(packed(audio, tmp_path / "long.csv"), 2, "whose name is longer than any file's")


def test_scores_further_apart_than_a_float_reaches(audio: Path, tmp_path: Path) -> None:
    rows = "".join(f"{number}.wav,{'-' * (number % 2)}1e308\n" for number in range(CLIPS))
    (tmp_path / "far.csv").write_text(f"path,score\n{rows}")
    refused(packed(audio, tmp_path / "far.csv"), 4, "scores from -1e+308 to 1e+308 lie too far apart to compute with")


# ---------------------------------------------------------------- tars


def test_global_headers_cost_nothing(tmp_path: Path) -> None:
    """40,000 keys for all members that follow, which tarfile copies to each: 3,000 members took over two minutes."""
    keys = {f"key{number}": "value" for number in range(40_000)}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers=keys) as tar:
        for number in range(1_500):
            for name, data in ((f"é{number}.wav", b"RIFF"), (f"é{number}.json", b"{}")):  # é: each has a header of its own
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index = index_shard(tmp_path / "a.tar")
    assert len(index.samples) == 1_500
    assert index.damage is None


def test_a_global_header_renames_no_member(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "other", "comment": "x"}
    ) as tar:
        for name in ("one.wav", "one.json"):
            tar.addfile(tarfile.TarInfo(name))
    assert [sample.key for sample in index_shard(tmp_path / "a.tar").samples] == ["one"]


def test_many_global_headers_in_a_row_are_damage(tmp_path: Path) -> None:
    header = tarfile.TarInfo.create_pax_global_header({"comment": "x"})
    (tmp_path / "a.tar").write_bytes(header * 20_000 + bytes(1024))
    assert "damaged" in (index_shard(tmp_path / "a.tar").damage or "") or "not a plain tar" in (
        index_shard(tmp_path / "a.tar").damage or ""
    )


def test_labels_of_a_shard_fit_into_memory(tmp_path: Path) -> None:
    sound = encoded(noise(0.05))
    label = b'{"x":"' + b"y" * (MAX_LABEL_BYTES - 10) + b'"}'
    count = MAX_SHARD_LABEL_BYTES // MAX_LABEL_BYTES + 5
    members = []
    for number in range(count):
        (wav, _), (info, _) = clip_members(f"{number:03}", sound, {})
        info.size = len(label)
        members += [(wav, sound), (info, label)]
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    assert len(index.samples) < count
    assert {drop.reason for drop in index.drops} == {"the labels of its shard are larger than 128 MiB"}
    assert [drop.key for drop in index.drops] == [f"{number:03}" for number in range(len(index.samples), count)]


# ---------------------------------------------------------------- results and arrays


def result(folder: Path, change: Callable[[dict[str, object]], None]) -> Path:
    content = json.loads(msgspec.json.encode(made_results.result([made_results.record("a", 0.5)])))
    change(content)
    (folder / "r.json").write_text(json.dumps(content))
    return folder / "r.json"


def test_a_result_of_many_empty_lists(tmp_path: Path) -> None:
    path = result(tmp_path, lambda content: content.update(environment={"x": [[]] * 1_000_000}))
    outcome = bounded("report", path, seconds=60, memory=1 << 30)
    assert outcome.code == 0


def test_a_result_of_200_mb(tmp_path: Path) -> None:
    with (tmp_path / "r.json").open("wb") as file:
        file.truncate(200 << 20)
    refused(bounded("report", tmp_path / "r.json", seconds=20, memory=1 << 29), 2, "it is larger than 33.5544 MB")


def test_a_result_of_too_many_records(tmp_path: Path) -> None:
    def change(content: dict[str, object]) -> None:
        content["tasks"] = content["tasks"] * 20_001  # type: ignore[operator]

    refused(bounded("report", result(tmp_path, change), seconds=60), 2, "it has 20001 records of tasks")


@pytest.mark.parametrize(("field", "value"), [("weight", -1.0), ("weight", 1e308), ("score", 1.7e308), ("score", -1e300)])
def test_a_result_of_absurd_numbers(field: str, value: float, tmp_path: Path) -> None:
    def change(content: dict[str, object]) -> None:
        content["tasks"][0][field] = value  # type: ignore[index]

    path = result(tmp_path, change)
    refused(bounded("report", path, seconds=20), 2, "it holds an impossible number for a")
    refused(bounded("compare", path, path, seconds=20), 2, "it holds an impossible number for a")


def npy(header: str) -> bytes:
    content = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"key": npy("(" * 5_000)}, "it is no .npz file of plain arrays"),
        ({"key": npy("[" * 5_000 + "]" * 4_000)}, "it is no .npz file of plain arrays"),
        ({"key": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }")}, "it is no .npz file"),
        ({"key": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }")}, "it is no .npz file"),
        ({str(number): b"x" for number in range(1_001)}, "or more than 1000 arrays"),
        ({"key": bytes(2 << 20)}, "it holds more than 1 MiB"),
    ],
    ids=["parentheses", "brackets", "shape", "objects", "many", "zeros"],
)
def test_arrays(members: dict[str, bytes], says: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    with pytest.raises(ForeignFileError, match=says):
        read_arrays(tmp_path / "a.npz", 1 << 20)


def test_plain_arrays_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.array(["a"]))
    assert read_arrays(tmp_path / "a.npz", 1000)["x"].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- audio


def test_a_slow_decoder_costs_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is of the thread that decodes, so that a busy machine drops nothing."""
    monkeypatch.setattr(audio_module, "DECODING_SECONDS", -1.0)
    with pytest.raises(ClipError, match="it takes longer to decode than any plausible clip"):
        audio_module.load(encoded(noise(1.0)), 16_000, nullcontext())
    monkeypatch.setattr(audio_module, "DECODING_SECONDS", 20.0)
    assert len(audio_module.load(encoded(noise(1.0)), 16_000, nullcontext())[0]) == 16_000


def test_large_clips_are_in_memory_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Alone:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *_: object) -> None:
            pass

    long = encoded(noise(40.0), container="WAV")
    audio_module.load(long, 16_000, Alone())
    assert not entered
    monkeypatch.setattr(audio_module, "_LONG_FRAMES", 600_000)
    audio_module.load(long, 16_000, Alone())
    assert entered == [True]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("crash", "the process that decodes audio died (SIGSEGV)"),
        ("end", "the process that decodes audio died (exit code 0)"),
        ("memory", "it needs more memory than there is"),
        ("unreadable", "it cannot be read"),
    ],
)
def test_a_clip_that_ends_its_decoder_costs_no_other(name: str, says: str, tmp_path: Path) -> None:
    names = [*"abc", name, *"defgh"]
    with Decoder([tmp_path]) as decoder:
        outcomes = decoder.each(escapes.decoded, names, escapes.Length, 2)
    assert [outcome for outcome in outcomes if isinstance(outcome, escapes.Length)] == [escapes.Length(1)] * 8
    assert str(outcomes[3]).startswith(says)


def test_a_decoder_reads_what_it_was_given_alone(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio/a.wav").write_bytes(short(1))
    (tmp_path / "b.wav").write_bytes(short(2))
    with Decoder([tmp_path / "audio"]) as decoder:
        inside, outside = decoder.each(
            decode_recording, [StoredFile(tmp_path / "audio/a.wav"), StoredFile(tmp_path / "b.wav")], Recording
        )
    assert isinstance(inside, Recording)
    if decoder.standing and "reading" in decoder.standing:
        assert outside == "it cannot be read (Permission denied)"
