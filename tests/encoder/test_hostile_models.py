"""Hostile models, at the command line's door: each ends with exit code 3 and one sentence, in bounded time and memory, and
no file outside is read; the process that asked lives on."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hostile_models as hostile
import numpy as np
import onnx
import onnx_models as models
import psutil
import pytest
from cli_world import run, said
from corpus import write_encoder, write_task, write_tones
from onnx import ModelProto
from onnx_models import noise, save

from xares_onnx import load_encoder
from xares_onnx.encoder import limits, resolve
from xares_onnx.encoder.model_file import scan_model
from xares_onnx.encoder.spec import EncoderInfo
from xares_onnx.encoder.worker import Tell, Worker
from xares_onnx.errors import ContractError, ModelError, ModelLimitError
from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.progress import Event, Note, ignore

GB = 1 << 30
RATE = 16_000
SHIPPED_SILENCE_SECONDS = limits.SILENCE_SECONDS  # tests have more patience


@contextmanager
def bounded_memory() -> Iterator[None]:
    """The children's peaks stay below 8 GB, and this process hardly grows; both are sampled."""
    own = psutil.Process()
    before, peaks, done = own.memory_info().rss, [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):  # a peak is kept until the child is gone
            peaks[0] = max(peaks[0], own.memory_info().rss - before)
            for child in own.children():
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except OSError:
                    continue
                peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
                peaks[1] = max(peaks[1], 1024 * int(peak[0]) if peak else 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert peaks[0] < GB // 2
    assert peaks[1] < 8 * GB


def refused(path: Path, says: str, *options: str) -> None:
    """By `evaluate`, with exit code 3 and one sentence that is not endless."""
    with bounded_memory():
        task = ("--tasks", "synthetic_colour", "--limit", "4", "--method", "knn")  # the least, where a guard fails
        code, out, err = run("evaluate", str(path), *task, "--cache", str(path.parent / "cache"), *options)
    *notes, last = err.splitlines(keepends=True)
    assert all(note.startswith("note: the model is trusted") for note in notes)
    sentence = said(last)
    assert says in sentence
    assert (code, out) == (3, "")
    assert "Traceback" not in err
    assert len(sentence) < 900
    assert not list((path.parent / "cache").glob("store/*/*"))


# ---------------------------------------------------------------- refused before they are loaded

NOT_LOADED: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "a function bomb": (
        lambda: models.nested_functions(30),
        "has more than 100000 nodes with all functions inlined",
    ),
    "a bomb of 2^90 nodes": (
        lambda: models.nested_functions(90),
        "has more than 100000 nodes with all functions inlined",
    ),
    "a bomb in branches": (
        lambda: hostile.bomb_in_a_branch(30),
        "has more than 100000 nodes with all functions inlined",
    ),
    "too many nodes": (lambda: hostile.wide(100_001), "has more than 100000 nodes with"),
    "a function that calls itself": (lambda: hostile.calls_itself(0), "has a function 'f0' that calls itself"),
    "a function that calls itself through others": (lambda: hostile.calls_itself(3), "that calls itself, so it cannot"),
    "functions 5,000 deep": (lambda: hostile.chain(5_000), "nests graphs and functions deeper than 100"),
    "a foreign operator": (
        lambda: hostile.foreign_operator("graph"),
        "needs operator 'Steal' of domain 'vendor', which ONNX Runtime lacks; custom operators are never loaded",
    ),
    "a foreign operator in a branch": (
        lambda: hostile.foreign_operator("branch"),
        "needs operator 'Steal' of domain 'vendor'",
    ),
    "one in a function": (lambda: hostile.foreign_operator("function"), "needs operator 'Steal' of domain 'vendor'"),
    "one in a function's default": (
        lambda: hostile.foreign_operator("default"),
        "needs operator 'Steal' of domain 'vendor'",
    ),
    "a function that is there twice": (hostile.defined_twice, "is damaged: it defines a function twice"),
    "a graph handed on": (lambda: hostile.hands_on_graphs(20), "passes a graph to a function, which may multiply it"),
    "one in a function nobody calls": (
        lambda: hostile.foreign_operator("none"),
        "needs operator 'Steal' of domain 'vendor'",
    ),
    "a compiled part": (hostile.compiled_part, "holds a part compiled for one machine (EPContext), which may name any file"),
    "a compiled part of no domain": (lambda: hostile.compiled_part(""), "holds a part compiled for one machine"),
    "a sparse bomb": (hostile.sparse_bomb, "has a sparse tensor of more than 1 GB as a dense one"),
    "17 MB of metadata": (lambda: models.encoder(metadata={"x": "y" * (17 << 20)}), "has metadata of more than 16 MB"),
    "a name of 10 MB": (
        lambda: models.renamed(models.encoder(), "audio", "a" * (10 << 20)),
        "has a name of more than 10000 characters",
    ),
    "1,001 outputs": (
        lambda: models.encoder(extra_outputs=[models.value(f"o{i}", models.FLOAT, None) for i in range(1_000)]),
        "has more than 1000 inputs and outputs",
    ),
}


