"""What is declared about a model: on the command line, beside it, in its metadata, by its preprocessor; the first wins."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...errors import ContractError, UsageError, foreign, nearest, quoted
from ...foreign import ForeignFileError, NoFileError, parse_json, parse_toml, read_small
from . import constants, tokens, windows
from . import frontend as frontends
from .configs import declared_by_config
from .contract import DEFAULT_SAMPLE_RATE
from .extractors import NotComputedError, declared_by_extractor
from .frontend import Frontend, make_frontend
from .tokens import Tokens

CONTRACT_VERSION = 1
PREPROCESSOR_CONFIG, CONFIG = "preprocessor_config.json", "config.json"

# What may be declared, and how its text is read. In a model's metadata each has the prefix `xares.`.
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
    "chunk_overlap": str,
    "amplitude": str,
    "normalize": str,
    "license": str,
    "source": str,
    **tokens.KEYS,
    **windows.KEYS,
    **frontends.KEYS,
    **frontends.MODEL_KEYS,
}
_CHOICES: dict[str, frozenset[str]] = {
    "input_kind": frozenset({"waveform", "features"}),
    "amplitude": frozenset({"unit", "int16"}),
    "normalize": frozenset({"none", "zscore"}),
    "chunk_overlap": frozenset({"none", "window"}),
    **tokens.CHOICES,
    **frontends.CHOICES,
}
_COMMAND_LINE = "--contract"

# sherpa-onnx's own metadata: two keys without the prefix, and a flag with the meaning of `xares.amplitude`.
_PLAIN = ("sample_rate", "output_dim")
_NORMALIZE_SAMPLES = {"unit": "1", "int16": "0"}

# These depend on the kind of input: a source that declares another kind than the source before it does not count for them.
_DEPEND_ON_INPUT = {"amplitude", "normalize", "input_layout", "min_samples", "max_samples", "chunk_samples"}
_MAX_TEXT = 1_000  # characters of a declared value
_MAX_NUMBERS = 64_000  # characters of an input's numbers
_PREPROCESSOR_BYTES = 2_000_000  # some hold their mel filters, 80 or 128 times 201 numbers
_POSITIVE = {"output_dim", "sample_rate", "hop_samples", "min_samples", "max_samples", "chunk_samples", *windows.KEYS}


class Declaration(msgspec.Struct, frozen=True):
    """A declared value, and where it was declared."""

    value: str | int | float
    source: str


Declarations = dict[str, Declaration]


def declared_on_command_line(pairs: Iterable[str]) -> Declarations:
    """Read `--contract KEY=VALUE` options.

    Raises:
        UsageError: An option is malformed, or its key or value is unknown.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--contract {quoted(pair)} must be KEY=VALUE, such as sample_rate=16000")
        values[key.strip()] = value.strip()
    return _read(values, _COMMAND_LINE, strict=True)


def declared_in_sidecar(path: Path) -> Declarations:
    """Read `<stem>.toml` beside a model; a missing file declares nothing.

    Raises:
        UsageError: A key is unknown.
        ContractError: The file cannot be read, or a value is wrong.
    """
    try:
        raw = parse_toml(read_small(path))
    except NoFileError:
        return {}
    except ForeignFileError as error:
        raise ContractError(f"{path} beside the model cannot be read ({error})") from error
    for prefix in (
        frontends.PREFIX,
        tokens.PREFIX,
        windows.PREFIX,
        constants.PREFIX,
    ):  # a table [frontend], or keys with a dot
        name = prefix.removesuffix(".")
        if isinstance(table := raw.get(name), dict):
            raw = {key: value for key, value in raw.items() if key != name}
            raw |= {prefix + key: value for key, value in table.items()}
    return _read(raw, path.name, strict=True)


def declared_in_metadata(metadata: Mapping[str, str]) -> Declarations:
    """Read a model's own `metadata_props`: `xares.*` keys first, then sherpa-onnx's plain ones.

    Raises:
        ContractError: It is of an unknown contract version, or a value is wrong.
    """
    plain = {key: metadata[key] for key in _PLAIN if key in metadata}
    if metadata.get("normalize_samples") in ("0", "1"):  # sherpa-onnx: 0 means samples scaled to 16-bit integers
        plain["amplitude"] = "unit" if metadata["normalize_samples"] == "1" else "int16"
    own = {key.removeprefix("xares."): value for key, value in metadata.items() if key.startswith("xares.")}
    _check_version(metadata)
    own.pop("contract_version", None)
    return _read({**plain, **own}, "metadata", strict=False)


