"""Restoring an export of `redpen export-cache`: the same round with the same scores, bit for bit.

The file's schema holds the manifests of round and scorers, and the digest of every block. A round is restored only if
all that the file says still has these digests; a file that was changed, or that lacks blocks, is imported like any
other, with its rollouts alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

import cache_schema as cs
from pipeline.console import progress, show, suggest
from pipeline.disk import bytes_per_token, require_free
from pipeline.distributed.signals import graceful
from pipeline.errors import PromptError
from pipeline.interchange.rows import column_name
from pipeline.models.identity import created_by
from pipeline.models.resolve import ResolvedModel
from pipeline.text.records import FIELDS, check_record


class ChangedError(Exception):
    """The file is not, or no longer, a whole export; the text says why."""


@dataclass(frozen=True)
class Export:
    """What the schema of an exported file says.

    Attributes:
        digests: by group and block; 0: not in the file.
        version: of the cache's format, which decides the digests; files from before it was exported are of version 1.
        columns: of the prompts, beside the usual ones.
        without_rollouts: record and token ids of the prompts that have no row, by their numbers.
    """

    path: Path
    manifest: cs.RoundManifest
    scores: dict[str, cs.ScoresManifest]
    digests: dict[str, list[int]]
    version: int
    columns: tuple[str, ...] = ()
    without_rollouts: Mapping[int, tuple[dict[str, Any], Sequence[int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Export | None:
        """The export in a file; None if the file is something else, or from before digests were exported."""
        if path.suffix != ".parquet" or not path.is_file():
            return None
        try:
            about = json.loads((parquet.read_schema(path).metadata or {})[b"redpen"])
            scores = {name: cs.ScoresManifest.from_json(one, name) for name, one in about["scores"].items()}
            digests = {name: [int(digest, 16) for digest in each] for name, each in about["digests"].items()}
            manifest, version = cs.RoundManifest.from_json(about["manifest"], "round"), about.get("format_version", 1)
            columns = tuple(map(str, about.get("columns", ())))
            no_row = {
                int(index): (dict(record), list(ids)) for index, record, ids in about.get("without_rollouts", ())
            }
            if not 1 <= version <= cs.VERSION:
                return None
            return cls(path, manifest, scores, digests, version, columns, no_row)
        except (
            *(pa.ArrowException, OSError, KeyError, TypeError, AttributeError),
            *(ValueError, OverflowError, RecursionError),  # JSON bounds neither numbers nor nesting
        ):
            return None

    def check(self, student: ResolvedModel) -> list[dict[str, Any]]:
        """The prompts' records. Raises `ChangedError` if the file was not sampled by `student` or lacks something."""
        now = replace(self.manifest, student=student.identity, tokenizer=student.tokenizer_identity)
        if differing := self.manifest.differences(now):
            raise ChangedError(f"it was sampled by a different student ({'; '.join(differing)})")
        n_blocks = self.manifest.n_blocks
        if self.digests.keys() != {"rollouts", *self.scores} or {len(d) for d in self.digests.values()} != {n_blocks}:
            raise ChangedError("its metadata is incomplete")
        if 0 in self.digests["rollouts"]:
            raise ChangedError("it was exported before all rollouts were sampled")
        records: dict[int, dict[str, Any]] = {}

        def add(index: int, record: dict[str, Any]) -> None:
            if index not in records:
                try:
                    records[index] = check_record(record, str(self.path), self.columns)
                except PromptError as error:
                    raise ChangedError(str(error)) from None

        for index, (record, _) in self.without_rollouts.items():
            add(index, record)
        for block, table in self._tables(["prompt_index", *FIELDS, *self.columns]):
            for row in table.to_pylist():
                if row["prompt_index"] not in self.manifest.block_prompts(block):
                    raise ChangedError("its rows were changed")
                add(row["prompt_index"], row)
        prompts = [records[index] for index in sorted(records)]
        if len(prompts) != self.manifest.n_prompts or cs.prompts_sha256(prompts) != self.manifest.prompts_sha256:
            raise ChangedError("its prompts were changed")
        return prompts

    def blocks(self, round_: cs.Round) -> Iterator[tuple[int, cs.RolloutBlock, dict[str, cs.ScoreBlock]]]:
        """Every block, with the scores that the file has of it. Raises `ChangedError` if its digest is another.

        Args:
            round_: with the manifests of this file.
        """
        for block, table in self._tables(None):
            try:
                prompts = self.manifest.block_prompts(block)
                no_row = {index: ids for index, (_, ids) in self.without_rollouts.items() if index in prompts}
                rollouts = _rollouts(table, prompts, no_row)
                digests = {"rollouts": round_.rollouts.record_digest(rollouts, version=self.version)}
                scored = {}
                for name in self.scores:
                    if self.digests[name][block]:
                        group = round_.scores(name)
                        specs = {spec.name: spec for spec in group.specs}
                        scored[name] = cs.ScoreBlock(
                            **{each: _values(table, column_name(name, spec), spec) for each, spec in specs.items()}
                        )
                        digests[name] = group.record_digest(scored[name], rollouts, self.version)
            except (KeyError, ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException):
                raise ChangedError("its columns were changed") from None
            if changed := [name for name, digest in digests.items() if digest != self.digests[name][block]]:
                raise ChangedError(f"{' and '.join(changed)} were changed since, in block {block}")
            yield block, rollouts, scored

    def _tables(self, columns: list[str] | None) -> Iterator[tuple[int, Any]]:
        with parquet.ParquetFile(self.path, memory_map=True) as file:
            if file.num_row_groups != self.manifest.n_blocks:
                raise ChangedError("its rows were changed")
            wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            for block in range(file.num_row_groups):
                yield block, file.read_row_group(block, columns=wanted)