@pytest.mark.parametrize("name", NOT_LOADED)
def test_refused_before_loading(name: str, tmp_path: Path, shared_process: None) -> None:
    """The guard alone must refuse: the sentence would otherwise be ONNX Runtime's."""
    model, says = NOT_LOADED[name]
    refused(save(model(), tmp_path / "model.onnx"), says)


def test_millions_of_empty_nodes(tmp_path: Path, shared_process: None) -> None:
    (tmp_path / "model.onnx").write_bytes(hostile.empty_nodes(2_100_000))
    refused(tmp_path / "model.onnx", "holds more than 2000000 nodes, attributes and tensors")


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path, shared_process: None) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refused(path, "has 1099.5 GB with its weights, and without trust the limit is 3.2 GB; if you trust the model, --trust")


def test_weights_of_a_terabyte_are_not_read(tmp_path: Path, shared_process: None) -> None:
    model = hostile.external("huge", np.zeros(4, np.float32), {"location": "weights.bin"})
    model.graph.initializer[-1].dims[:] = [1 << 38]
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(1 << 40)
    refused(save(model, tmp_path / "model.onnx"), "has 1099.5 GB with its weights")


def test_honest_functions_and_operators_are_let_through(tmp_path: Path, shared_process: None) -> None:
    """What is just inside the limits, so that none of them refuses everything."""
    honest = {
        "functions": models.nested_functions(4),
        "deep functions": hostile.chain(90),
        "branches": hostile.bomb_in_a_branch(4),
        "a loop": hostile.slow(3),
        "an operator of ONNX Runtime's own": models.encoder(
            extra=[models.helper.make_node("Gelu", ["frames_first"], ["embeddings"], domain="com.microsoft")]
        ),
        "a wide vector": hostile.gives_vectors_of(2_000),
    }
    for name, model in honest.items():
        if name.startswith("an operator"):
            model.opset_import.append(models.helper.make_opsetid("com.microsoft", 1))
        loaded = load_encoder(save(model, tmp_path / f"{name}.onnx"))
        assert np.isfinite(loaded.embed([noise(RATE)], RATE)[0].frames).all(), name


# ---------------------------------------------------------------- files outside


def test_no_file_outside_is_read(tmp_path: Path, shared_process: None) -> None:
    """A canary, which a look at its access time tells apart from one that was read."""
    outside, another = tmp_path / "canary.bin", tmp_path / "another.bin"
    for file in (outside, another):
        file.write_bytes(bytes(models.WEIGHTS.nbytes))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    os.link(another, folder / "hard.bin")
    year_2000 = 946_684_800 * 10**9
    for file in (outside, another):
        os.utime(file, ns=(year_2000, file.stat().st_mtime_ns))
    for location in ("../canary.bin", str(outside), "linked/../../canary.bin", "link.bin", "linked/canary.bin", "hard.bin"):
        refused(models.save_external(folder, location, target=tmp_path / "elsewhere"), f"keeps weights in {location!r}, ")
    assert outside.stat().st_atime_ns == another.stat().st_atime_ns == year_2000
    outside.read_bytes()
    if outside.stat().st_atime_ns == year_2000:
        pytest.skip("this file system keeps no access times")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"offset": "1048576"}, "which ends at byte 64, before the weights do"),
        ({"offset": "49"}, "which ends at byte 64, before the weights do"),
        ({"length": "65"}, "which ends at byte 64, before the weights do"),
        ({"offset": "-8"}, "is damaged: it reads bytes '-8' + '16' of 'weights.bin'"),
        ({"offset": "9" * 5_000}, "is damaged: it reads bytes '9999"),
        ({"offset": "0x10"}, "is damaged: it reads bytes '0x10'"),
        ({"length": "١٢"}, "is damaged: it reads bytes '0' + "),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "140000000000"}, "reads as an address in its memory"),
    ],
)
def test_places_in_a_weights_file(entries: dict[str, str], says: str, tmp_path: Path, shared_process: None) -> None:
    for folder in (tmp_path, tmp_path / "*" / "_ORT_MEM_ADDR_"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("weights.bin" if folder == tmp_path else "*")).write_bytes(bytes(64))
    model = hostile.external("more", np.zeros(4, np.float32), {"location": "weights.bin", **entries})
    refused(save(model, tmp_path / "model.onnx"), says)


