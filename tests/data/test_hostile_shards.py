"""Hostile shards, at the public door: healthy neighbours are scored, every loss is named, nothing is unpickled, no shell
runs, nothing is written outside, and memory stays bounded."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from corpus import CLASSES, RATE, tones, write_encoder, write_task, write_tones
from shard_makers import clip_members, encoded, member, noise, write_shard, write_tar

from xares_onnx.data.audio import MAX_SECONDS
from xares_onnx.data.shards import index_shard
from xares_onnx.evaluation.evaluation import Evaluation, evaluate

pytestmark = pytest.mark.usefixtures("shared_process")

Member = tuple[tarfile.TarInfo, bytes]
LABEL = {"label": CLASSES[0]}
HEALTHY = 8  # test clips beside the hostile ones


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def wav(samples: Any, rate: int = RATE, **how: Any) -> bytes:
    return encoded(np.asarray(samples), rate, **how)


def healthy() -> list[Member]:
    return [
        part for key, (audio, label) in tones(HEALTHY, 5, prefix="good").items() for part in clip_members(key, audio, label)
    ]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a task, and healthy training data."""
    folder = tmp_path_factory.mktemp("ground")
    write_encoder(folder / "model.onnx")
    write_task(folder)
    write_tones(folder / "data", train=12, valid=8, test=8)
    for shard in (folder / "data" / "tones").glob("test-*"):
        shard.unlink()
    return folder


def scored(ground: Path, tmp_path: Path, *shards: Path) -> Evaluation:
    """The evaluation of the task with these test shards, by kNN alone."""
    data = tmp_path / "data" / "tones"
    data.mkdir(parents=True, exist_ok=True)
    for shard in (*(ground / "data" / "tones").iterdir(), *shards):
        if not (data / shard.name).exists():
            os.link(shard, data / shard.name)
    return evaluate(
        ground / "model.onnx",
        [str(ground / "tones.toml")],
        data=tmp_path / "data",
        cache=tmp_path / "cache",
        methods=["knn"],
        allow_drops=True,
        threads=2,
        device="cpu",
    )


def losses(done: Evaluation, read: int) -> dict[str, str]:
    """Test clips that were dropped, by key, of a task that has a score all the same."""
    (task,) = done.result.tasks
    assert (task.status, done.errors) == ("ok", [])
    assert task.clips.expected == task.clips.read + len(task.clips.dropped)
    assert task.n_test == read
    return {drop.key.partition("/")[2]: drop.reason for drop in task.clips.dropped}


def nan_at(value: float) -> bytes:
    samples = np.zeros(RATE, np.float32)
    samples[77] = value
    return wav(samples, subtype="FLOAT")


def flac_of_hours(hours: float) -> bytes:
    """Silence, which flac writes in a few bytes a block: 10 h are 2 MB."""
    file = io.BytesIO()
    import soundfile

    with soundfile.SoundFile(file, "w", 8_000, 1, "PCM_16", format="FLAC") as flac:
        block = np.zeros(8_000 * 600, np.int16)
        for _ in range(round(hours * 6)):
            flac.write(block)
    return file.getvalue()


def read() -> dict[str, bytes]:
    """Odd, but clips."""
    return {
        "six channels": wav(np.stack([noise(1)] * 6, axis=1)),
        "192 kHz": wav(noise(1, rate=192_000), 192_000),
        "ten minutes": wav(noise(600, rate=8_000), 8_000),
        "ten samples": wav(noise(1)[:10]),
        "../../up": wav(noise(1)),
        "/absolute": wav(noise(1)),
        "a/../../../b": wav(noise(1)),
        "pipe:touch sprung|": wav(noise(1)),
        "|touch sprung": wav(noise(1)),
        "$(touch sprung)`touch sprung`;touch sprung": wav(noise(1)),
        "-rf *": wav(noise(1)),
    }


def dropped() -> dict[str, tuple[bytes, str]]:
    """What cannot be read, and why."""
    return {
        "NaN": (nan_at(np.nan), "NaN or infinite"),
        "Inf": (nan_at(np.inf), "NaN or infinite"),
        "empty": (wav(np.empty(0)), "holds no samples"),
        "no bytes": (b"", "audio cannot be decoded"),
        "text": (b"<html>404</html>" * 50, "audio cannot be decoded"),
        "cut flac": (encoded(noise(1), container="FLAC")[:5_000], "audio cannot be decoded"),
        "three hours": (flac_of_hours(3), f"longer than {MAX_SECONDS // 60} minutes"),
    }


