"""What is declared of a model: on the command line, beside it, in its metadata, by its preprocessor; first wins."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...errors import ContractError, UsageError, nearest
from . import frontend as frontends
from .contract import DEFAULT_SAMPLE_RATE
from .extractors import NotComputedError, declared_by_extractor
from .frontend import Frontend, make_frontend

CONTRACT_VERSION = 1


# What may be declared, and how its text is read. `xares.` stands before each in a model's metadata.
_DECLARABLE: dict[str, Callable[[str], Any]] = {
    "input_kind": str,
    "input": str,
    "input_layout": str,
    "lengths_input": str,
    "mask_input": str,
    "output": str,
    "output_layout": str,
    "output_dim": int,
    "sample_rate": int,
    "hop_samples": int,
    "receptive_field_samples": int,
    "first_frame_center_samples": float,
    "min_samples": int,
    "max_samples": int,
    "chunk_samples": int,
    "amplitude": str,
    "normalize": str,
    "license": str,
    "source": str,
    **frontends.KEYS,
}


_CHOICES: dict[str, frozenset[str]] = {
    "input_kind": frozenset({"waveform", "features"}),
    "amplitude": frozenset({"unit", "int16"}),
    "normalize": frozenset({"none", "zscore"}),
    **frontends.CHOICES,
}


_COMMAND_LINE = "--contract"


# sherpa-onnx's own words in metadata: two keys without the prefix, and a flag that says what `xares.amplitude` says.
_PLAIN = ("sample_rate", "output_dim")


_NORMALIZE_SAMPLES = {"unit": "1", "int16": "0"}


# What a source says of features is void where one before it says that the model takes a waveform, or another preset.
_OF_A_KIND = {"amplitude", "normalize", "input_layout", "min_samples", "max_samples", "chunk_samples"}


_POSITIVE = {"output_dim", "sample_rate", "hop_samples", "min_samples", "max_samples", "chunk_samples"}


class Declaration(msgspec.Struct, frozen=True):
    """A value somebody declared, and who."""

    value: str | int | float
    source: str


Declarations = dict[str, Declaration]


def declared_on_command_line(pairs: Iterable[str]) -> Declarations:
    """`--contract KEY=VALUE` options."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--contract {pair!r} must be KEY=VALUE, such as sample_rate=16000")
        found[key.strip()] = value.strip()
    return _read(found, _COMMAND_LINE, strict=True)


def declared_in_sidecar(path: Path) -> Declarations:
    """`<stem>.toml` beside the model, where there is one."""
    text = _small_text(path)
    if text is None:
        return {}
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ContractError(f"{path} beside the model is not valid TOML: {error}") from error
    if isinstance(table := raw.get("frontend"), dict):  # a table [frontend], or keys with a dot
        raw = {key: value for key, value in raw.items() if key != "frontend"}
        raw |= {frontends.PREFIX + key: value for key, value in table.items()}
    return _read(raw, path.name, strict=True)


def declared_in_metadata(metadata: Mapping[str, str]) -> Declarations:
    """A model's own `metadata_props`: `xares.*` keys first, then sherpa-onnx's plain ones."""
    plain = {key: metadata[key] for key in _PLAIN if key in metadata}
    if metadata.get("normalize_samples") in ("0", "1"):  # sherpa-onnx: 0 means samples scaled to 16-bit integers
        plain["amplitude"] = "unit" if metadata["normalize_samples"] == "1" else "int16"
    own = {key.removeprefix("xares."): value for key, value in metadata.items() if key.startswith("xares.")}
    _check_version(metadata)
    own.pop("contract_version", None)
    return _read({**plain, **own}, "metadata", strict=False)


def metadata_with(metadata: Mapping[str, str], declared: Declarations) -> dict[str, str]:
    """Metadata that declares this too. Whatever else it says is kept, except what said the same under another name.

    Raises `ContractError` where it is of a contract version that this program does not know.
    """
    _check_version(metadata)
    written = {"xares.contract_version": str(CONTRACT_VERSION)}
    for name, declaration in declared.items():
        written[name if name in _PLAIN else f"xares.{name}"] = str(declaration.value)
    if "amplitude" in declared:
        written["normalize_samples"] = _NORMALIZE_SAMPLES[str(declared["amplitude"].value)]
    superseded = {f"xares.{name}" for name in _PLAIN if name in declared}
    return {**{key: value for key, value in metadata.items() if key not in superseded}, **written}


def declared_by_preprocessor(path: Path) -> Declarations:
    """Hugging Face's `preprocessor_config.json` beside the model, where there is one."""
    text = _small_text(path)
    if text is None:
        return {}
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path} beside the model is not valid json: {error}") from error
    if not isinstance(raw, dict):
        raise ContractError(f"{path} beside the model is not a json object")
    try:
        return _read(declared_by_extractor(raw), path.name, strict=False)
    except NotComputedError as error:  # an error only where nothing else says what goes in
        rate = {"sample_rate": raw["sampling_rate"]} if "sampling_rate" in raw else {}
        return {
            **_read(rate, path.name, strict=False),
            "input_kind": Declaration("features", f"{path.name} ({error})"),
        }


