"""Prompt files: JSONL, Parquet, the embedded toy prompts and data sets of the Hub, read as checked records."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import PromptsConfig
from pipeline.errors import PromptError, one_line
from pipeline.text.records import (
    FIELDS,
    RepeatedKeyError,
    check_record,
    no_prompt,
    unique_keys,
    without_filled_nulls,
)

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
# Rows of a Parquet file that are Python objects at the same time.
_ROWS = 1024
# Bytes that one line may have.
_LINE_AT_MOST = 2**26
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_prompts(
    cfg: PromptsConfig, setting: str = "prompts.path", columns: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The checked records of `cfg.path` after the first `cfg.skip`, at most `cfg.limit`, also with these `columns`.

    Raises `PromptError` naming file and line, or the `setting` that the path is from.
    """
    raw = raw_rows(cfg, tuple(dict.fromkeys((*FIELDS, *columns))), setting)
    rows = (check_record(value, place, columns) for place, value in raw)
    records = list(itertools.islice(rows, cfg.skip, None if cfg.limit is None else cfg.skip + cfg.limit))
    if not records and cfg.skip:
        raise PromptError(f"{cfg.path}: expected more than prompts.skip = {cfg.skip} prompts, the file holds fewer")
    if not records:
        raise PromptError(f"{cfg.path}: expected at least one prompt, the file holds none")
    return records


def raw_rows(
    cfg: PromptsConfig, fields: Sequence[str] = FIELDS, setting: str = "prompts.path"
) -> Iterator[tuple[str, Any]]:
    """Pairs of place (`file:line`) and raw record of `cfg.path`; of Parquet only these fields are read. Raises
    `PromptError`, naming `setting` if the path is wrong."""
    if cfg.path.startswith("toy:"):
        return json_lines(_toy_path(cfg.path, setting), cfg.path)
    path = Path(cfg.path)
    try:
        exists = path.exists()
    except OSError as error:  # a name too long for the file system
        raise PromptError(f"{cfg.path}: cannot be read: {error.strerror}") from None
    if path.suffix in _JSON_SUFFIXES and not path.is_dir():
        return json_lines(path, cfg.path, setting)
    if path.suffix == ".parquet" and not path.is_dir():
        return _parquet_rows(path, fields, setting)
    if not exists and _HUB_ID.fullmatch(cfg.path):
        return _hub_rows(cfg)
    came = "a directory" if path.is_dir() else f"a file with suffix {path.suffix!r}" if exists else "no such file"
    raise PromptError(
        f"{cfg.path}: expected a .jsonl or .parquet file, a Hub dataset id, toy:train or toy:heldout, got {came}; "
        f"set {setting}"
    )


def local_file(cfg: PromptsConfig) -> Path | None:
    """The file that `cfg.path` is read from; None if it is a data set of the Hub, or there is none.

    Raises `PromptError` for an unknown toy.
    """
    if cfg.path.startswith("toy:"):
        return _toy_path(cfg.path, "prompts.path")
    path = Path(cfg.path)
    return path if path.suffix in (*_JSON_SUFFIXES, ".parquet") and path.is_file() else None


