"""The action, the pre-commit hook and the pipelines of docs/ci.md: valid, and deaf to commands in what they are given."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
RUN = next(step for step in STEPS if step.get("name") == "Run")
ENVIRONMENT = {
    "MODEL": "model",
    "COMMAND": "command",
    "BASELINE": "baseline",
    "TOLERANCE": "tolerance",
    "FAIL_UNDER": "fail-under",
    "ARGUMENTS": "args",
    "OUTPUT": "output",
}
EVIL = "x'; touch pwned; $(touch pwned) `touch pwned` \"\ntouch pwned"


def run_step(folder: Path, *, code: int = 0, **inputs: str) -> tuple[int, list[list[str]], str]:
    """Exit code of the action's own script, the calls of a program that only tells how it was called, and the outputs."""
    stub = folder / "bin" / "xares-onnx"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" END >> "{folder}/calls"\ntest "$1" = compare || exit {code}\n')
    stub.chmod(0o755)
    given = {
        name: inputs.get(of.replace("-", "_"), ACTION["inputs"][of].get("default", "")) for name, of in ENVIRONMENT.items()
    }
    environment = {
        "PATH": f"{stub.parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "GITHUB_OUTPUT": str(folder / "outputs"),
    }
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", RUN["run"]],
        env={**environment, **given},
        cwd=folder,
        check=False,
        timeout=200,
    )
    calls = (folder / "calls").read_text() if (folder / "calls").exists() else ""
    outputs = (folder / "outputs").read_text() if (folder / "outputs").exists() else ""
    return done.returncode, [call.split("\0")[:-1] for call in calls.split("END\0")[:-1]], outputs


def test_inputs_reach_the_shell_as_variables_only() -> None:
    """An expression inside a script would be pasted into it before the shell reads it."""
    assert all("${{" not in step.get("run", "") for step in STEPS)
    assert RUN["env"] == {name: f"${{{{ inputs.{of} }}}}" for name, of in ENVIRONMENT.items()}
    assert all(step["shell"] == "bash" for step in STEPS if "run" in step)
    used = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert used == set(ACTION["inputs"])


def test_evaluate_with_gates_then_shows_the_comparison(tmp_path: Path) -> None:
    code, calls, outputs = run_step(
        tmp_path,
        model="m.onnx",
        baseline="base.json",
        tolerance="0.02",
        fail_under="a=1,b=1",
        args=" --tasks  esc50\n--seeds 1 ",
    )
    assert code == 0
    evaluate = "evaluate --tasks esc50 --seeds 1 --baseline=base.json --tolerance=0.02 --fail-under=a=1,b=1"
    compare = "compare --tolerance=0.02 --format github -- base.json xares-onnx-result.json"
    assert calls == [f"{evaluate} --output=xares-onnx-result.json -- m.onnx".split(), compare.split()]
    assert outputs == "result=xares-onnx-result.json\n"


def test_evaluate_without_a_baseline(tmp_path: Path) -> None:
    code, calls, _ = run_step(tmp_path, model="m.onnx", tolerance="0.02")
    assert (code, calls) == (0, [["evaluate", "--output=xares-onnx-result.json", "--", "m.onnx"]])


def test_compare_and_check(tmp_path: Path) -> None:
    run_step(tmp_path, command="compare", model="int8.onnx", baseline="fp32.onnx", args="--suite synthetic")
    _, calls, _ = run_step(tmp_path, command="check", model="int8.onnx")
    assert calls == [
        ["compare", "--suite", "synthetic", "--format", "github", "--", "fp32.onnx", "int8.onnx"],
        ["check", "--format", "github", "--", "int8.onnx"],
    ]


@pytest.mark.parametrize(("code", "compared"), [(1, True), (3, False)])
def test_the_exit_code_is_that_of_the_evaluation(tmp_path: Path, code: int, compared: bool) -> None:
    found, calls, _ = run_step(tmp_path, code=code, model="m.onnx", baseline="b.json")
    assert (found, len(calls) == 2) == (code, compared)


def test_an_unknown_command_is_wrong_usage(tmp_path: Path) -> None:
    assert run_step(tmp_path, model="m.onnx", command=EVIL)[:2] == (2, [])


@pytest.mark.parametrize("name", ["model", "baseline", "tolerance", "fail_under", "args", "output"])
@pytest.mark.parametrize("command", ["evaluate", "compare", "check"])
def test_nothing_in_an_input_is_run(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / "star").write_text("")
    _, calls, outputs = run_step(
        tmp_path, **{"model": "m.onnx", "baseline": "b.json", "command": command, name: EVIL + " *"}
    )
    assert calls
    assert not (tmp_path / "pwned").exists()
    assert "star" not in [word for call in calls for word in call]
    assert len(outputs.splitlines()) == (command == "evaluate")  # no second output is smuggled in


def test_docs_hold_valid_pipelines() -> None:
    text = (ROOT / "docs/ci.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) == 4
    (ours,) = (step for step in blocks[0]["jobs"]["score"]["steps"] if "xares-onnx" in step["uses"])
    assert set(ours["with"]) <= set(ACTION["inputs"])
    assert all(f"`{name}`" in text for name in ACTION["inputs"])
    (shell,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert subprocess.run(["bash", "-n", "-c", shell], check=False).returncode == 0


def test_options_in_the_docs_exist() -> None:
    from typer.main import get_command

    from xares_onnx.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for page in ("docs/ci.md", "docs/comparing.md"):
        for line in re.findall(r"xares-onnx ((?:compare|evaluate) .*)", (ROOT / page).read_text()):
            name, *words = shlex.split(line.split("#")[0].split(">")[0].rstrip("\\"))
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, line


def test_the_hook_checks_every_file(tmp_path: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    stub = tmp_path / "xares-onnx"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{tmp_path}/calls"\ncase "$*" in *bad*) exit 3;; esac\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    files = ["a b.onnx", "bad.onnx", "c.onnx"]
    done = subprocess.run([*shlex.split(hook["entry"]), *files], env=environment, check=False)
    assert done.returncode == 3
    assert (tmp_path / "calls").read_text().splitlines() == [f"check {file}" for file in files]
    assert re.search(hook["files"], "model.onnx")
