"""Finished rollouts in a Parquet or JSONL file, row by row; every value is checked when it is read.

A field is looked for under each of its names: as a column, as a column literally named `metadata.NAME`, and within an
object `metadata`, where Lightning-OPD keeps it. Lists of numbers are never Python objects on their way from Parquet.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

import cache_schema as cs
from cache_schema.blocks import LOGPROB_TOLERANCE
from pipeline.errors import RedpenError, one_line
from pipeline.interchange.verifiers_traces import SampledTurns, TraceReader, is_episode
from pipeline.text.prompts import json_lines
from pipeline.text.records import FIELDS, without_filled_nulls

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

#: Names of each field; the first one present counts.
NAMES = {
    "rendered": ("is_lightning_opd", "is_offline_opd"),
    "prompt_index": ("prompt_index",),
    "prompt_tokens": ("prompt_tokens", "prompt_token_ids"),
    "response_tokens": ("response_tokens", "response_token_ids"),
    "rollout_logprobs": ("rollout_logprobs", "rollout_log_probs", "logprobs"),
    "teacher_logprobs": ("teacher_log_probs", "teacher_logprobs"),
    "trained": ("loss_mask", "response_mask", "trained"),
    "finish_reason": ("finish_reason",),
}
_WANTED = {*FIELDS, *(prefix + name for names in NAMES.values() for name in names for prefix in ("", "metadata."))}
_BATCH_ROWS = 64  # of long rollouts: megabytes
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class FileRow:
    """One rollout of a file, and its place for messages. Bad values raise `RedpenError`, one line.

    Attributes:
        sampled: of traces, how they were sampled.
    """

    place: str
    values: dict[str, Any]
    sampled: SampledTurns | None = None

    def get(self, name: str) -> tuple[str, Any]:
        """The field's name in this file, and its value; None if it is missing."""
        names = NAMES[name]
        for called in (*names, *(f"metadata.{called}" for called in names)):
            if self.values.get(called) is not None:
                return called, self.values[called]
        return names[0], None

    def ids(self, name: str, below: int) -> Int32 | None:
        """Token ids, at least one; None if the row has no such field."""
        called, array = self._list(name, "token ids")
        if array is None:
            return None
        if not len(array):
            raise self.fault(called, "at least one token id", "an empty list", "remove the row")
        if array.null_count or not pa.types.is_integer(array.type):
            raise self.fault(called, "a list of token ids", f"a list {_of(array)}", "give them as integers")
        ids = array.to_numpy(zero_copy_only=False)
        outside = ids[(ids < 0) | (ids >= below)]
        if len(outside):
            raise self.fault(
                called,
                f"ids in 0..{below - 1}",
                str(outside[0]),
                "if they belong to another model, set student.model to it",
            )
        return np.asarray(ids, np.int32)

    def logprobs(self, name: str, length: int) -> Float32:
        """[length], nats; NaN for nulls, or if the row has no such field."""
        called, array = self._list(name, "numbers", length)
        if array is None:
            return np.full(length, np.nan, np.float32)
        numbers = pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_null(array.type)
        if not numbers:
            raise self.fault(called, "a list of numbers", f"a list {_of(array)}", "use null for unknown values")
        array = array.cast(pa.float64(), safe=False)  # whole numbers beyond 2**53 are no log-probs either way
        known = array.drop_null().to_numpy(zero_copy_only=False)
        bad = known[~(np.abs(known) <= _LARGEST) | (known > LOGPROB_TOLERANCE)]  # as the cache will hold them
        if len(bad):
            low = f", not below {-_LARGEST:g}" if -np.inf < bad[0] < 0 else ""
            expected = f"log-probs, finite and at most 0{low}"
            raise self.fault(called, expected, f"{bad[0]:g}", "use null for unknown values")
        return np.asarray(array.to_numpy(zero_copy_only=False), np.float32)

    def mask(self, name: str, length: int) -> UInt8:
        """[length] of 0 and 1; ones if the row has no such field."""
        called, array = self._list(name, "0 and 1", length)
        if array is None:
            return np.ones(length, np.uint8)
        flags = pa.types.is_boolean(array.type) or pa.types.is_integer(array.type)
        values = array.to_numpy(zero_copy_only=False) if flags and not array.null_count else np.empty(0)
        if len(values) != length or not np.isin(values, (0, 1)).all():
            raise self.fault(
                called, "a list of 0 and 1", f"a list {_of(array)}", "1 marks tokens that the student sampled"
            )
        return values.astype(np.uint8)

    def fault(self, called: str, expected: str, got: str, remedy: str) -> RedpenError:
        return RedpenError(f"{self.place}: {called}: expected {expected}, got {got}; {remedy}")

    def _list(self, name: str, what: str, length: int | None = None) -> tuple[str, Any]:
        """The field as an Arrow array; None if the row has no such field."""
        called, value = self.get(name)
        if isinstance(value, list):
            try:
                value = pa.array(value)
            except (pa.ArrowException, OverflowError):
                raise self.fault(called, f"a list of {what}", "one of other things", "see the row") from None
        if value is not None and not isinstance(value, pa.Array):
            raise self.fault(called, f"a list of {what}", type(value).__name__, "give one value for each token")
        if value is not None and length not in (None, len(value)):
            raise self.fault(
                called, f"{length} values, one for each response token", str(len(value)), "score the rollout again"
            )
        return called, value


