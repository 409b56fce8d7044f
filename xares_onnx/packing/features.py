"""What the columns of a Hugging Face data set hold: its `features`, in `dataset_info.json` or in the schema of its files.

{"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "audio": {"sampling_rate": 16000, "_type": "Audio"}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..foreign import ForeignFileError, NoFileError, parse_json, read_small
from .labels import END, NAME, START

Features = Mapping[str, Any]

INFO = "dataset_info.json"
_MAX_BYTES = 1 << 26  # 100,000 names of classes, a few times
_LISTS = ("Sequence", "List", "LargeList")


def read_features(metadata: Mapping[bytes, bytes] | None, folders: Iterable[Path]) -> Features:
    """The features that a file's schema states, else those in `dataset_info.json` of the first folder with one, else none.

    Raises:
        DataError: They cannot be read.
    """
    features = _features("the schema", (metadata or {}).get(b"huggingface", b"{}"), "info")
    for folder in folders:
        if features:
            break
        try:
            features = _features(f"{folder / INFO}", read_small(folder / INFO, _MAX_BYTES))
        except NoFileError:
            continue
        except ForeignFileError as error:
            raise DataError(f"{folder / INFO} cannot be read ({error})") from error
    return features


def _features(source: str, data: bytes, *inside: str) -> Features:
    try:
        value: Any = parse_json(data, dict[str, Any])
    except ForeignFileError as error:
        raise DataError(f"the features in {source} cannot be read ({error})") from error
    for name in (*inside, "features"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def is_audio(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "Audio"


def kind_of(feature: Any) -> str | None:
    """The kind of label that a feature is; None if that depends on what its column means."""
    if _names(feature) is not None:
        return "class"
    item = _item(feature)
    if _names(item) is not None:
        return "tags"
    if _has_events(item) or _has_events(feature):
        return "events"
    if isinstance(item, dict) and item.get("dtype") == "string":
        return "tags"
    dtype = feature.get("dtype") if isinstance(feature, dict) else None
    return "number" if isinstance(dtype, str) and dtype.startswith("float") else None


def states_classes(feature: Any) -> bool:
    """Whether a feature is a label by itself: it names its classes, or holds events."""
    return kind_of(feature) == "events" or _names(feature) is not None or _names(_item(feature)) is not None


def decode(feature: Any, value: Any) -> Any:
    """A cell with classes by name instead of by number; None for a number without a name, as -1 of an unlabelled clip."""
    if value is None:
        return None
    names, item = _names(feature), _item(feature)
    if names is not None:
        known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
        return names[value] if known else value if isinstance(value, str) else None
    if isinstance(value, list):
        return [decode(item, each) for each in value]
    record = feature if item is None else item
    if not isinstance(value, dict) or not _is_record(record):
        return value
    if not all(isinstance(column, list) for column in value.values()):
        return {name: decode(record.get(name), each) for name, each in value.items()}
    # A sequence of records is stored as a record of sequences.
    rows = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=False)]
    return [{name: decode(_inner(record.get(name)), each) for name, each in row.items()} for row in rows]


def _is_record(feature: Any) -> bool:
    return isinstance(feature, dict) and "_type" not in feature


def _has_events(feature: Any) -> bool:
    """Whether a record has the fields of an event, or a list in each of them."""
    return _is_record(feature) and all(any(name in feature for name in names) for names in (START, END, NAME))


def _inner(feature: Any) -> Any:
    """The feature of one value of a field that may be a list."""
    item = _item(feature)
    return feature if item is None else item


def _names(feature: Any) -> list[Any] | None:
    """The names of classes; None if the feature is no class."""
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    return names if isinstance(names, list) else None


def _item(feature: Any) -> Any:
    """The feature of a list's items; None if the feature is no list."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature") if isinstance(feature, dict) and feature.get("_type") in _LISTS else None
