"""Coverage-guided fuzzing of one reader: `make fuzz`, or python tests/fuzz.py TARGET [libFuzzer's options].

New inputs are kept in build/fuzz/TARGET, so that a later run goes on from there; a finding is written to
build/fuzz/TARGET-crash-*. Each becomes a case of `test_any_bytes`. Needs `pip install atheris`, which exists
for Linux and a few versions of Python.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["xares_onnx", "tarfile", "tomllib"]):
    from fuzz_targets import TARGETS


def main() -> None:
    name, *options = sys.argv[1:]
    target = TARGETS[name]
    corpus = Path("build/fuzz") / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    prefix = f"-artifact_prefix=build/fuzz/{name}-"
    atheris.Setup([sys.argv[0], str(corpus), prefix, "-rss_limit_mb=3000", "-timeout=20", *options], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