def json_lines(path: Path, name: str, setting: str = "prompts.path") -> Iterator[tuple[str, Any]]:
    """Pairs of place (`name:line`) and the JSON value of each line that is not blank. Raises `PromptError`."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PromptError(f"{name}: expected a regular file, got a directory, a device or a pipe")
            for number in itertools.count(1):
                line = file.readline(_LINE_AT_MOST + 1)
                if not line:
                    return
                if len(line) > _LINE_AT_MOST:
                    raise PromptError(
                        f"{name}:{number}: expected at most {_LINE_AT_MOST:,} bytes a line, got more; write one "
                        "record on each line (JSONL)"
                    )
                line = line.removeprefix(b"\xef\xbb\xbf")  # files with a byte order mark, put together
                if line.strip():
                    yield f"{name}:{number}", _parse(line, f"{name}:{number}")
    except FileNotFoundError:
        raise PromptError(f"{name}: no such file; set {setting} to your prompts (JSONL or Parquet)") from None
    except OSError as error:
        raise PromptError(f"{name}: cannot be read: {error.strerror}") from None


def _toy_path(name: str, setting: str) -> Path:
    from pipeline import toy

    files = {asset.removeprefix("prompts/").removesuffix(".jsonl"): asset for asset in toy.asset_names()}
    asset = files.get(name.removeprefix("toy:"), "")
    if not asset.endswith(".jsonl"):
        known = ", ".join(f"toy:{file}" for file, path in files.items() if path.endswith(".jsonl"))
        raise PromptError(f"{name}: expected {known}; set {setting}")
    return toy.asset_path(asset)


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        raise PromptError(f"{place}: {error}") from None
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise PromptError(f"{place}: expected UTF-8, got byte 0x{byte:02x} in column {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{place}: expected one JSON object on each line, got {_show(line.decode().strip())} "
            f"({error.msg}, column {error.colno})"
        ) from None
    except RecursionError:
        raise PromptError(
            f"{place}: expected one JSON object on each line, got JSON that is nested too deeply"
        ) from None
    except ValueError as error:  # an integer of thousands of digits
        raise PromptError(f"{place}: expected one JSON object on each line, got JSON that {error}") from None


def _parquet_rows(path: Path, fields: Sequence[str], setting: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    try:
        if path.exists() and not path.is_file():
            raise PromptError(f"{path}: expected a regular file, got a device or a pipe")
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in fields if name in names]
            if twice := next((name for name in columns if names.count(name) > 1), None):
                raise PromptError(f"{path}: expected one column {twice}, got {names.count(twice)}; remove the others")
            if not {"prompt", "messages", "conversations", "text"} & set(columns):
                raise PromptError(f"{path}: {no_prompt(names, 'columns')}")
            number = 0
            kinds = {name: _narrow_floats(file.schema_arrow.field(name).type) for name in columns}
            narrow = {name: kind for name, kind in kinds.items() if kind is not None}
            for batch in file.iter_batches(_ROWS, columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    for name, kind in narrow.items():
                        value[name] = _as_written(value[name], kind)
                    yield f"{path}: row {number}", without_filled_nulls(value)
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; set {setting} to your prompts (JSONL or Parquet)") from None
    except PromptError:
        raise
    except Exception as error:  # Arrow's own, and what Python says of values that it has no type for
        raise PromptError(f"{path}: expected a Parquet file: {one_line(error)}") from None


def _narrow_floats(kind: Any) -> type[np.floating[Any]] | None:
    """numpy's type of a column of floats with less than 64 bits, or of lists of them."""
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return np.float32 if types.is_float32(kind) else np.float16 if types.is_float16(kind) else None


def _as_written(value: Any, kind: type[np.floating[Any]]) -> Any:
    """The shortest number that is the narrow one: 0.1 and not 0.10000000149."""
    if isinstance(value, list):
        return [_as_written(one, kind) for one in value]
    return None if value is None else float(str(kind(value)))


def _hub_rows(cfg: PromptsConfig) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise PromptError(
            f"{cfg.path}: no such file; to read it as a Hub dataset install `datasets` (pip install datasets)"
        ) from None
    try:
        rows: Iterable[Any] = datasets.load_dataset(cfg.path, split=cfg.split)
    except Exception as error:  # `datasets` raises whatever its network and file layers raise
        raise PromptError(f"Hub dataset {cfg.path}, split {cfg.split}: {one_line(error)}") from None
    numbered = enumerate(map(without_filled_nulls, rows), 1)
    return ((f"{cfg.path}[{cfg.split}]: row {number}", value) for number, value in numbered)


def _show(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:37] + "...", ensure_ascii=False)