def merge(*by_precedence: Declarations) -> Declarations:
    """The first declaration of each key wins; what is said of another kind of input, or another preset, is left out."""
    merged: Declarations = {}
    for declarations in by_precedence:
        if _differ("input_kind", declarations, merged):
            declarations = {
                key: by for key, by in declarations.items() if key not in _OF_A_KIND and not key.startswith(frontends.PREFIX)
            }
        if _differ("frontend.preset", declarations, merged):
            declarations = {key: by for key, by in declarations.items() if not key.startswith(frontends.PREFIX)}
        merged = {**declarations, **merged}
    return merged


def _differ(key: str, one: Declarations, other: Declarations) -> bool:
    return key in one and key in other and one[key].value != other[key].value


def declared_frontend(declared: Declarations, mels: int | None) -> tuple[Frontend, dict[str, str]]:
    """The front end of a model that takes features, and where each of its fields is from, as `frontend.KEY`.

    `mels` are the bands that the graph shows, where nobody declares them. Raises `ContractError` where it cannot be made.
    """
    said = {key: by for key, by in declared.items() if key.startswith(frontends.PREFIX)}
    rate = declared["sample_rate"].value if "sample_rate" in declared else DEFAULT_SAMPLE_RATE
    own = {key.removeprefix(frontends.PREFIX): by.value for key, by in said.items()}
    frontend = make_frontend(own, int(rate), mels)
    sources = {key: said[key].source if key in said else f"preset {frontend.preset}" for key in frontends.KEYS}
    if mels and "frontend.mels" not in said:
        sources["frontend.mels"] = "graph"
    return frontend, sources


def _check_version(metadata: Mapping[str, str]) -> None:
    version = metadata.get("xares.contract_version", str(CONTRACT_VERSION))
    if version.strip() != str(CONTRACT_VERSION):
        raise ContractError(
            f"the model declares contract version {version[:20]!r}, this program reads {CONTRACT_VERSION}; update it"
        )


def _read(raw: Mapping[str, Any], source: str, *, strict: bool) -> Declarations:
    declarations: Declarations = {}
    for key, value in raw.items():
        name = key.removeprefix("xares.")
        if name not in _DECLARABLE:
            if strict or name.startswith(frontends.PREFIX):  # other features than meant would be a wrong score
                wrong = UsageError if strict else ContractError
                raise wrong(f"{source}: there is no contract key {name!r}{nearest(name, _DECLARABLE)}")
            continue
        declarations[name] = Declaration(_value(name, value, source), source)
    of_features = next((name for name in declarations if name.startswith(frontends.PREFIX)), None)
    if of_features and declarations.setdefault("input_kind", Declaration("features", source)).value != "features":
        wrong = UsageError if source == _COMMAND_LINE else ContractError
        raise wrong(f"{source} declares both input_kind=waveform and {of_features}, which only features have; drop one")
    return declarations


def _value(name: str, value: Any, source: str) -> str | int | float:
    reader = _DECLARABLE[name]
    # On the command line a wrong value is wrong usage; beside or inside a model it is the model's.
    wrong = UsageError if source == _COMMAND_LINE else ContractError
    try:
        parsed = reader(str(value).strip())
        if reader is float and not math.isfinite(parsed):
            raise ValueError
        if reader is str:
            parsed.encode()
    except ValueError:
        kind = "a whole number" if reader is int else "a number" if reader is float else "UTF-8 text"
        raise wrong(f"{source}: {name}={str(value)[:40]!r} is not {kind}") from None
    if name in _POSITIVE and not 0 < parsed < 1 << 31:
        raise wrong(f"{source}: {name}={str(parsed)[:40]} must be from 1 to {(1 << 31) - 1}")
    low, high = frontends.RANGES.get(name, (-math.inf, math.inf))
    if name in frontends.RANGES and not low <= parsed <= high:
        raise wrong(f"{source}: {name}={str(parsed)[:40]} must be from {low:g} to {high:g}")
    if name in _CHOICES and parsed not in _CHOICES[name]:
        raise wrong(f"{source}: {name}={parsed!r} must be one of {', '.join(sorted(_CHOICES[name]))}")
    if name == "input_layout" and not re.fullmatch(r"(?!.*([BTF]).*\1)[BTF1]*T[BTF1]*", parsed):
        raise wrong(
            f"{source}: {name}={parsed!r} must name each axis, B the batch, T the samples or frames, F the bins of features "
            "and 1 one of size one, such as BT or BFT"
        )
    if name == "output_layout" and not re.fullmatch(r"(?!.*([BTD]).*\1)[BTD1]*D[BTD1]*", parsed):
        raise wrong(
            f"{source}: {name}={parsed!r} must name each axis, B the batch, T the frames, D the dimension and 1 one of size "
            "one, such as BTD"
        )
    return parsed  # type: ignore[no-any-return]


def _small_text(path: Path, limit: int = 1 << 20) -> str | None:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise ContractError(f"{path} beside the model cannot be read (it is not a regular file)")
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ContractError(f"{path} is larger than 1 MiB; it should hold a few declarations")
        return data.decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{path} beside the model cannot be read ({error})") from error
