"""Small caches of the toy, made by the stages themselves, and comparisons of caches."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

import cache_schema as cs
from helpers import preloaded
from pipeline.config import Recipe, load_recipe

ROOT = Path(__file__).parents[2]

#: 24 prompts x 4 rollouts in 6 blocks, 6 steps an epoch, several micro-batches a step
SMALL = (
    "prompts.limit=24",
    "rollouts.prompts_per_block=4",
    "train.prompts_per_step=4",
    "train.tokens_per_microbatch=100",
    "train.shuffle_window_blocks=3",
    "train.checkpoint_every=2",
    "train.lora_rank=4",
    "train.stop_reverse_kl=0",
    "train.steps=5",
)


def small_recipe(*overrides: str) -> Recipe:
    """The toy recipe at a size for tests."""
    return load_recipe("toy", [*SMALL, *overrides])


def make_cache(path: Path, recipe: Recipe) -> Path:
    """A finished cache of `recipe` at `path`."""
    import pipeline.rollouts.stage
    import pipeline.score.stage

    assert pipeline.rollouts.stage.run(recipe, str(path)) == 0
    assert pipeline.score.stage.run(recipe, str(path)) == 0
    return path


def tree_digest(path: Path) -> str:
    """Digest of every file below `path`, names included."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def poorer(scores: cs.ScoreBlock, rng: np.random.Generator, *, unscored: float = 0.1) -> cs.ScoreBlock:
    """The same teacher, some of its candidates unscored (so in its rest), and some tokens not scored at all."""
    assert scores.candidate_logprobs is not None and scores.rest_logprob is not None
    left_out = rng.random(scores.candidate_logprobs.shape) < 0.4
    left_out[:, 0] = False
    recorded = np.where(left_out, np.nan, scores.candidate_logprobs).astype(np.float32)
    rest = np.exp(scores.rest_logprob.astype(np.float64)) + np.where(
        left_out, np.exp(scores.candidate_logprobs), 0
    ).sum(1)
    missing = rng.random(scores.n_tokens) < unscored
    arrays = {"logprobs": scores.logprobs, "candidate_logprobs": recorded, "rest_logprob": np.log(rest)}
    for name, value in arrays.items():
        value = value.astype(np.float32)
        value[missing] = np.nan
        arrays[name] = value
    return cs.ScoreBlock(**arrays)


def add_partial_teachers(cache: Path, seed: int) -> None:
    """Add two teachers to a scored cache: "partial" has some scores only, "alone" those of the sampled token."""
    round_ = cs.open(cache, writable=True).round()
    full, rng = round_.scores("teacher"), np.random.default_rng(seed)
    less = dataclasses.replace(full.manifest, entropy=False, partial=True, engine="server")
    partial = round_.start_scores("partial", less)
    alone = round_.start_scores("alone", dataclasses.replace(less, candidates=0, engine="import"))
    for block in range(round_.n_blocks):
        scores = poorer(full.read(block), rng)
        partial.write(block, scores)
        alone.write(block, cs.ScoreBlock(logprobs=scores.logprobs))


def arrays_of(scores: cs.ScoreBlock) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(scores).items() if value is not None}


def flip_a_bit(path: Path) -> None:
    """Damage a file in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def overwrite_with_zeros(directory: Path) -> None:
    """Damage every file."""
    for file in directory.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * 64)


#: 24 blocks: a kill always finds some done and some to do
MANY_BLOCKS = [
    "prompts.limit=48",
    "rollouts.prompts_per_block=2",
    "rollouts.batch_size=8",
    "score.tile_tokens=64",
]


def wait_for_commits(process: subprocess.Popen[str] | preloaded.Process, group: Path, count: int) -> None:
    """Until `count` more blocks of a group are committed: each is one file of its commit array."""
    chunks = group / "commit" / "c"

    def committed() -> int:
        return len(list(chunks.iterdir())) if chunks.is_dir() else 0

    before, deadline = committed(), time.monotonic() + 150
    while committed() < before + count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_same_cache(cache: Path, expected: Path, names: list[str]) -> None:
    """Every decoded array and commit record of some groups, times aside, and digests if their versions differ."""
    a, b = cs.open(cache).round(), cs.open(expected).round()
    assert not list(cs.verify(a.cache))
    for name in names:
        left, right = (r.rollouts if name == "rollouts" else r.scores(name) for r in (a, b))
        assert left.committed().all() and right.committed().all()
        for field in left.commits().dtype.names:
            if field not in cs.TIME_FIELDS and (left.version == right.version or "digest" not in field):
                np.testing.assert_array_equal(left.commits()[field], right.commits()[field], err_msg=field)
        for block in range(a.n_blocks):
            ours = left.read(block)
            for key, value in vars(right.read(block)).items():
                np.testing.assert_array_equal(getattr(ours, key), value, err_msg=f"{name} {key}")


def without_scores(undisturbed: Path, path: Path) -> Path:
    shutil.copytree(undisturbed, path)
    for scores in (path / "rounds/00000/scores").iterdir():
        if scores.is_dir():
            shutil.rmtree(scores)
    return path