def restore(export: Export, prompts: list[dict[str, Any]], cache_url: str, round_index: int | None) -> int:
    """Write the exported round and its scores into a cache; returns the exit code 0.

    Args:
        prompts: as `Export.check` returns them.

    Raises:
        ChangedError: the file was changed; no block is written then.
        CacheError: the cache holds another round, is locked, or its disk is too small.
    """
    cache = cs.create(cache_url, created_by=created_by())
    with cache.lock("redpen import"):
        round_ = cache.start_round(export.manifest, prompts, round_index)
        names = sorted(export.scores, key=lambda name: name != cs.STUDENT)  # its candidates come first
        groups = {name: round_.start_scores(name, export.scores[name]) for name in names}
        n_rows = n_tokens = 0
        for _, rollouts, _ in export.blocks(round_):
            n_rows, n_tokens = n_rows + rollouts.n_rows, n_tokens + rollouts.n_tokens
        per_token = bytes_per_token(cs.ROLLOUT_ARRAYS)
        for manifest in export.scores.values():
            per_token += bytes_per_token(manifest.arrays(), {"candidate": manifest.candidates, "topk": manifest.topk})
        require_free(cache_url, n_tokens * per_token, "the rollouts and their scores")
        n_written = 0
        with graceful() as stop, progress("import", round_.n_blocks) as bar:
            for block, rollouts, scored in export.blocks(round_):
                stop.check(f"{int(round_.rollouts.committed().sum())} of {round_.n_blocks} blocks are committed")
                if not round_.rollouts.is_committed(block):
                    round_.rollouts.write(block, rollouts)
                    n_written += 1
                for name in names:
                    if name in scored and not groups[name].is_committed(block):
                        groups[name].write(block, scored[name], rollouts=rollouts)
                        n_written += 1
                bar.advance()
    show(
        f"import: {n_rows:,} rollouts of {len(prompts):,} prompts in {cache_url} round {round_.index}, {n_tokens:,} "
        f"tokens, with the scores of {', '.join(names) or 'no model'}, as exported"
        + ("" if n_written else "; nothing to do")
    )
    suggest(f"redpen score RECIPE --cache {cache_url}")
    return 0


def _rollouts(table: Any, prompts: range, no_row: Mapping[int, Sequence[int]]) -> cs.RolloutBlock:
    """A block from its rows, and the ids of its prompts that have none."""
    columns = {name: table.column(name).to_pylist() for name in ("prompt_index", "sample_index", "finish_reason")}
    lists = {
        name: [scalar.values for scalar in table.column(name)]
        for name in ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trained")
    }
    codes = {name: code for code, name in cs.FINISH_NAMES.items()}
    rows, ids = [], dict[int, npt.ArrayLike](no_row)
    for row, prompt in enumerate(columns["prompt_index"]):
        ids[prompt] = lists["prompt_token_ids"][row].to_numpy(zero_copy_only=False)
        rows.append(
            cs.RolloutRow(
                prompt=prompt - prompts.start,
                sample_index=columns["sample_index"][row],
                token_ids=lists["response_token_ids"][row].to_numpy(zero_copy_only=False),
                logprobs=lists["rollout_logprobs"][row].to_numpy(zero_copy_only=False),
                finish_reason=codes[columns["finish_reason"][row]],
                trained=lists["trained"][row].to_numpy(zero_copy_only=False),
            )
        )
    return cs.RolloutBlock.from_rows([(prompt, ids[prompt]) for prompt in prompts], rows)


def _values(table: Any, column: str, spec: cs.ArraySpec) -> npt.NDArray[Any]:
    """[T] or [T, K]: an array of a scorer, end to end; null is NaN."""
    flat, width = table.column(column).combine_chunks().flatten(), None
    if len(spec.dims) > 1:
        flat, width = flat.flatten(), flat.type.list_size
    values: npt.NDArray[Any] = flat.to_numpy(zero_copy_only=False).astype(spec.dtype, copy=False)
    return values if width is None else values.reshape(-1, width)
