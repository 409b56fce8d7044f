"""Hugging Face data sets on disk, as the hub and `save_to_disk` lay them out, without their library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

AUDIO = {"sampling_rate": 16000, "_type": "Audio"}
AUDIO_TYPE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])

Rows = Sequence[Mapping[str, Any]]


def classes(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


def values(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def sequence(feature: Any) -> dict[str, Any]:
    return {"feature": feature, "length": -1, "_type": "Sequence"}


def table_of(rows: Rows, features: Mapping[str, Any], *, stated: bool = True) -> pyarrow.Table:
    """Rows as an Arrow table whose schema states the features, or does not."""
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if stated else None
    fields = [pyarrow.field(name, _type(feature)) for name, feature in features.items()]
    return pyarrow.Table.from_pylist(list(map(dict, rows)), pyarrow.schema(fields, metadata))


def write_hub(folder: Path, files: Mapping[str, Rows], features: Mapping[str, Any], *, group_rows: int = 3) -> Path:
    """Parquet files by their names below `folder`, of a few rows per row group."""
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table_of(rows, features), path, row_group_size=group_rows)
    return folder


def write_saved(folder: Path, files: Sequence[Rows], features: Mapping[str, Any], *, batch_rows: int = 3) -> Path:
    """One split as `save_to_disk` writes it: streams of record batches, `state.json` and `dataset_info.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05}-of-{len(files):05}.arrow" for number in range(len(files))]
    for name, rows in zip(names, files, strict=True):
        write_arrow(folder / name, table_of(rows, features, stated=False), batch_rows=batch_rows)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None, "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features, "description": ""}))
    return folder


def write_arrow(path: Path, table: pyarrow.Table, *, batch_rows: int = 3, compression: str | None = None) -> Path:
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, batch_rows)
    return path


def _type(feature: Any) -> pyarrow.DataType:
    if isinstance(feature, list):
        return pyarrow.list_(_type(feature[0]))
    if isinstance(feature, dict) and "_type" not in feature:
        return pyarrow.struct([(name, _type(inner)) for name, inner in feature.items()])
    if feature["_type"] == "Audio":
        return AUDIO_TYPE
    if feature["_type"] == "ClassLabel":
        return pyarrow.int64()
    if feature["_type"] == "Sequence":
        inner = feature["feature"]
        if isinstance(inner, dict) and "_type" not in inner:  # a record of sequences
            return pyarrow.struct([(name, pyarrow.list_(_type(each))) for name, each in inner.items()])
        return pyarrow.list_(_type(inner))
    return getattr(pyarrow, feature["dtype"])()
