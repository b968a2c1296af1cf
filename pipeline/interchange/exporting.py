"""Export: a round of a cache as one Parquet file for `datasets`, pandas or DuckDB, one rollout a row.

    prompt_index, sample_index                  which rollout
    prompt | messages, answer, source, id       the prompt's record; answer is a list if any prompt has several;
                                                columns that were kept for teachers; tools, teacher_messages, and
                                                messages with more than text are the text of their JSON
    prompt_token_ids, response_token_ids        lists
    rollout_logprobs, trained, finish_reason    list, list of 0 and 1, stop | length | other
    student.NAME, teacher.TEACHER.NAME          a scorer's arrays: a list over the response's tokens, of lists where
                                                there are K values a token

Unknown and unscored values are null; so is the whole list if a scorer has not scored the block. NAMEs are
those of the cache (cache_schema/SPEC.md). JSON under `redpen` in the schema's metadata has the manifests of round and
scorers, digests of their blocks, and the prompts without any rollout, which have no row. One block is in memory at a
time and makes one row group; the file appears when it is complete. `redpen import` restores round and scores from it
(`pipeline.interchange.restoring`).

    redpen export-cache CACHE -o DIR_OR_FILE
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

import cache_schema as cs
from pipeline.console import progress, show, warn
from pipeline.disk import readable
from pipeline.errors import RedpenError, shorten
from pipeline.files import atomic_file
from pipeline.interchange.rows import column_name
from pipeline.rounds.scored_block import prompts_without_rollouts
from pipeline.text.answers import answers_of

_TEXTS = ("prompt", "answer", "source", "id")
_JSON_FIELDS = ("messages", "teacher_messages", "tools")
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def run(cache_url: str, output: str, *, round_index: int | None = None) -> int:
    """Write a round's committed blocks; returns the exit code 0.

    Args:
        output: a name ending in .parquet, or a directory for `round-00000.parquet`. An existing file is replaced.
        round_index: the latest round by default.

    Raises:
        CacheError: not a cache, no finished block, or a damaged one.
        RedpenError: `output` is a file without the suffix .parquet.
    """
    round_ = cs.open(cache_url).round(round_index)
    blocks = np.flatnonzero(round_.rollouts.committed()).tolist()
    if not blocks:
        raise cs.CacheError(
            f"cache {cache_url} round {round_.index}: no block of rollouts is finished, nothing to export"
        )
    path = Path(output) if output.endswith(".parquet") else Path(output, f"round-{round_.index:05d}.parquet")
    if path.parent.is_file():
        raise RedpenError(f"-o {output}: expected a name ending in .parquet or a directory, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    exporter = BlockExporter(round_)
    with (
        atomic_file(path) as file,
        parquet.ParquetWriter(file, exporter.schema, compression="zstd") as writer,
        progress("export", len(blocks)) as bar,
    ):
        for table in cs.read_ahead(exporter.table, blocks, [round_.rollouts, *exporter.scorers.values()]):
            writer.write_table(table, row_group_size=table.num_rows)
            bar.advance()
    groups: dict[str, cs.BlockGroup[Any]] = {"rollouts": round_.rollouts, **exporter.scorers}
    for name, group in groups.items():
        if n_missing := round_.n_blocks - int(group.committed().sum()):
            left = "left out" if name == "rollouts" else "null"
            warn(f"{name}: {n_missing} of {round_.n_blocks} blocks are not finished, and {left} in the export")
    rows = int(round_.rollouts.commits()["rows"].sum())
    show(f"export: {rows:,} rollouts of {cache_url} round {round_.index} in {path}, {readable(path.stat().st_size)}")
    show(f'next: datasets.load_dataset("parquet", data_files="{path}")')
    return 0


class BlockExporter:
    """Turns blocks of a round into tables of one schema."""

    def __init__(self, round_: cs.Round):
        self._round = round_
        self.scorers = {name: round_.scores(name) for name in round_.scorer_names()}
        numbers = {code: pa.from_numpy_dtype(np.dtype(code)) for code in ("u1", "i4", "i8", "f4")}
        fields: dict[str, Any] = {"prompt_index": numbers["i8"], "sample_index": numbers["i4"]}
        fields |= {"messages": _MESSAGES, **dict.fromkeys((*_TEXTS, "finish_reason"), pa.string())}
        records = [round_.prompts[index] for index in range(round_.n_prompts)]
        if any(isinstance(record.get("answer"), list) for record in records):
            fields["answer"] = pa.list_(pa.string())
        self._as_json = [name for name in _JSON_FIELDS if any(name in record for record in records)]
        if all(map(_has_plain_messages, records)):
            self._as_json = [name for name in self._as_json if name != "messages"]
        fields |= dict.fromkeys(self._as_json, pa.string())
        fields |= {"prompt_token_ids": pa.list_(numbers["i4"]), "response_token_ids": pa.list_(numbers["i4"])}
        fields |= {"rollout_logprobs": pa.list_(numbers["f4"]), "trained": pa.list_(numbers["u1"])}
        for name, group in self.scorers.items():
            sizes = {"candidate": group.manifest.candidates, "topk": group.manifest.topk}
            for spec in group.specs:
                value = numbers[spec.dtype]
                for dim in spec.dims[1:]:
                    value = pa.list_(value, sizes[dim])
                fields[column_name(name, spec)] = pa.list_(value)
        self._more = _more_columns(records, round_, fields)
        fields |= self._more
        about = {
            "round": round_.index,
            "manifest": round_.manifest.to_json(),
            "scores": {name: group.manifest.to_json() for name, group in self.scorers.items()},
            "format_version": round_.cache.version,
            "columns": [*self._more],
            "without_rollouts": _without_rollouts(round_),
            "digests": {"rollouts": _digests(round_.rollouts)} | {n: _digests(g) for n, g in self.scorers.items()},
        }
        self.schema = pa.schema(list(fields.items()), metadata={"redpen": json.dumps(about)})

    def table(self, block: int) -> Any:
        """The block's rollouts, in their order."""
        rollouts: cs.RolloutBlock = self._round.rollouts.read(block)
        prompts = [rollouts.prompt(row) for row in range(rollouts.n_rows)]
        records = [self._round.prompts[index] for index in rollouts.prompt_index.tolist()]
        bounds = np.append(rollouts.response_start, rollouts.n_tokens)
        columns: dict[str, Any] = {
            "prompt_index": rollouts.prompt_index[rollouts.row_prompt],
            "sample_index": rollouts.sample_index,
            "prompt_token_ids": _lists(np.cumsum([0, *map(len, prompts)]), np.concatenate(prompts)),
            "response_token_ids": _lists(bounds, rollouts.token_ids),
            "rollout_logprobs": _lists(bounds, rollouts.rollout_logprobs),
            "trained": _lists(bounds, rollouts.trained),
            "finish_reason": [cs.FINISH_NAMES[code] for code in rollouts.finish_reason.tolist()],
        }
        for field in ("messages", *_TEXTS, *self._more):
            columns[field] = [records[prompt].get(field) for prompt in rollouts.row_prompt.tolist()]
        for field in self._as_json:
            values = [records[prompt].get(field) for prompt in rollouts.row_prompt.tolist()]
            columns[field] = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        if pa.types.is_list(self.schema.field("answer").type):
            columns["answer"] = [answers_of(records[prompt]) for prompt in rollouts.row_prompt.tolist()]
        for name, group in self.scorers.items():
            scores = group.read(block) if group.is_committed(block) else None
            for spec in group.specs:
                value = None if scores is None else _lists(bounds, getattr(scores, spec.name))
                columns[column_name(name, spec)] = [None] * rollouts.n_rows if value is None else value
        arrays = []
        for field in self.schema:
            try:
                arrays.append(pa.array(columns[field.name], field.type))
            except (pa.ArrowException, OverflowError) as error:  # a prompt record with a field of another type
                raise cs.CacheError(
                    f"cache {self._round.cache.url} round {self._round.index} block {block}: {field.name}: expected "
                    f"{field.type}, found something else ({shorten(error, 100)})"
                ) from None
        return pa.table(arrays, schema=self.schema)


