"""The encoder contract (DESIGN section 4): what is declared about a model, by whom, and the law of its frames.

Nothing here runs a model; `measure` does, and fills a `Contract` from declarations and measurements.
"""

from __future__ import annotations

import ast
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from ...errors import ContractError, UsageError, nearest
from . import frontend as frontends
from .extractors import NotComputedError, declared_by_extractor
from .frontend import Frontend, make_frontend

DEFAULT_SAMPLE_RATE = 16_000
DEFAULT_CHUNK_SECONDS = 10.0
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


class FrameLaw(msgspec.Struct, frozen=True):
    """frames(n) = floor((n - receptive_field) / hop) + 1, in samples.

    `receptive_field` is the law's constant: a front end that pads is shorter by its padding, down to 0 and below.
    """

    hop: int
    receptive_field: int

    def frames(self, samples: int) -> int:
        return max(0, (samples - self.receptive_field) // self.hop + 1)

    def first_length_with(self, frames: int) -> int:
        """The shortest input, in samples, that gives this many frames."""
        return self.receptive_field + (frames - 1) * self.hop


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """How to feed a model and read it. Lengths are in samples at `sample_rate`; `sources` says where each field is from.

    `input_layout` and `output_layout` name each axis: B the batch, T the samples or frames, F the bins of features, D the
    dimension, 1 an axis of size one. A clip-only encoder (no T) has no hop and no frame centre. A model that takes features
    has a `frontend`, which makes them of waveforms; lengths are in samples all the same, but for lengths and masks that
    the model is fed, which count frames. Where the graph fixes the batch, `fixed_batch` is its size; where the samples are
    fixed, every chunk is a window of `chunk_samples`, which gives `window_frames` frames, and the hop may be a fraction.
    """

    input: str
    input_layout: str
    lengths_input: str | None
    output: str
    output_layout: str
    dim: int
    sample_rate: int
    hop_samples: int | float | None
    receptive_field_samples: int | None
    first_frame_center_samples: float | None
    min_samples: int
    max_samples: int | None
    chunk_samples: int
    amplitude: Literal["unit", "int16"]
    normalize: Literal["none", "zscore"]
    dynamic_batch: bool
    batch_coupled: bool
    mask_input: str | None = None
    fixed_batch: int | None = None
    window_frames: int | None = None
    frontend: Frontend | None = None
    license: str | None = None
    source: str | None = None
    sources: dict[str, str] = {}

    @property
    def clip_only(self) -> bool:
        return self.hop_samples is None

    @property
    def fixed_window(self) -> bool:
        """Whether every chunk has the one length that the model takes."""
        return self.min_samples == self.max_samples

    def frames_of(self, samples: int) -> int:
        """How many frames the model gives for an input; a clip-only encoder gives one vector."""
        if self.window_frames is not None:
            return self.window_frames
        if self.hop_samples is None or self.receptive_field_samples is None:
            return 1
        return FrameLaw(int(self.hop_samples), self.receptive_field_samples).frames(samples)

    def described(self) -> dict[str, dict[str, Any]]:
        """Each field as {"value", "source"}, for the record."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("sources", "frontend")}
        values["input_kind"] = "waveform" if self.frontend is None else "features"
        for name in self.frontend.__struct_fields__ if self.frontend else ():
            if name != "sample_rate":  # the contract's own
                values[frontends.PREFIX + name] = getattr(self.frontend, name)
        return {
            name: {"value": value, "source": self.sources.get(name, "not declared" if value is None else "measured")}
            for name, value in values.items()
        }


def remarks(contract: Contract) -> list[str]:
    """What a user is told about a contract: what was assumed, and what it costs to meet it."""
    notes = []
    if assumed := [
        f"{name}={value:g}" if isinstance(value := getattr(contract, name), int | float) else f"{name}={value}"
        for name in ("sample_rate", "amplitude", "normalize", "hop_samples")
        if contract.sources.get(name, "").startswith("default")
    ]:
        notes.append(f"assumed, because the model does not say: {', '.join(assumed)} (--contract changes it)")
    if contract.frontend:
        notes.append(
            f"the model takes features, made here by the preset {contract.frontend.preset}: {contract.frontend.described()} "
            "(--contract frontend.KEY=VALUE changes what nobody declared)"
        )
    if contract.fixed_window:
        filled = "copies of itself" if contract.frontend and contract.frontend.fill == "repeat" else "zeros"
        notes.append(
            f"the model takes windows of exactly {contract.chunk_samples} samples, so clips are cut into these, and "
            f"the last one is filled up with {filled}"
        )
    if contract.fixed_batch is not None and contract.fixed_batch > 1:
        notes.append(
            f"the model takes batches of exactly {contract.fixed_batch}, so each is one chunk repeated, at "
            f"{contract.fixed_batch} times the cost; export it with a dynamic batch axis to avoid that"
        )
    if contract.batch_coupled:
        notes.append("an item's embedding depends on its neighbours in a batch, so the model runs one item at a time")
    return notes


# ---------------------------------------------------------------- declarations


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


# ---------------------------------------------------------------- the frame law


def fit_frame_law(frames: Callable[[int], int], low: int, high: int) -> FrameLaw | None:
    """The law behind a frame count, from its jumps between `low` and `high` samples; None where it follows none.

    Two jumps are found by bisection (the count must not decrease), so about 2 log2(high - low) counts are asked for.
    """
    at_low, at_high = frames(low), frames(high)
    if at_high < at_low + 2 or at_low < 1:
        return None
    first = _first_length(frames, at_low + 1, low, high)
    last = _first_length(frames, at_high, first, high) if at_high > at_low + 1 else first
    hop, remainder = divmod(last - first, at_high - at_low - 1)
    if remainder or hop < 1 or frames(first) != at_low + 1:
        return None
    return FrameLaw(hop, first - at_low * hop)


def law_holds(law: FrameLaw, frames: Callable[[int], int], low: int, high: int) -> bool:
    """Whether counts agree with the law at both sides of its jumps next to `low` and `high`, and in between."""
    edges = [law.first_length_with(law.frames(low) + 1), law.first_length_with(law.frames(high))]
    lengths = {low, high, (low + high) // 2 | 1, *edges, *(edge - 1 for edge in edges)}
    return all(frames(n) == law.frames(n) for n in sorted(lengths) if low <= n <= high)


def _first_length(frames: Callable[[int], int], count: int, low: int, high: int) -> int:
    """The shortest length in (low, high] with at least `count` frames."""
    below, reached = low, high
    if frames(low) >= count:
        return low
    while reached - below > 1:
        middle = (below + reached) // 2
        below, reached = (below, middle) if frames(middle) >= count else (middle, reached)
    return reached


# ---------------------------------------------------------------- symbolic dimensions

_MAX_EXPRESSION = 300


def frames_of_dimension(expression: str, samples_name: str) -> Callable[[int], int] | None:
    """Frame count as a function of the input length, from a symbolic dimension such as `((samples//160)) + 1`.

    The grammar is whole numbers, the one name `samples_name`, + - * // / and floor, ceil, min, max. Anything else gives
    None: the dimension is then measured instead. Nothing is ever evaluated as Python.
    """
    if len(expression) > _MAX_EXPRESSION:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(_FUNCTIONS)
        if names != {samples_name}:
            return None
        _calculate(tree, 16_000)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None

    def frames(samples: int) -> int:
        try:
            return math.floor(_calculate(tree, samples))
        except (ValueError, ArithmeticError):  # such as a division by zero at just this length
            return 0

    return frames


_FUNCTIONS: dict[str, Callable[..., float]] = {"floor": math.floor, "ceil": math.ceil, "min": min, "max": max}
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Div: lambda a, b: a / b,
}


def _calculate(node: ast.expr, samples: int) -> float:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name not in _FUNCTIONS:
            return samples
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_calculate(operand, samples)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_calculate(left, samples), _calculate(right, samples))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_calculate(argument, samples) for argument in arguments))
    raise ValueError("outside the grammar")
