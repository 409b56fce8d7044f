"""What docs/python.md shows does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus import write_encoder

PAGE = Path(__file__).parents[2] / "docs/python.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_encoder(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XARES_ONNX_CACHE", str(tmp_path / "cache"))
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    found: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:2]] == [["synthetic_vowel", "linear"], ["synthetic_vowel", "knn"]]
    assert float(said[2]) == float(said[0].split()[2])
    assert int(said[3]) > 0
    assert isinstance(found["best"], dict)
    assert found["best"]["model"] == "model"
