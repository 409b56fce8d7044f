"""What is run on a GPU can be run without one: the bench for it, dry, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "gpu.py"
SECTIONS = ["models", "provider", "check", "suite", "throughput", "heads"]


@pytest.mark.timeout(1200)  # half a minute, but it starts forty processes
def test_every_section_runs_dry(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, BENCH, "--dry", "--output", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    sections = json.loads(output.read_text())["sections"]
    assert sorted(sections) == sorted(SECTIONS)
    for name, section in sections.items():
        assert section["ok"], name
        assert section["rows"], name
        for row in section["rows"]:
            assert f"| {name} | {row['what']} | {row['figure']} |" in done.stdout
    (paired,) = [row for row in sections["suite"]["rows"] if "tasks" in row]
    assert {(task["cpu"], task["ci95"] and tuple(task["ci95"])) for task in paired["tasks"]}
    assert all(task["cpu"] == task["gpu"] for task in paired["tasks"])  # of the CPU both times


def test_a_section_that_fails_costs_no_other(tmp_path: Path) -> None:
    """Here what should be a model is none."""
    for name in ("logmel", "wav2vec2"):
        (tmp_path / f"{name}.onnx").write_bytes(b"no model")
    command = [
        sys.executable,
        BENCH,
        "--dry",
        "--folder",
        tmp_path,
        "--sections",
        "provider,heads",
        "--output",
        tmp_path / "o",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    sections = json.loads((tmp_path / "o").read_text())["sections"]
    assert not sections["provider"]["ok"]
    assert any("FAILED: " in row["figure"] and "ModelError" in row["figure"] for row in sections["provider"]["rows"])
    assert "Traceback" in done.stderr
    assert sections["heads"]["ok"]


def test_an_unknown_section_is_refused() -> None:
    done = subprocess.run([sys.executable, BENCH, "--sections", "speed"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no section speed; there are models, provider" in done.stderr