def test_hostile_audio_and_names_are_named_drops(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.chdir(room)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    odd, spoilt = read(), dropped()
    clips = {
        **{key: (audio, LABEL) for key, audio in odd.items()},
        **{key: (data, LABEL) for key, (data, _) in spoilt.items()},
    }
    parts = [
        *(part for key, (audio, label) in clips.items() for part in clip_members(key, audio, label)),
        *(member(f"good-000.{kind}", trap) for kind in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "cls", "ten")),
        *clip_members("pickled", trap, LABEL),
        member("pickled json.wav", wav(noise(1))),
        member("pickled json.json", trap),
        *healthy(),
    ]
    done = scored(ground, tmp_path, write_tar(tmp_path / "test-0.tar", parts))
    lost = losses(done, HEALTHY + len(odd))
    reasons = {
        **{key: reason for key, (_, reason) in spoilt.items()},
        "pickled": "audio cannot be decoded",
        "pickled json": "its json cannot be read",
    }
    assert set(lost) == set(reasons)
    for key, reason in reasons.items():
        assert reason in lost[key], key
    assert not list(room.iterdir())
    assert not list(tmp_path.rglob("sprung"))
    pickle.loads(trap)  # the trap would have worked
    assert (tmp_path / "sprung").exists()


def test_hostile_members_and_labels_are_named_drops(ground: Path, tmp_path: Path) -> None:
    audio = wav(noise(1))

    def labelled(key: str, data: bytes) -> list[Member]:
        return [member(f"{key}.wav", audio), member(f"{key}.json", data)]

    link = {"type": tarfile.SYMTYPE, "linkname": str(tmp_path / "secret.wav")}
    (tmp_path / "secret.wav").write_bytes(audio)
    parts = [
        member("linked.wav", **link),
        member("linked.json", b'{"label": "low"}'),
        member("hard.wav", type=tarfile.LNKTYPE, linkname="good-000.wav"),
        member("hard.json", b'{"label": "low"}'),
        member("label outside.wav", audio),
        member("label outside.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("a pipe.wav", type=tarfile.FIFOTYPE),
        member("a pipe.json", b'{"label": "low"}'),
        *labelled("not json", b"{'label': 'low'}"),
        *labelled("a list", b"[1]"),
        *labelled("a number", b"7"),
        *labelled("no label", b"{}"),
        *labelled("NaN label", b'{"label": NaN}'),
        *labelled("another label", b'{"label": "\\u001b[2J"}'),
        *labelled("deep", b"[" * 200_000 + b"]" * 200_000),
        *labelled("100 MB", b" " * (100 << 20)),
        *labelled("twice the key", b'{"label": "top", "label": "low"}'),
        *clip_members("twin", audio, LABEL),
        *clip_members("twin", audio, LABEL),
        *labelled("n" * 5_000, b'{"label": "low"}'),
        *labelled("new\nline", b"{"),
        *labelled("caf\udce9", b"{"),
        member("alone.wav", audio),
        member("alone too.json", b"{}"),
        *healthy(),
    ]
    shard = write_tar(tmp_path / "test-0.tar", parts, format=tarfile.GNU_FORMAT)
    lost = losses(scored(ground, tmp_path, shard), HEALTHY + 2)  # the first twin, and the key that is there twice
    assert lost == {
        **dict.fromkeys(("linked", "hard", "label outside", "a pipe"), "a link or a special file"),
        "not json": lost["not json"],
        "a list": lost["a list"],
        "a number": "its json is neither an object nor a list",
        "no label": lost["no label"],
        "NaN label": lost["NaN label"],
        "another label": lost["another label"],
        "deep": lost["deep"],
        "100 MB": "larger than any plausible clip",
        "twin": "a second clip with the same key",
        "n" * 80 + "…": "its name is longer than 1000 characters",
        "new\\nline": lost["new\\nline"],
        "caf\\udce9": lost["caf\\udce9"],
        "alone": "no json beside its audio",
        "alone too": "no audio beside its json",
    }
    assert all(reason.isprintable() and len(reason) < 300 for reason in lost.values())


# ---------------------------------------------------------------- tars that are bombs


def pax_bomb(path: Path) -> None:
    """An extended header that claims, and has, 600 MB, most of them a hole in the file."""
    header = tarfile.TarInfo("bomb")
    header.type, header.size = tarfile.XHDTYPE, 600 << 20
    with path.open("ab") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(file.tell() + header.size + 1024)


def long_name_bomb(path: Path) -> None:
    header = tarfile.TarInfo("bomb")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 600 << 20
    with path.open("ab") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + header.size + 1024)