def test_a_place_that_is_said_twice(tmp_path: Path, shared_process: None) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    model = hostile.external("more", np.zeros(4, np.float32), {"location": "weights.bin"})
    model.graph.initializer[-1].external_data.add(key="location", value="weights.bin")
    refused(save(model, tmp_path / "model.onnx"), "tensor 'more' has two locations")


def test_a_tensor_of_many_dimensions(tmp_path: Path, shared_process: None) -> None:
    model = models.encoder()
    model.graph.initializer[0].dims[:] = [1 << 40] * 100_000
    refused(save(model, tmp_path / "model.onnx"), "tensor 'weights' has 100000 dimensions")


def test_an_honest_place_in_a_weights_file(tmp_path: Path, shared_process: None) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    model = hostile.external("more", np.zeros(4, np.float32), {"location": "weights.bin", "offset": "48", "length": "16"})
    assert load_encoder(save(model, tmp_path / "model.onnx")).info.scan.external == ("weights.bin",)


def test_every_type_of_tensor_holds_what_it_claims(tmp_path: Path) -> None:
    """Packed ones too: as bytes or in their typed field; one value more is damage."""
    six_bits = {name for name, _ in onnx.TensorProto.DataType.items() if name.startswith("FLOAT6")}
    types = [kind for name, kind in onnx.TensorProto.DataType.items() if name not in {"UNDEFINED", *six_bits}]
    path = tmp_path / "model.onnx"
    plain = scan_model(save(models.encoder(), path)).parameters
    for kind in types:
        text = kind == onnx.TensorProto.STRING
        values = [b"a", b"b", b"c"] if text else [1, 0, 1]
        for raw in (False,) if text else (False, True):
            tensor = onnx.TensorProto(dims=[3], data_type=kind, name="odd")
            if raw:
                tensor.raw_data = raw_bytes(kind, 3)
            else:
                tensor = onnx.helper.make_tensor("odd", kind, [3], values)
            model = models.encoder()
            model.graph.initializer.append(tensor)
            assert scan_model(save(model, path)).parameters == plain + 3
            model.graph.initializer[-1].dims[:] = [9]
            with pytest.raises(ModelError, match="tensor 'odd' claims"):
                scan_model(save(model, path))
    assert len(types) >= 20
    for kind in (0, 27, 99):
        model.graph.initializer[-1].CopyFrom(onnx.TensorProto(dims=[1], data_type=kind, name="odd", raw_data=b"1"))
        with pytest.raises(ModelError, match=f"has a tensor 'odd' of type {kind}, which is not supported"):
            scan_model(save(model, path))