def _has_plain_messages(record: dict[str, Any]) -> bool:
    """Whether its messages, if any, have role and content alone, both text: one type of Parquet holds them all."""
    return all(
        message.keys() == {"role", "content"} and isinstance(message["content"], str)
        for message in record.get("messages", ())
    )


def _more_columns(records: Sequence[dict[str, Any]], round_: cs.Round, known: Mapping[str, Any]) -> dict[str, Any]:
    """Types of the prompts' other columns, for teachers' texts; `known` are the columns of the export itself."""
    found = {}
    for name in sorted({name for record in records for name in record} - {"messages", *_TEXTS, *_JSON_FIELDS}):
        values, problem = [record.get(name) for record in records], "has values of several types"
        try:
            column = pa.array(values)
            if name in known:
                problem = "has the name of one of rollouts"
            elif column.to_pylist() == values:
                found[name] = column.type
                continue
        except (pa.ArrowException, OverflowError):
            pass
        warn(f"{round_.cache.url}: column {name} of the prompts {problem}; it is left out")
    return found


def _without_rollouts(round_: cs.Round) -> list[tuple[int, dict[str, Any], list[int]]]:
    """Number, record and token ids of the prompts without rollouts."""
    names, found = ("prompt_start", "prompt_length", "prompt_token_ids"), []
    for index in prompts_without_rollouts(round_).tolist():
        block, prompt = divmod(index, round_.manifest.prompts_per_block)
        read = round_.rollouts.read_arrays(block, names)
        start, length = int(read["prompt_start"][prompt]), int(read["prompt_length"][prompt])
        found.append((index, round_.prompts[index], read["prompt_token_ids"][start : start + length].tolist()))
    return found


def _digests(group: cs.BlockGroup[Any]) -> list[str]:
    """Of every block's content, in hexadecimal digits; 0 if it is not finished."""
    return [f"{digest:x}" for digest in group.digests()]


def _lists(bounds: npt.NDArray[Any], values: npt.NDArray[Any]) -> Any:
    """Values [T] or [T, K] as one list for each span between `bounds`; NaN becomes null."""
    flat = pa.array(values.reshape(-1), from_pandas=True)
    if values.ndim == 2:
        flat = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), flat)