def sparse_map_bomb(path: Path) -> None:
    """A sparse member whose map has no end: read in steps of 512 bytes, each of which copies all before it."""
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "sparse.wav", "GNU.sparse.realsize": "9"}
    info = tarfile.TarInfo("sparse.wav")
    info.size, info.pax_headers = 256 << 20, pax
    with path.open("ab") as file:
        file.write(info.tobuf(tarfile.PAX_FORMAT))
        start = file.tell()
        file.write(b"1" * 600)
        file.truncate(start + info.size)
        file.seek(0, os.SEEK_END)
        file.write(bytes(1024))


def declared_terabyte(path: Path) -> None:
    header = tarfile.TarInfo("vast.wav")
    header.size = 1 << 40
    with path.open("ab") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with path.open("ab") as file:
        file.write(tarfile.TarInfo("torn.wav").tobuf(tarfile.USTAR_FORMAT)[:300])


ENDINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a header of 600 MB": (pax_bomb, "the tar is damaged (a header of 629145600 bytes)"),
    "a name of 600 MB": (long_name_bomb, "the tar is damaged (a header of 629145600 bytes)"),
    "a member of 1 TB": (declared_terabyte, "the shard ends inside member 'vast.wav'"),
    "a torn end": (cut, "the tar"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_bomb_at_the_end_of_a_tar_costs_no_memory(name: str, ground: Path, tmp_path: Path) -> None:
    spring, says = ENDINGS[name]
    shard = write_tar(tmp_path / "test-0.tar", healthy())
    data = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(data + bytes(-len(data) % 512))
    spring(shard)
    before = psutil.Process().memory_info().rss
    done = scored(ground, tmp_path, shard)
    assert psutil.Process().memory_info().rss < before + (200 << 20)
    lost = losses(done, HEALTHY)
    assert lost == ({"vast": "the shard ends inside it"} if name == "a member of 1 TB" else {})
    (note,) = [note for note in done.result.tasks[0].notes if "test-0.tar" in note]
    assert says in note
    assert not done.result.tasks[0].comparable


def test_a_sparse_member_with_an_endless_map_is_one_drop(ground: Path, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "test-0.tar", healthy())
    data = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(data + bytes(-len(data) % 512))
    sparse_map_bomb(shard)
    index = index_shard(shard)
    assert [(drop.key, drop.reason) for drop in index.drops] == [("sparse", "a link or a special file")]
    assert len(index.samples) == HEALTHY


def test_a_shard_that_is_packed_or_no_tar_beside_a_healthy_one(ground: Path, tmp_path: Path) -> None:
    import gzip

    good = write_tar(tmp_path / "test-0.tar", healthy())
    packed, random_bytes = tmp_path / "test-1.tar", tmp_path / "test-2.tar"
    packed.write_bytes(gzip.compress(good.read_bytes()))
    random_bytes.write_bytes(np.random.default_rng(0).bytes(100_000))
    (tmp_path / "data" / "tones").mkdir(parents=True)
    os.mkfifo(tmp_path / "data" / "tones" / "test-3.tar")
    done = scored(ground, tmp_path, good, packed, random_bytes)
    assert losses(done, HEALTHY) == {}
    damage = [note for note in done.result.tasks[0].notes if "not a plain tar file" in note]
    assert [note.partition(":")[0] for note in damage] == ["test-1.tar", "test-2.tar"]


def test_recordings_too_long_to_be_decoded_together(ground: Path, tmp_path: Path) -> None:
    """Of 100 minutes and of 20; many at a time would take more memory than a worker has."""
    clips = {f"{minutes} minutes": (flac_of_hours(minutes / 60), LABEL) for minutes in (100, 20)}
    assert all(len(flac) < 1 << 20 for flac, _ in clips.values())
    shard = write_shard(tmp_path / "test-0.tar", {**clips, **tones(HEALTHY, 5, prefix="good")})
    assert losses(scored(ground, tmp_path, shard), HEALTHY + 2) == {}


def test_a_wav_that_claims_more_than_it_holds(ground: Path, tmp_path: Path) -> None:
    lying = bytearray(wav(noise(1)))
    lying[40:44] = struct.pack("<I", 0xFFFF_FFF0)
    shard = write_shard(tmp_path / "test-0.tar", {"lying": (bytes(lying), LABEL), **tones(HEALTHY, 5, prefix="good")})
    assert losses(scored(ground, tmp_path, shard), HEALTHY + 1) == {}