def metadata_with(metadata: Mapping[str, str], declared: Declarations) -> dict[str, str]:
    """The metadata with these declarations added. Its other keys stay, except those with the same meaning.

    Raises:
        ContractError: The metadata is of an unknown contract version.
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
    """Read Hugging Face's `preprocessor_config.json` beside a model; a missing file declares nothing.

    Raises:
        ContractError: The file cannot be read, or a value is wrong.
    """
    try:
        raw = parse_json(read_small(path, _PREPROCESSOR_BYTES), dict[str, Any])
    except NoFileError:
        return {}
    except ForeignFileError as error:
        raise ContractError(f"{path} beside the model cannot be read ({error})") from error
    try:
        return _read(declared_by_extractor(raw), path.name, strict=False)
    except NotComputedError as error:  # an error only if nothing else declares the input
        rate = {"sample_rate": raw["sampling_rate"]} if "sampling_rate" in raw else {}
        return {
            **_read(rate, path.name, strict=False),
            "input_kind": Declaration("features", f"{path.name} ({error})"),
        }


def declared_beside(folder: Path) -> Declarations:
    """What files of Hugging Face beside a model declare: of the input `preprocessor_config.json`, of tokens `config.json`.

    Raises:
        ContractError: `preprocessor_config.json` cannot be read, or a value is wrong. Any program may write a `config.json`.
    """
    path = folder / CONFIG
    try:
        raw = parse_json(read_small(path, _PREPROCESSOR_BYTES), dict[str, Any])
    except ForeignFileError:
        raw = {}
    of_config = _read(declared_by_config(raw), path.name, strict=False)
    return merge(declared_by_preprocessor(folder / PREPROCESSOR_CONFIG), of_config)


def merge(*by_precedence: Declarations) -> Declarations:
    """All declarations, of which the first of each key wins. Those for another kind of input or preset are left out."""
    merged: Declarations = {}
    for declarations in by_precedence:
        if _differ("input_kind", declarations, merged):
            declarations = {
                key: declaration
                for key, declaration in declarations.items()
                if key not in _DEPEND_ON_INPUT and not key.startswith(frontends.PREFIX)
            }
        if _front(declarations) and _front(merged) and _front(declarations) != _front(merged):
            declarations = {key: value for key, value in declarations.items() if not key.startswith(frontends.PREFIX)}
        merged = {**declarations, **merged}
    return merged


def _differ(key: str, one: Declarations, other: Declarations) -> bool:
    return key in one and key in other and one[key].value != other[key].value


def _front(declarations: Declarations) -> list[tuple[str, Any]]:
    """The keys that name a front end, with their values."""
    return [(key, declarations[key].value) for key in ("frontend.preset", "frontend.model") if key in declarations]


def declared_frontend(declared: Declarations, mels: int | None) -> tuple[Frontend, dict[str, str]]:
    """The front end of a model that takes features, and where each of its fields is from.

    Args:
        declared: What is declared of the model.
        mels: The bands that the graph shows; they count only if nothing declares them.

    Returns:
        The front end, and the source of each field by its key `frontend.KEY`.

    Raises:
        ContractError: The declarations make no front end.
    """
    own = {key: declaration for key, declaration in declared.items() if key.startswith(frontends.PREFIX)}
    if graph := [key for key in own if key in frontends.MODEL_KEYS]:
        raise ContractError(
            f"{own[graph[0]].source} declares {graph[0]}, which only a front end that is a graph has; declare its file by "
            "--contract frontend.model=FILE.onnx, or frontend.mean and frontend.std in its place"
        )
    rate = declared["sample_rate"].value if "sample_rate" in declared else DEFAULT_SAMPLE_RATE
    values = {key.removeprefix(frontends.PREFIX): declaration.value for key, declaration in own.items()}
    frontend = make_frontend(values, int(rate), mels)
    sources = {key: own[key].source if key in own else f"preset {frontend.preset}" for key in frontends.KEYS}
    if mels and "frontend.mels" not in own:
        sources["frontend.mels"] = "graph"
    return frontend, sources


def declared_frontend_model(declared: Declarations) -> str | None:
    """The file of the graph that makes the features, as declared; None if none is.

    Raises:
        ContractError: Its features are computed by a preset too.
    """
    if "frontend.model" not in declared:
        return None
    model = declared["frontend.model"]
    if other := [key for key in declared if key.startswith(frontends.PREFIX) and key not in frontends.MODEL_KEYS]:
        raise ContractError(
            f"{model.source} declares frontend.model={foreign(str(model.value))}, which makes the features as it is, and "
            f"{declared[other[0]].source} {other[0]}={foreign(str(declared[other[0]].value))}; drop one"
        )
    return str(model.value)


def declared_windows(declared: Declarations) -> tuple[dict[str, Any], str]:
    """What is declared by `window.` keys, without their prefix, and where."""
    own = {key: declaration for key, declaration in declared.items() if key.startswith(windows.PREFIX)}
    values = {key.removeprefix(windows.PREFIX): declaration.value for key, declaration in own.items()}
    return values, " and ".join(sorted({declaration.source for declaration in own.values()}))


def declared_tokens(declared: Declarations) -> Tokens | None:
    """How an output's tokens lie; None if nothing is declared of them.

    Raises:
        ContractError: The declarations contradict each other.
    """
    own = {key: declaration for key, declaration in declared.items() if key.startswith(tokens.PREFIX)}
    values = {key.removeprefix(tokens.PREFIX): declaration.value for key, declaration in own.items()}
    return tokens.make_tokens(values, " and ".join(sorted({declaration.source for declaration in own.values()})))


def _check_version(metadata: Mapping[str, str]) -> None:
    version = metadata.get("xares.contract_version", str(CONTRACT_VERSION))
    if version.strip() != str(CONTRACT_VERSION):
        raise ContractError(
            f"the model declares contract version {quoted(version[:20])}, this program reads {CONTRACT_VERSION}; update it"
        )


def _read(raw: Mapping[str, Any], source: str, *, strict: bool) -> Declarations:
    declarations: Declarations = {}
    for key, value in raw.items():
        name = key.removeprefix("xares.")
        if name not in _DECLARABLE and not name.startswith(constants.PREFIX):
            if strict or name.startswith(
                (frontends.PREFIX, tokens.PREFIX, windows.PREFIX)
            ):  # a key of the wrong name gives a wrong score
                kind = UsageError if strict else ContractError
                raise kind(f"{source}: there is no contract key {quoted(name)}{nearest(name, _DECLARABLE)}")
            continue
        declarations[name] = Declaration(_value(name, value, source), source)
    of_features = next((name for name in declarations if name.startswith(frontends.PREFIX)), None)
    if of_features and declarations.setdefault("input_kind", Declaration("features", source)).value != "features":
        kind = UsageError if source == _COMMAND_LINE else ContractError
        raise kind(f"{source} declares both input_kind=waveform and {of_features}, which only features have; drop one")
    return declarations


def _value(name: str, value: Any, source: str) -> str | int | float:
    # On the command line a wrong value is wrong usage; beside or inside a model it is an error of the model.
    error_class = UsageError if source == _COMMAND_LINE else ContractError
    if name.startswith(constants.PREFIX):
        return _constant(name, value, source, error_class)
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise error_class(f"{source}: {name} has {len(value)} characters; the most is {_MAX_TEXT}")
    reader = _DECLARABLE[name]
    try:
        parsed = reader(str(value).strip())
        if reader is float and not math.isfinite(parsed):
            raise ValueError
        if reader is str:
            parsed.encode()
    except ValueError:
        kind = "a whole number" if reader is int else "a number" if reader is float else "UTF-8 text"
        raise error_class(f"{source}: {name}={quoted(str(value)[:40])} is not {kind}") from None
    if name in _POSITIVE and not 0 < parsed < 1 << 31:
        raise error_class(f"{source}: {name}={str(parsed)[:40]} must be from 1 to {(1 << 31) - 1}")
    low, high = frontends.RANGES.get(name, (-math.inf, math.inf))
    if name in frontends.RANGES and not low <= parsed <= high:
        raise error_class(f"{source}: {name}={str(parsed)[:40]} must be from {low:g} to {high:g}")
    if name in _CHOICES and parsed not in _CHOICES[name]:
        raise error_class(f"{source}: {name}={quoted(parsed)} must be one of {', '.join(sorted(_CHOICES[name]))}")
    if name == f"{tokens.PREFIX}prefix" and not 0 <= parsed <= tokens.MOST_PREFIX:
        raise error_class(f"{source}: {name}={str(parsed)[:40]} must be from 0 to {tokens.MOST_PREFIX}")
    if name == f"{tokens.PREFIX}grid":
        try:
            tokens.parsed_grid(parsed)
        except ValueError:
            raise error_class(f"{source}: {name}={quoted(parsed)} must be {tokens.GRID_FORM}") from None
    if name == "input_layout" and not re.fullmatch(r"(?!.*([BTF]).*\1)[BTF1]*T[BTF1]*", parsed):
        raise error_class(
            f"{source}: {name}={quoted(parsed)} must name each axis: B the batch, T the samples or frames, F the bins of "
            "features, 1 an axis of size one, such as BT or BFT"
        )
    if name == "output_layout" and not re.fullmatch(r"(?!.*([BTD]).*\1)[BTD1]*D[BTD1]*", parsed):
        raise error_class(
            f"{source}: {name}={quoted(parsed)} must name each axis: B the batch, T the frames, D the dimension, 1 an "
            "axis of size one, such as BTD"
        )
    return parsed  # type: ignore[no-any-return]


def _constant(name: str, value: Any, source: str, error_class: type[UsageError | ContractError]) -> str:
    try:
        text = value.strip() if isinstance(value, str) else json.dumps(value)
        if len(text) > _MAX_NUMBERS:
            raise ValueError
        constants.parsed(text)
    except (ValueError, TypeError, RecursionError):
        raise error_class(
            f"{source}: {foreign(name)}={foreign(str(value)[:60])} must be a number, true, false, or a short list of "
            "these, such as [0, 0.5]"
        ) from None
    return text