def raw_bytes(kind: int, count: int) -> bytes:
    """As many zeros as `count` values take, by ONNX's own word for the width of a type."""
    name = onnx.TensorProto.DataType.Name(kind)
    digits = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8, "BFLOAT16": 16}
    bits = digits.get(name) or int(re.search(r"(\d+)", name.replace("FLOAT8E", "8E").replace("FLOAT4E", "4E"))[1])  # type: ignore[index]
    return bytes((count * bits + 7) // 8)


@pytest.mark.parametrize("name", ["model.toml", "preprocessor_config.json"])
def test_a_pipe_beside_the_model_is_not_waited_for(name: str, tmp_path: Path, shared_process: None) -> None:
    os.mkfifo(tmp_path / name)
    refused(
        save(models.encoder(), tmp_path / "model.onnx"), f"{name} beside the model cannot be read (it is not a regular file)"
    )


def test_a_model_that_is_replaced_between_scan_and_load(tmp_path: Path) -> None:
    """What was checked must be what is loaded."""
    path = save(models.encoder(), tmp_path / "model.onnx")
    save(models.unknown_operator(), tmp_path / "other.onnx")
    arguments = (str(path), str(tmp_path / "other.onnx"))
    with Worker() as worker, pytest.raises(ModelError, match="was replaced while it was in use; run again"):
        worker.call(resolve_while_replaced, *arguments, returns=EncoderInfo, silence_limit=60, observer=ignore)


def resolve_while_replaced(model: str, other: str, *, tell: Tell) -> EncoderInfo:
    """In the worker: the model's file becomes another one once it was scanned, and the same again once it was loaded."""
    load = resolve._session

    def replace_and_load(path: str, *how: Any) -> Any:
        session = load(path, *how)
        os.replace(other, path)
        return session

    resolve._session = replace_and_load  # type: ignore[assignment]
    return resolve.resolve(model, "cpu", {}, {}, tell=tell)


# ---------------------------------------------------------------- bombs while loading and running

NO_MEMORY = "it needs more memory than it may use; if you trust the model, --trust lifts the limit"
BOMBS: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "16 GB at load": (lambda: hostile.asks_for(1 << 32, at_load=True), NO_MEMORY),
    "1 PB at load": (lambda: hostile.asks_for(1 << 48, at_load=True), NO_MEMORY),
    "16 GB at run time": (lambda: hostile.asks_for(1 << 32, at_load=False), NO_MEMORY),
    "1 PB at run time": (lambda: hostile.asks_for(1 << 48, at_load=False), NO_MEMORY),
    "growing in a loop": (hostile.grows_for_ever, NO_MEMORY),
    "a vector of 10 million": (
        lambda: hostile.gives_vectors_of(10_000_000),
        "has a dimension of 10000000, more than 32768; --trust lifts the limit",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 200.0)  # the limit of memory must end it, on a slow machine too
    model, says = BOMBS[name]
    refused(save(model(), tmp_path / "model.onnx"), says)


def test_an_endless_loop_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None) -> None:
    load_encoder(save(models.encoder(), tmp_path / "quick.onnx"))  # the process has started, so a silence is the model's
    children = psutil.Process().children()
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 2.0)
    refused(save(models.endless_loop(), tmp_path / "model.onnx"), "gave no sign of life for 2 s while measuring the model")
    assert not all(child.is_running() for child in children)  # others may train heads of other tests


def test_a_model_that_is_slow_in_every_call_ends_too(tmp_path: Path) -> None:
    path = save(hostile.slow(100_000), tmp_path / "model.onnx")
    with Worker() as worker, pytest.raises(ModelLimitError, match="still being measured after 1 s of processor time"):
        worker.call(resolve_in_a_second, str(path), returns=EncoderInfo, silence_limit=60, observer=ignore)


def resolve_in_a_second(model: str, *, tell: Tell) -> EncoderInfo:
    """In the worker: with less time for measuring than a stranger has."""
    limits._MEASURING_SECONDS = 1.0
    return resolve.resolve(model, "cpu", {}, {}, tell=tell)


def test_a_bomb_that_waits_for_the_data(tmp_path: Path) -> None:
    """Measured with quiet noise it is harmless; a loud clip makes it ask for 1 PB."""
    nodes = [
        models.helper.make_node("ReduceMax", ["audio"], ["loudest"], keepdims=0),
        models.helper.make_node("Mul", ["loudest", "loudest"], ["power"]),
        models.helper.make_node("Floor", ["power"], ["whole"]),
        models.helper.make_node("Cast", ["whole"], ["count"], to=models.INT64),
        models.constant("many", [1 << 48]),
        models.helper.make_node("Mul", ["count", "many"], ["wanted"]),
    ]
    with load_encoder(save(hostile.with_zeros(nodes), tmp_path / "model.onnx")) as loaded:
        with bounded_memory(), pytest.raises(ModelLimitError, match=NO_MEMORY):
            loaded.embed([np.full(RATE, 2.0)], RATE)
        assert len(loaded.embed([noise(RATE)], RATE)) == 1


def test_limits_grow_with_the_files_and_trust_lifts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENCE_SECONDS", SHIPPED_SILENCE_SECONDS)
    for small, large in ((0, GB), (GB, 3 * GB)):
        assert limits.silence_seconds(small, False) < limits.silence_seconds(large, False) < limits.silence_seconds(0, True)
        assert limits.measuring_seconds(small, False) < limits.measuring_seconds(large, False)
        assert (limits.memory_bytes(small, False) or 0) < (limits.memory_bytes(large, False) or 0)
    assert limits.silence_seconds(1 << 20, False) + limits.measuring_seconds(1 << 20, False) < 30
    assert (limits.memory_bytes(1 << 20, False, threads=11) or 0) < 8 * GB
    assert limits.memory_bytes(GB, True, threads=64) is None


