"""What is run on a GPU can be run without one: the bench for it, dry, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "gpu.py"


def test_sections_run_dry_into_one_table(tmp_path: Path) -> None:
    """Two of them: `.ci/run` runs all."""
    output = tmp_path / "gpu.json"
    command = [sys.executable, BENCH, "--dry", "--sections", "provider,heads", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    sections = json.loads(output.read_text())["sections"]
    assert sorted(sections) == ["heads", "models", "provider"]
    for name, section in sections.items():
        assert section["ok"], name
        assert section["rows"], name
        for row in section["rows"]:
            assert f"| {name} | {row['what']} | {row['figure']} |" in done.stdout


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