def column_name(scorer: str, spec: cs.ArraySpec) -> str:
    """The column of a scorer's array in an export."""
    return f"{scorer if scorer == cs.STUDENT else f'teacher.{scorer}'}.{spec.name}"


def exported_scorers(names: Iterable[str]) -> list[str]:
    """The scorers whose arrays are among the columns, as `redpen export-cache` names them."""
    found = (re.fullmatch(r"(student|teacher\.[\w-]+)\.\w+", name) for name in names)
    return sorted({each[1] for each in found if each is not None})


def read_rows(path: Path, columns: Sequence[str] = (), left_out: Counter[str] | None = None) -> Iterator[FileRow]:
    """Every row of a `.parquet` file or of one with a JSON object on each line; of Parquet also these `columns`.

    Args:
        left_out: of traces, counts what becomes no row.

    Raises:
        RedpenError: the file cannot be read, or a line is not what it should be.
    """
    if not os.path.isfile(path):  # False also for a name that cannot be
        came = "a directory" if os.path.isdir(path) else "no such file"
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
        raise RedpenError(f"{shown}: expected a Parquet or JSONL file of finished rollouts, got {came}")
    if path.suffix == ".parquet":
        return _parquet_rows(path, columns)
    return _json_rows(path, TraceReader(columns, Counter() if left_out is None else left_out))


def _json_rows(path: Path, traces: TraceReader) -> Iterator[FileRow]:
    for place, value in json_lines(path, str(path)):
        if not isinstance(value, dict):
            raise RedpenError(f"{place}: expected one JSON object on each line, got {type(value).__name__}")
        if is_episode(value):
            yield from (FileRow(*row) for row in traces.rows(place, value))
            continue
        metadata = value.get("metadata")
        within = {f"metadata.{key}": item for key, item in metadata.items()} if isinstance(metadata, dict) else {}
        yield FileRow(place, within | value)


def _parquet_rows(path: Path, more: Sequence[str]) -> Iterator[FileRow]:
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            schema, number = file.schema_arrow, 0
            every = list(schema.names)
            if every.count("metadata") == 1 and pa.types.is_struct(schema.field("metadata").type):
                every += [f"metadata.{child.name}" for child in schema.field("metadata").type]
            wanted = sorted(set(every) & {*_WANTED, *more})
            for name in [*wanted, "metadata"]:
                if (n := every.count(name)) > 1:
                    raise RedpenError(f"{path}: column {name}: expected it once, got it {n} times; remove the others")
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                columns = {name: _column(batch, name) for name in wanted}
                for row in range(batch.num_rows):
                    number += 1
                    values = {name: _value(column[row]) for name, column in columns.items()}
                    yield FileRow(f"{path}: row {number}", dict.fromkeys(schema.names) | without_filled_nulls(values))
    except RedpenError:
        raise
    except Exception as error:  # Arrow's own, and Python's for values that it has no type for, such as a far date
        raise RedpenError(f"{path}: expected a Parquet file: {one_line(error)}") from None


def _column(batch: Any, name: str) -> Any:
    return batch[name] if name in batch.schema.names else pc.struct_field(batch["metadata"], name.split(".", 1)[1])


def _value(scalar: Any) -> Any:
    """A list of numbers as an Arrow array, anything else as Python has it."""
    values = getattr(scalar, "values", None)
    is_python = not isinstance(values, pa.Array) or pa.types.is_struct(values.type) or pa.types.is_string(values.type)
    return scalar.as_py() if is_python else values


def _of(array: Any) -> str:
    return f"with {array.null_count} nulls" if array.null_count else f"of {array.type}"
