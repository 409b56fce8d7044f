"""The command line: exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_world import World, run, said, table
from corpus import tones, write_task
from shard_makers import write_shard

from xares_onnx import __version__, cli
from xares_onnx.cli.interrupts import Terminated
from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.errors import DiskFullError, XaresError, worst_exit_code
from xares_onnx.evaluation import evaluation


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def surroundings(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XARES_ONNX_DATA", "XARES_ONNX_CACHE"):
        monkeypatch.setenv(name, world.environment[name])


# ---------------------------------------------------------------- a run that goes well


def test_evaluate_prints_a_plain_table_and_saves(world: World, tmp_path: Path) -> None:
    code, out, err = run("evaluate", world.model, "--tasks", world.good, "--output", str(tmp_path / "mine.json"))
    assert code == 0
    saved = json.loads((tmp_path / "mine.json").read_bytes())
    head, knn = saved["tasks"]
    row = next(line for line in out.splitlines() if "Tones good" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    interval = [f"{task['ci95'][0]:.3f}-{task['ci95'][1]:.3f}" for task in saved["tasks"]]
    tested = [trial["test"] for trial in head["tuning"]["tried"]]
    assert cells == [
        "Tones good",
        "environment",
        "accuracy",
        f"{head['score']:.3f}",
        interval[0],
        f"{min(tested):.3f}-{max(tested):.3f}",
        f"{knn['score']:.3f}",
        interval[1],
        "12",
        "",
    ]
    assert out.isascii()
    assert "\x1b" not in out + err
    assert "protocol corrected; scores are fractions, higher is better; grid: lowest and highest score" in out
    assert f"saved {tmp_path / 'mine.json'}" in out
    assert "good: training done, 12 steps" in err


def test_stdout_holds_only_json(world: World) -> None:
    code, out, err = run(*world.evaluate("--tasks", world.good, "--json"))
    assert code == 0
    assert out == (world.folder / "out.json").read_text()
    assert json.loads(out)["tasks"][0]["status"] == "ok"
    assert not [line for line in err.splitlines() if line.startswith("xares-onnx:")]


def test_quiet_prints_nothing(world: World) -> None:
    assert run(*world.evaluate("--tasks", world.good, "--quiet")) == (0, "", "")
    assert json.loads((world.folder / "out.json").read_bytes())["tasks"]


def test_quiet_still_reports_errors(world: World) -> None:
    code, out, err = run(*world.evaluate("--tasks", world.cut, "--quiet"))
    assert (code, out) == (4, "")
    assert "a shard is damaged" in said(err)


def test_lists_are_comma_separated_and_repeatable(world: World) -> None:
    for chosen in (["--tasks", f"{world.good}, {world.other},"], ["--tasks", world.good, "--tasks", world.other]):
        code, out, _ = run(*world.evaluate(*chosen, "--method", "knn", "--json"))
        assert code == 0
        assert [(task["task"], task["method"]) for task in json.loads(out)["tasks"]] == [("good", "knn"), ("other", "knn")]


def test_knn_only(world: World) -> None:
    code, out, _ = run(*world.evaluate("--tasks", world.good, "--method", "knn"))
    row = next(line for line in out.splitlines() if "Tones good" in line)
    assert (code, row.split("|")[4].strip()) == (0, "")
    assert 0 <= float(row.split("|")[6]) <= 1
    both = json.loads(run(*world.evaluate("--tasks", world.good, "--method", "knn,head", "--json"))[1])
    assert both["settings"]["methods"] == ["head", "knn"]


def test_options_reach_the_evaluation(world: World) -> None:
    options = ["--seeds", "2", "--protocol", "xares", "--limit", "5", "--allow-drops", "--threads", "1", "--device", "cpu"]
    code, out, _ = run(*world.evaluate("--tasks", world.good, "--json", *options))
    record = json.loads(out)
    assert code == 0
    settings = record["settings"]
    assert (settings["seeds"], settings["protocol"], settings["limit"], settings["allow_drops"]) == (2, "xares", 5, True)
    assert record["environment"]["machine"]["threads"] == 1
    declared = json.loads(run(*world.evaluate("--tasks", world.good, "--contract", "normalize=zscore", "--json"))[1])
    assert declared["encoder"]["contract"]["normalize"]["value"] == "zscore"


def test_a_limit_is_marked_at_every_score(world: World) -> None:
    out = run(*world.evaluate("--tasks", world.good, "--limit", "6"))[1]
    row = next(line for line in out.splitlines() if "Tones good" in line)
    assert [row.split("|")[i].strip()[-1] for i in (4, 7)] == ["*", "*"]
    assert "* not comparable with other results, and in no average: at most 6 clips per split were used" in out
    assert "weighted average" not in out


def test_only_stages_with_work_report_progress(world: World, tmp_path: Path) -> None:
    lines = [run(*world.evaluate("--tasks", world.good, "--cache", str(tmp_path / "new")))[2].splitlines() for _ in range(2)]
    assert lines[0] == ["good: embedding done, 44 clips", "good: training done, 12 steps"]
    assert lines[1] == ["good: training done, 12 steps"]


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "MODEL", "--tasks", "esk50"], 2, "there is no task 'esk50'; did you mean 'esc50'"),
        (["evaluate", "MODEL", "--suite", "speach"], 2, "there is no suite 'speach'; choose from all, public, speech"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--contract", "sample_rate"], 2, "sample_rate"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--contract", "sampel_rate=8000"], 2, "sample_rate"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--protocol", "mine"], 2, "must be corrected or xares"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--method", "mlp"], 2, "method 'mlp' must be head or knn"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--threads", "0"], 2, "--threads 0 must be 1 or more"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--device", "gpu"], 2, "--device 'gpu' must be auto, cpu, cuda"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--output", "."], 2, "--output . is a folder"),
        (["evaluate", "MODEL", "--tasks", "missing.toml"], 2, "task file missing.toml cannot be read"),
        (["tasks", "esk50"], 2, "there is no task 'esk50'; did you mean 'esc50'"),
        (["export", "logmell"], 2, "unknown encoder family 'logmell'; did you mean 'logmel'"),
        (["evaluate", "missing.onnx", "--tasks", "GOOD"], 3, "missing.onnx"),
        (["evaluate", "SHARD", "--tasks", "GOOD"], 3, "train-0.tar"),
        (
            ["evaluate", "MODEL", "--tasks", "gtzan_genre"],
            4,
            "`xares-onnx download gtzan_genre` fetches Zenodo record 14722472",
        ),
        (["evaluate", "MODEL", "--tasks", "liveenv"], 4, "its data were never published"),
        (["evaluate", "MODEL", "--data", "nowhere"], 4, "data folder nowhere does not exist"),
        (["evaluate", "MODEL", "--data", "."], 4, "holds no task's data"),
        (["evaluate", "MODEL", "--suite", "music"], 4, "no task of suite music has data"),
        (["tasks", "--data", "nowhere"], 4, "data folder nowhere does not exist"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--device", "QNNExecutionProvider"], 5, "has no QNNExecutionProvider"),
        (["evaluate", "MODEL", "--tasks", "GOOD", "--output", "GOOD/r.json"], 5, "cannot be written"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(world: World, arguments: list[str], code: int, message: str) -> None:
    shard = str(world.data / "good/train-0.tar")
    named = {"MODEL": world.model, "GOOD": world.good, "GOOD/r.json": f"{world.good}/r.json", "SHARD": shard}
    exit_code, out, err = run(*(named.get(argument, argument) for argument in arguments))
    assert (exit_code, out) == (code, "")
    assert message in said(err)


def test_a_failed_task_sets_the_exit_code_after_the_table(world: World) -> None:
    code, out, err = run(*world.evaluate("--tasks", f"{world.cut},{world.good}"))
    assert code == 4
    assert "cut: failed: a shard is damaged" in out
    assert "Tones good" in out
    errors = [line for line in err.splitlines() if line.startswith("xares-onnx: ")]
    assert len(errors) == 1
    assert "--allow-drops" in errors[0]
    code, out, _ = run(*world.evaluate("--tasks", world.cut, "--json"))
    assert (code, json.loads(out)["tasks"][0]["status"]) == (4, "failed")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("boom"), 70, "internal error, please report it: RuntimeError: boom (--debug shows where)"),
        (
            XaresError("Traceback:\n  a line\nValueError: boom"),
            70,
            "internal error in a worker, please report it: ValueError: boom",
        ),
        (DiskFullError("the disk\nis full"), 5, "the disk is full"),
        (MemoryError("9 GB"), 5, "the memory of this machine does not suffice: 9 GB"),
        (OSError(28, "No space left"), 5, "the disk of this machine does not suffice: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "interrupted; finished shards are stored, so the same command goes on from there"),
        (Terminated(), 143, "interrupted; finished shards are stored, so the same command goes on from there"),
        (XaresError(), 70, "XaresError"),
        (XaresError("no \x1b[2Jescape"), 70, r"no \x1b[2Jescape"),
    ],
)
def test_unexpected_errors_are_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(evaluation, "evaluate", fail)
    monkeypatch.setenv("XARES_ONNX_DEBUG", "")  # so that --debug's own setting is undone
    exit_code, out, err = run(*world.evaluate())
    assert (exit_code, out, said(err)) == (code, "", message)
    if code == 70:
        exit_code, _, err = run(*world.evaluate("--debug"))
        assert exit_code == code
        assert "Traceback (most recent call last)" in err
        assert "in fail" in err


def test_precedence_of_exit_codes() -> None:
    cases = {(): 0, (0,): 0, (4, 3): 3, (5, 4, 1): 5, (5, 3): 3, (1, 4): 4, (4, 5, 3, 70): 70, (0, 1): 1}
    assert {codes: worst_exit_code(codes) for codes in cases} == cases


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "Missing argument"),
        (["evaluate", "m.onnx", "--task", "esc50"], "--tasks"),
        (["evaluate", "m.onnx", "--seeds", "many"], "--seeds"),
        (["evalaute"], "evalaute"),
    ],
)
def test_a_parser_error_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["xares-onnx", *arguments])
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert message in said(err)
    assert "--help` shows what there is" in err


def test_without_arguments_help_is_printed(world: World) -> None:
    code, out, err = world.real()
    assert (code, out) == (2, "")
    assert "evaluate" in err
    assert "Usage:" in err


# ---------------------------------------------------------------- real processes


def test_a_rerun_loads_no_model_and_nothing_that_its_heads_do_not_need(world: World) -> None:
    options = ["--tasks", world.good, "--method", "head", "--seeds", "1"]
    check = (
        "import atexit, sys; from xares_onnx.cli import main\n"
        f"sys.argv = {['xares-onnx', *world.evaluate(*options, '--quiet')]!r}\n"
        "heavy = ('onnxruntime', 'onnx', 'torch', 'webdataset', 'jiwer', 'jinja2', 'tokenizers')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", check], env=world.environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_help_and_version_load_nothing_heavy(world: World) -> None:
    heavy = {"torch", "onnxruntime", "onnx", "sklearn", "numpy", "rich", "soundfile"}
    script = (
        "import sys, xares_onnx, xares_onnx.cli\n"
        "sys.argv = ['xares-onnx', 'evaluate', '--help']\n"
        "try: xares_onnx.cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"loaded = {heavy!r} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "import numpy\n"
        f"assert {heavy!r} & set(sys.modules)\n"  # the test works
    )
    done = subprocess.run([sys.executable, "-c", script], env=world.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--protocol" in done.stdout
    assert world.real("--version") == (0, f"{__version__}\n", "")


def test_a_real_process_scores_and_fails_alike(world: World) -> None:
    code, out, err = world.real(*world.evaluate("--tasks", f"{world.good},{world.cut}", "--method", "knn"))
    assert code == 4
    assert "Tones good" in out
    assert "cut: failed" in out
    assert said(err).startswith("a shard is damaged")
    assert out.isascii()
    assert "\x1b" not in out + err


def test_colour_is_not_forced_upon_a_file(world: World) -> None:
    code, out, err = world.real("tasks", env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"})
    assert (code, err) == (0, "")
    assert out.isascii()
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["tasks"], 0),
        (["tasks", "--json"], 0),
        (["evaluate", "--method", "knn", "--tasks", "CUT,GOOD"], 4),
    ],
)
def test_a_closed_pipe_keeps_the_exit_code(world: World, arguments: list[str], code: int) -> None:
    if arguments[0] == "evaluate":
        arguments = world.evaluate(*(a.replace("CUT", world.cut).replace("GOOD", world.good) for a in arguments[1:]))
    with world.start(arguments) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == code
    assert "roken" not in err
    assert err.count("\n") == (code != 0)


def test_an_ascii_terminal_gets_escapes_and_json_stays_json(world: World) -> None:
    path = Path(write_task(world.folder / "ascii", "good"))
    path.write_text(path.read_text().replace("Tones good", "Töne ☃"))
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    code, out, err = world.real("tasks", str(path), env=ascii_only)
    assert (code, err) == (0, "")
    assert r"T\xf6ne \u2603" in out
    code, out, err = world.real("tasks", str(path), "--json", env=ascii_only)
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["title"] == "Töne ☃"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_reports_it_and_resumes(world: World, tmp_path: Path, number: int, code: int) -> None:
    endless = write_task(tmp_path, "good", epochs=10_000)
    options = ["--protocol", "xares", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out.json")]
    with world.start(["evaluate", world.model, "--tasks", str(endless), *options]) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == b"good: embedding done, 44 clips\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == code
    assert said(err.decode()).startswith("interrupted; finished shards are stored")
    assert not (tmp_path / "out.json").exists()
    code, _, stderr = run("evaluate", world.model, "--tasks", world.good, *options)
    assert code == 0
    assert "embedding" not in stderr  # all of it was stored


# ---------------------------------------------------------------- plan


def test_plan_counts_and_embeds_nothing(world: World, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = ["evaluate", world.model, "--tasks", f"{world.good},{world.other}", "--cache", str(cache)]
    code, out, _ = run(*arguments, "--plan", "--json")
    plan = json.loads(out)
    assert code == 0
    assert [(row["task"], row["clips"], row["clips_to_embed"]) for row in plan["tasks"]] == [
        ("good", 44, 44),
        ("other", 48, 48),
    ]
    assert plan["total"]["clips"] == 92
    for row in plan["tasks"]:
        assert row["hours"] == pytest.approx(row["clips"] * 0.4 / 3600, rel=1e-3)
        assert row["disk_bytes"] > 0
        assert row["embed_seconds"] == pytest.approx(row["hours"] * 3600 * plan["rtf"] * 1.1)
    assert not list((cache / "store").rglob("*"))
    assert not (tmp_path / "results").exists()

    code, out, err = run(*arguments, "--plan")
    assert (code, err) == (0, "")
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]]
        for line in out.splitlines()
        if "|" in line
    }
    assert rows["total"][:3] == ["92", "0.01", "92"]
    assert "on this machine: the model takes" in out

    run(*arguments[:3], world.good, *arguments[4:], "--output", str(tmp_path / "r.json"), "--quiet")
    stored = sum(path.stat().st_size for path in (cache / "store").rglob("*") if path.is_file())
    assert stored == pytest.approx(plan["tasks"][0]["disk_bytes"], rel=0.6)
    then = json.loads(run(*arguments, "--plan", "--json")[1])
    assert [row["clips_to_embed"] for row in then["tasks"]] == [0, 48]
    assert [row["hours"] for row in then["tasks"]] == [row["hours"] for row in plan["tasks"]]
    assert (then["tasks"][0]["disk_bytes"], then["tasks"][0]["embed_seconds"]) == (0, 0)
    limited = json.loads(run(*arguments, "--plan", "--json", "--limit", "5")[1])
    assert [(row["clips"], row["clips_to_embed"]) for row in limited["tasks"]] == [(15, 15), (15, 15)]


def test_a_plan_estimates_hours_of_clips_of_different_lengths(world: World, tmp_path: Path) -> None:
    """Durations are sampled: 300 clips of 0.1 to 0.7 s."""
    clips: dict[str, Any] = {}
    for i in range(300):
        clips |= tones(1, i, seconds=0.1 + 0.002 * i, prefix=f"{i:03}")
    for split in ("train", "test"):
        write_shard(tmp_path / "long" / f"{split}-0.tar", clips)
    task = write_task(tmp_path, "long", splits=("train", "test"))
    code, out, _ = run("evaluate", world.model, "--tasks", str(task), "--data", str(tmp_path), "--plan", "--json")
    (row,) = json.loads(out)["tasks"]
    seconds = 2 * sum(0.1 + 0.002 * i for i in range(300))
    assert (code, row["clips"]) == (0, 600)
    assert row["hours"] * 3600 == pytest.approx(seconds, rel=0.05)


# ---------------------------------------------------------------- tasks


def test_tasks_are_listed_on_one_line_each() -> None:
    code, out, err = run("tasks")
    assert (code, err) == (0, "")
    rows = {row[0]: row[1:] for row in table(out)}
    assert list(rows) == list(shipped_tasks())
    assert rows["esc50"] == ["ESC-50", "environment", "integer", "accuracy", "400", "no"]
    assert rows["finger_snap"][-1] == "no, private"
    assert rows["synthetic_tempo"][-1] == "built in"
    assert out.splitlines()[-1] == f"data folder: {os.environ['XARES_ONNX_DATA']}"
    assert "…" not in out


def test_tasks_list_what_is_on_disk(world: World, tmp_path: Path) -> None:
    for number in range(1, 6):
        write_shard(tmp_path / "esc50" / f"wds-audio-fold-{number}-0.tar", tones(2, 0))
    (tmp_path / "vocalsound").mkdir()
    (tmp_path / "vocalsound" / "nothing.txt").write_text("")
    rows = {row[0]: row[-1] for row in table(run("tasks", "--data", str(tmp_path))[1])}
    assert rows["esc50"] == "5 shards, 0.00 GB"
    assert rows["vocalsound"] == "no"
    assert [row[0] for row in table(run("tasks", "vox*")[1])] == ["voxceleb1", "voxlingua33"]


def test_one_task_is_shown_in_full(tmp_path: Path) -> None:
    write_shard(tmp_path / "esc50" / "wds-audio-fold-2-0.tar", tones(2, 0))
    code, out, err = run("tasks", "esc50", "--data", str(tmp_path))
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["title"] == "ESC-50"
    assert lines["domain"] == "environment"
    assert lines["kind"] == "integer, 50 classes"
    assert lines["target"] == "key 'label'"
    assert lines["head"] == "linear, 10 epochs, batches of 32, learning rate 0.001"
    assert lines["metric"] == "accuracy, also by kNN"
    assert lines["weight"] == "400"
    assert lines["data"] == "https://zenodo.org/records/14614287"
    assert "fold 1            wds-audio-fold-1-*.tar: no shards" in out
    assert "fold 2            wds-audio-fold-2-*.tar: 1 shard, " in out
    assert "published linear  dasheng 0.857, wav2vec2 0.510, whisper 0.528, data2vec 0.229" in out
    assert "published knn     dasheng 0.618" in out
    private = run("tasks", "liveenv")[1]
    assert "domain            environment, private" in private
    assert "accuracy, not by kNN" in private
    assert "zenodo" not in private


@pytest.mark.parametrize("name", [*shipped_tasks()])
def test_every_task_can_be_shown(name: str) -> None:
    code, out, err = run("tasks", name)
    assert (code, err) == (0, "")
    assert out.startswith(f"name              {name}\n")
    assert all(line == line.rstrip() for line in out.splitlines())


def test_tasks_as_json() -> None:
    code, out, err = run("tasks", "--json")
    records = {record["name"]: record for record in json.loads(out)}
    assert (code, err) == (0, "")
    assert set(records) == set(shipped_tasks())
    esc50 = records["esc50"]
    assert (esc50["kind"], esc50["on_disk"], esc50["weight"], esc50["head"]["epochs"]) == ("integer", "no", 400, 10)
    assert esc50["target"] == {"kind": "integer", "key": "label", "classes": 50}
    assert [record["name"] for record in json.loads(run("tasks", "esc50", "--json")[1])] == ["esc50"]