# ---------------------------------------------------------------- outputs

RANDOM = "its values for one input differ from run to run, so scores would too; export it in inference mode"
OUTPUTS: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "random values": (hostile.random_values, RANDOM),
    "random vectors of a clip": (lambda: hostile.random_values("BD"), RANDOM),
    "random values in a window": (lambda: hostile.random_values(samples=RATE), RANDOM),
    "dropout left on": (hostile.dropout_left_on, RANDOM),
    "a random number of frames": (hostile.random_frames, RANDOM),
    "NaN": (models.not_a_number, "gives NaN or infinity"),
    "900 outputs with long names": (
        lambda: hostile.many_outputs(900, 500),
        "could be the embedding; name it by --contract output=NAME",
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str, tmp_path: Path, shared_process: None) -> None:
    model, says = OUTPUTS[name]
    refused(save(model(), tmp_path / "model.onnx"), says)


def test_more_frames_than_samples(tmp_path: Path, shared_process: None) -> None:
    path = save(hostile.crowded_window(RATE), tmp_path / "model.onnx")
    refused(path, "gives 16072 frames for 16000 samples", "--contract", "output_layout=BTD")


def test_a_batch_coupled_model_is_run_alone(tmp_path: Path, shared_process: None) -> None:
    loaded = load_encoder(save(models.batch_coupled(), tmp_path / "model.onnx"))
    clips = [noise(RATE), 5 * noise(RATE, seed=1)]
    alone = [loaded.embed([clip], RATE)[0].frames for clip in clips]
    np.testing.assert_array_equal(np.stack([found.frames for found in loaded.embed(clips, RATE)]), np.stack(alone))
    assert loaded.info.batching.items == 1


# ---------------------------------------------------------------- --trust


def test_trust_lifts_limits_says_so_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A giant: more dimensions than a stranger may have, and nodes. Its address space has no limit."""
    path = save(hostile.gives_vectors_of(limits.UNTRUSTED.dim + 1), tmp_path / "model.onnx")
    cache = tmp_path / "cache"
    heard: list[Event] = []
    with load_encoder(path, trust=True, cache=cache, observer=heard.append) as loaded:
        assert loaded.contract.dim == limits.UNTRUSTED.dim + 1
        assert loaded.spec.trust
        assert loaded.call(address_space, returns=int) > 1 << 60
    assert Note(limits.LIFTED) in heard
    refused(path, "more than 32768; --trust lifts the limit")  # what was measured under trust is not remembered without
    with load_encoder(path, trust=True, cache=cache) as again:
        assert again.worker._process is None  # but it is with it


def address_space(*, tell: Tell) -> int:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit if limit != resource.RLIM_INFINITY else 1 << 62


def test_trust_in_the_record(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "model.onnx")
    task = str(write_task(tmp_path))
    write_tones(tmp_path / "data", train=12, valid=8, test=8)
    records = {
        trust: evaluate(path, [task], data=tmp_path / "data", cache=tmp_path / "cache", methods=["knn"], trust=trust).result
        for trust in (False, True)
    }
    assert [records[trust].settings["trust"] for trust in (False, True)] == [False, True]
    assert [limits.LIFTED in records[trust].notes for trust in (False, True)] == [False, True]
    assert records[False].tasks[0].score == records[True].tasks[0].score


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: hostile.foreign_operator("graph"), "custom operators are never loaded"),
        (hostile.compiled_part, "compiled for one machine"),
        (lambda: models.with_external_weights(models.encoder(), "../secret")[0], "outside its folder"),
        (lambda: hostile.calls_itself(1), "that calls itself"),
    ],
)
def test_trust_lifts_no_rule(model: Any, says: str, tmp_path: Path, shared_process: None) -> None:
    refused(save(model(), tmp_path / "model.onnx"), says, "--trust")


def test_a_bomb_that_is_trusted_is_still_counted(tmp_path: Path, shared_process: None) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError, match="more than 10000000 nodes"):
        load_encoder(save(models.nested_functions(60), tmp_path / "model.onnx"), trust=True)
    assert time.monotonic() - started < 60  # not the 900 s after which a trusted load is stopped


def test_a_dimension_is_checked_whoever_declares_it(tmp_path: Path, shared_process: None) -> None:
    path = save(hostile.gives_vectors_of(40_000), tmp_path / "model.onnx")
    with pytest.raises(ContractError, match="has a dimension of 40000, more than 32768"):
        load_encoder(path, contract=["output_dim=40000"])
