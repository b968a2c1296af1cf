"""Publish a cache on the Hub, for others to train from: `redpen push CACHE hf://datasets/OWNER/NAME`.

The cache is verified first; then one commit holds its metadata, its committed blocks and a data card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cache_schema as cs
from pipeline.console import progress, suggest
from pipeline.credentials import mask
from pipeline.errors import ConfigError, RedpenError, shorten
from pipeline.files import PARTIAL, refuse_link
from pipeline.models.push import upload
from pipeline.report.inspect import summary
from pipeline.runs.files import is_run

_CHUNK = re.compile(r"(?P<group>rounds/\d+/(rollouts|scores/[^/]+))/[^/]+/c/(?P<block>\d+)(/.*)?")
_CARD = "README.md"


def run(cache_path: str, url: str, *, public: bool = False) -> int:
    """Upload in one commit, and print where to; returns exit code 0.

    Args:
        cache_path: a local cache.
        url: hf://datasets/OWNER/NAME; the repository is made if it does not exist.

    Raises:
        ConfigError: `url` is no such URL. CacheError: not a cache, or it is locked. RedpenError: it is damaged, it
            holds nothing, or the Hub refuses or cannot be reached.
    """
    match = cs.HUB_URL.fullmatch(url)
    if match is None or match["revision"]:
        raise ConfigError(f"HUB_ID: expected hf://datasets/OWNER/NAME for a cache, got {url!r}")
    if is_run(cache_path):
        raise ConfigError(f"HUB_ID: {cache_path} is a run, whose model is published as OWNER/NAME, got {url!r}")
    cache = cs.open(cache_path, writable=True)
    if cache.path is None:
        raise ConfigError(f"CACHE: expected a local cache to publish, got {cache_path!r}; copy it here first")
    with cache.lock("redpen push"):
        _refuse_damage(cache)
        files: dict[str, str | bytes] = {name: str(path) for name, path in _files(cache)}
        files[_CARD] = _card(cache, url).encode()
        # a round or a block that an earlier cache had there would be read as one of this
        revision = upload(match["repository"], files, public=public, repo_type="dataset", replacing="rounds")
    suggest(f"redpen train RECIPE --cache {url}@{revision} --run DIR")
    return 0


def _refuse_damage(cache: cs.Cache) -> None:
    rounds = [cache.round(index) for index in cache.round_indices()]
    if not any(round_.rollouts.committed().any() for round_ in rounds):
        raise RedpenError(f"{cache.url}: holds no rollouts yet, so there is nothing to publish")
    n_checks = sum(round_.n_blocks * (1 + len(round_.scorer_names())) for round_ in rounds)
    with progress("verify", n_checks, "blocks") as bar:
        found = next(iter(cs.verify(cache, progress=bar.advance)), None)
    if found is not None:
        raise RedpenError(
            f"{cache.url}: is damaged ({shorten(found.problem)}); `redpen verify {cache.url} --repair` and the stage "
            "that made it mend it"
        )


def _files(cache: cs.Cache) -> Iterator[tuple[str, Path]]:
    """Every file of metadata, prompts and committed blocks, by its key."""
    assert cache.path is not None
    committed = {}
    for index in cache.round_indices():
        round_ = cache.round(index)
        groups: list[cs.BlockGroup[Any]] = [round_.rollouts, *map(round_.scores, round_.scorer_names())]
        for group in groups:
            committed[f"rounds/{index:05d}/{group.name}"] = group.committed()
    for path in sorted(cache.path.rglob("*")):
        if path.is_dir() or path.name.endswith(PARTIAL):
            continue
        refuse_link(path)
        key = path.relative_to(cache.path).as_posix()
        chunk = _CHUNK.fullmatch(key)
        if chunk is None or chunk["group"] not in committed:
            if chunk is None and not key.startswith("."):
                yield key, path
        elif committed[chunk["group"]][int(chunk["block"])]:
            yield key, path


def _card(cache: cs.Cache, url: str) -> str:
    """The data card: origin, figures, and the command that trains from it."""
    rounds: list[dict[str, Any]] = summary(cache)["rounds"]
    tags = json.dumps(["redpen", "on-policy-distillation"])
    lines = ["---", "pretty_name: " + json.dumps(url.rpartition("/")[2]), f"tags: {tags}", "---", ""]
    lines += [
        f"# {url.rpartition('/')[2]}",
        "",
        "Rollouts of a student with the log-probs that student and teachers give every token: a cache of redpen, "
        "for training without the teacher.",
        "",
        "| round | student | prompts | rollouts | tokens | scored by | reverse KL, nats a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in rounds:
        teachers = [scores for scores in found["scores"] if scores["role"] == "teacher"]
        names = ", ".join(f"`{scores['model']['name']}`" for scores in teachers)
        kls = ", ".join("" if scores["reverse_kl"] is None else f"{scores['reverse_kl']:.4f}" for scores in teachers)
        lines.append(
            f"| {found['index']} | `{found['student']['name']}` | {found['prompts']:,} | {found['rollouts']:,} | "
            f"{found['tokens']:,} | {names} | {kls} |"
        )
    lines += [
        "",
        "The prompts are part of it. No licence is stated here: those of the prompts and of the models hold, and may "
        "want a `license:` above.",
        "",
        "```bash",
        f"redpen inspect {url}",
        f"redpen train RECIPE --cache {url} --run DIR    # fetches what training reads, and never loads the teacher",
        "```",
        "",
    ]
    return mask("\n".join(lines))
