"""Cache writes and block reads beside Parquet-zstd and a raw memmap of the same three columns, in one run.

    python benchmarks/cache_throughput.py [--tokens 7500000] [--repeats 3]

Columns: token_ids (i4), rollout_logprobs (f4), one teacher's logprobs (f4). Each form is written and read back whole
`repeats` times, interleaved, and its median is printed, so that a noisy machine disturbs all alike. Reads come from
the page cache. Parquet gets one row group a block, as a resumable writer would need, in two forms: a row a rollout
(list columns of 512 tokens, as distillation data are kept elsewhere) and a row a token (flat columns, which say
nothing of where a rollout ends). The cache's own row table is left out on both sides.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

import cache_schema as cs
from cache_schema import layout
from cache_schema.group import BlockGroup

COLUMNS = ("token_ids", "rollout_logprobs", "logprobs")


class ThreeColumns(cs.RoundManifest):
    """A rollouts group of only the columns compared here, in the layout, codecs and commits of every other group."""

    def arrays(self) -> tuple[cs.ArraySpec, ...]:
        specs = {spec.name: spec for spec in (*cs.ROLLOUT_ARRAYS, *cs.teacher_arrays())}
        return tuple(specs[name] for name in COLUMNS)


def made_up_blocks(n_tokens: int, block_tokens: int) -> list[dict[str, np.ndarray]]:
    """Zipf-like ids of a 151,936-token vocabulary; log-probs mostly near 0 with a long tail, as from a model."""
    rng = np.random.default_rng(0)
    blocks = []
    for start in range(0, n_tokens, block_tokens):
        n = min(block_tokens, n_tokens - start)
        surprise = rng.exponential(size=n) ** 3 * 0.4
        blocks.append(
            {
                "token_ids": (rng.zipf(1.2, n) % 151_936).astype(np.int32),
                "rollout_logprobs": (-surprise).astype(np.float32),
                "logprobs": (-surprise * rng.lognormal(0, 0.5, n)).astype(np.float32),
            }
        )
    return blocks


def manifest(n_blocks: int, block_tokens: int) -> ThreeColumns:
    records = [{"prompt": str(i)} for i in range(n_blocks * 64)]
    identity = cs.ModelIdentity("made-up", None, "0")
    return ThreeColumns(
        student=identity,
        tokenizer=cs.TokenizerIdentity("made-up", "0", 151_936),
        template={},
        stop_token_ids=(0,),
        temperature=1.0,
        top_p=1.0,
        rollouts_per_prompt=4,
        max_prompt_tokens=1,
        max_response_tokens=block_tokens // 256,
        prompts_per_block=64,
        seed=0,
        engine="made-up",
        prompts_sha256=cs.prompts_sha256(records),
        n_prompts=len(records),
        vocab_size=151_936,
    )


def write_cache(path: Path, blocks: list[dict[str, np.ndarray]], block_tokens: int) -> BlockGroup:
    m = manifest(len(blocks), block_tokens)
    group = zarr.create_group(path)
    layout.create(group, layout.block_layouts(m, m))
    out = BlockGroup(group, "rollouts", m, m, None, None)
    for i, block in enumerate(blocks):
        counts = {"rows": 256, "prompts": 64, "tokens": len(block["token_ids"]), "prompt_tokens": 0}
        out._commit_arrays(i, block, counts, 0.0)
    return out


def read_cache(path: Path, n_blocks: int, block_tokens: int, *, check: bool) -> list[dict[str, np.ndarray]]:
    m = manifest(n_blocks, block_tokens)
    group = BlockGroup(zarr.open_group(path, mode="r"), "rollouts", m, m, None, None)
    return [group.read_arrays(i, COLUMNS, check=check) for i in range(n_blocks)]


def write_parquet(path: Path, blocks: list[dict[str, np.ndarray]], rollout_tokens: int | None) -> None:
    def column(values: np.ndarray) -> pa.Array:
        if rollout_tokens is None:
            return pa.array(values)
        offsets = np.append(np.arange(0, len(values), rollout_tokens), len(values)).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    tables = (pa.table({name: column(block[name]) for name in COLUMNS}) for block in blocks)
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd", compression_level=1) as out:
        for table in itertools.chain([first], tables):
            out.write_table(table)


def read_parquet(path: Path) -> list[dict[str, np.ndarray]]:
    def flat(column: pa.ChunkedArray) -> np.ndarray:
        array = column.combine_chunks()
        return (array.flatten() if pa.types.is_list(array.type) else array).to_numpy()

    file = pq.ParquetFile(path)
    groups = (file.read_row_group(i) for i in range(file.num_row_groups))
    return [{name: flat(group[name]) for name in COLUMNS} for group in groups]


def write_memmap(path: Path, blocks: list[dict[str, np.ndarray]]) -> None:
    path.mkdir()
    n = sum(len(block["token_ids"]) for block in blocks)
    for name in COLUMNS:
        out = np.memmap(path / name, blocks[0][name].dtype, "w+", shape=(n,))
        start = 0
        for block in blocks:
            out[start : start + len(block[name])] = block[name]
            start += len(block[name])
        out.flush()


def read_memmap(path: Path, block_tokens: int) -> list[dict[str, np.ndarray]]:
    columns = {name: np.memmap(path / name, "i4" if name == "token_ids" else "f4", "r") for name in COLUMNS}
    n = len(columns["token_ids"])
    return [
        {name: np.array(column[start : start + block_tokens]) for name, column in columns.items()}
        for start in range(0, n, block_tokens)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7_500_000)
    parser.add_argument("--block-tokens", type=int, default=262_144, help="response tokens a block")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    blocks = made_up_blocks(args.tokens, args.block_tokens)
    root = Path(tempfile.mkdtemp())
    cache, parquet, flat, memmap = (root / name for name in ("cache", "rows.parquet", "flat.parquet", "memmap"))
    n, size = len(blocks), args.block_tokens
    writes: dict[str, tuple[Path, Callable[[], object]]] = {
        "redpen cache": (cache, lambda: write_cache(cache, blocks, size)),
        "Parquet, row a rollout": (parquet, lambda: write_parquet(parquet, blocks, 512)),
        "Parquet, row a token": (flat, lambda: write_parquet(flat, blocks, None)),
        "raw memmap": (memmap, lambda: write_memmap(memmap, blocks)),
    }
    reads: dict[str, Callable[[], list[dict[str, np.ndarray]]]] = {
        "redpen cache": lambda: read_cache(cache, n, size, check=True),
        "redpen cache, no digests": lambda: read_cache(cache, n, size, check=False),
        "Parquet, row a rollout": lambda: read_parquet(parquet),
        "Parquet, row a token": lambda: read_parquet(flat),
        "raw memmap": lambda: read_memmap(memmap, size),
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        shutil.rmtree(root)
        root.mkdir()
        for name, (_, write) in writes.items():
            start = time.perf_counter()
            write()
            seconds.setdefault(f"write {name}", []).append(time.perf_counter() - start)
        for name, read in reads.items():
            start = time.perf_counter()
            back = read()
            seconds.setdefault(f"read {name}", []).append(time.perf_counter() - start)
            for block, original in zip(back, blocks, strict=True):
                assert all(np.array_equal(block[column], original[column]) for column in COLUMNS), name
    rate = {key: args.tokens / statistics.median(values) / 1e6 for key, values in seconds.items()}
    print(
        f"{args.tokens:,} tokens x 3 columns in {n} blocks, median of {args.repeats}; zstd-1; crc32c always checked"
    )
    print(f"{'':26}{'write Mtok/s':>14}{'read Mtok/s':>14}{'read / Parquet':>16}{'B/token':>10}")
    for name in reads:
        path = writes.get(name, (cache,))[0]
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        per_token = sum(p.stat().st_size for p in files) / args.tokens
        written = f"{rate[f'write {name}']:.1f}" if f"write {name}" in rate else ""
        ratio = rate[f"read {name}"] / rate["read Parquet, row a rollout"]
        print(f"{name:26}{written:>14}{rate[f'read {name}']:>14.1f}{ratio:>15.2f}x{per_token:>10.2f}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
