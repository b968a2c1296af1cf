"""One page of a cache and of runs: rollouts under the red pen, before and after training, curves and provenance.

redpen report RUN_OR_CACHE... -o report.html
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline.config import load_recipe, load_stored_recipe
from pipeline.console import say, show, warn
from pipeline.credentials import mask, masked
from pipeline.errors import ConfigError, RedpenError
from pipeline.files import check_output, write_output
from pipeline.models.identity import created_by
from pipeline.report import data, page, runs
from pipeline.report.collect import collect
from pipeline.report.judge import answer_judge
from pipeline.report.page_rows import Request
from pipeline.report.reread import Reread
from pipeline.report.scan import Int64, Judge
from pipeline.runs.files import check, is_run
from pipeline.runs.lock import reading_results
from pipeline.text.answers import Checker
from pipeline.text.detokenize import Decoder, Ids, load_decoder

#: Bytes of a page that its rollouts may fill, and the part of that of held-out rollouts where a run has them.
PAGE_BYTES, HELDOUT_SHARE = 32_000_000, 0.3
#: What `redpen eval` leaves in a run.
_EVAL_CACHE = "eval.zarr"
_PHASES = ("before", "after")


@dataclass
class _Sources:
    """What a page is made of, and what is missing from it."""

    runs: list[str] = field(default_factory=list)
    cache: cs.Cache | None = None
    round: cs.Round | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str, *, said: bool = False) -> None:
        """Tell what is missing, on the page and, where it has not been `said` here, on stderr."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            if not said:
                warn(sentence)


def run(
    targets: Sequence[str],
    output: str | os.PathLike[str],
    *,
    round_index: int | None = None,
    recipe: str | None = None,
    rollouts: int = 2000,
) -> int:
    """Write the page and print where it is; with several runs also a table that compares them. The exit code 0.

    Args:
        targets: runs, and at most one cache; without one the cache of the runs is shown if it is there.
        round_index: of the cache; default: the one that the runs learned from, else the latest.
        recipe: says by `[eval]` which answers are right, for a cache alone; a run brings its own.
        rollouts: how many to show at most.

    Raises:
        RedpenError: a target is neither run nor cache, or there are several caches; the page cannot be written.
        CacheError: a block is damaged.
    """
    path = Path(output)
    if path.is_dir():
        raise ConfigError(f"-o {output}: expected a file such as {path / 'report.html'}, got a directory")
    if not path.parent.is_dir():
        raise ConfigError(f"-o {output}: there is no directory {path.parent}; make it, or choose another file")
    check_output(path)
    if not os.access(
        path if path.exists() and not path.is_file() else os.path.dirname(os.path.realpath(path)), os.W_OK
    ):
        raise ConfigError(f"-o {output}: cannot be written; choose another file")
    document = assemble(targets, round_index=round_index, recipe=recipe, rollouts=rollouts)
    if len(document["runs"]) > 1:
        runs.compare(document["runs"])
    text = page.render(document).encode("utf-8")
    try:
        write_output(path, text)
    except OSError as error:
        raise RedpenError(f"-o {output}: cannot be written ({error.strerror}); choose another file") from error
    show(f"{os.fspath(output)}: {len(text) / 1e6:.1f} MB; open it in a browser")
    return 0


def assemble(
    targets: Sequence[str], *, round_index: int | None = None, recipe: str | None = None, rollouts: int = 2000
) -> dict[str, Any]:
    """The page's data as one JSON-able record; arguments and errors as of `run`.

    title, created_by, sets (see `collect`), runs (see `runs.read_run`), cache (see `data.summary`; None without one),
    notes (sentences on what is missing).
    """
    with reading_results(target for target in targets if _is_run(target)):
        return _assembled(targets, round_index, recipe, rollouts)


def _assembled(targets: Sequence[str], round_index: int | None, recipe: str | None, rollouts: int) -> dict[str, Any]:
    sources, records = _sources(targets, round_index)
    heldout = [run for run in sources.runs if (Path(run) / _EVAL_CACHE).is_dir()]
    share = (HELDOUT_SHARE if sources.round else 1.0) / max(len(heldout), 1)
    sets = []
    if sources.round is not None:
        room = int(PAGE_BYTES * (1 - share * len(heldout)))
        sets.append(_cached(sources, _checker(sources, recipe, sources.runs), rollouts, room))
    for run in heldout:
        sets += _held_out(sources, run, recipe, rollouts, int(PAGE_BYTES * share))
    names = [*([sources.cache.url.rstrip("/").rpartition("/")[2]] if sources.cache else []), *sources.runs]
    return {
        "title": mask(", ".join(names)),
        "created_by": created_by(),
        "sets": [found for found in sets if found is not None],
        "runs": records,
        "cache": None if sources.cache is None else masked(data.summary(sources.cache, reverse_kl=False)),
        "notes": masked(sources.notes),
    }


# ----------------------------------------------------------------------------------------------------------- targets


def _sources(targets: Sequence[str], round_index: int | None) -> tuple[_Sources, list[dict[str, Any]]]:
    """Runs and cache of the command line, and the runs' records."""
    found = _Sources([target for target in targets if _is_run(target)])
    caches = [target for target in targets if not _is_run(target)]
    for target in caches:
        try:
            found.cache = cs.open(target)
        except cs.NotACacheError as error:
            raise RedpenError(f"{target}: expected a run of `redpen train` or a cache ({error})") from error
    if len(caches) > 1:
        raise ConfigError(f"report: expected one cache at most, got {' and '.join(caches)}; make a page of each")
    records = runs.read_runs(found.runs)
    for run in records:
        for sentence in run["notes"]:
            found.note(f"{run['name']}: {sentence}", said=True)
    if caches:
        learned = [run["cache"].get("round") for run in records if _same(run["cache"].get("url"), caches[0])]
        index = next((round_ for round_ in learned if round_ is not None), None)
    else:
        index = _cache_of_runs(found, records)
    if found.cache is None and round_index is not None:
        raise ConfigError(f"--round {round_index}: there is no cache to show a round of; name one, or leave it out")
    if found.cache is not None:
        there, index = found.cache.round_indices(), index if round_index is None else round_index
        if not there:
            found.note(f"cache {found.cache.url} holds no rollouts yet")
        elif round_index is None and index is not None and index not in there:
            found.note(f"cache {found.cache.url} no longer holds round {index}, so there are no rollouts to show")
        else:
            found.round = found.cache.round(index)
            if not found.round.rollouts.committed().any():
                found.note(f"cache {found.cache.url}, round {found.round.index}: no rollouts have been sampled yet")
    return found, records


def _is_run(target: str) -> bool:
    return is_run(target)


def _same(url: str | None, target: str) -> bool:
    return url is not None and (url == target or os.path.realpath(url) == os.path.realpath(target))


def _cache_of_runs(found: _Sources, records: Sequence[dict[str, Any]]) -> int | None:
    """Open the cache of the first run whose cache is there; the round that the run learned from."""
    told = [(run["name"], run["cache"]) for run in records if run["cache"].get("url")]
    for place, (name, cache) in enumerate(told):
        url, index = cache["url"], cache.get("round")
        try:
            found.cache = cs.open(url)
        except cs.CacheError as error:
            found.note(f"the rollouts of {name} are not shown: {error}")
            continue
        say(f"{name} learned from {runs.learned_from(cache)}")
        for other, elsewhere in told[place + 1 :]:
            if (elsewhere["url"], elsewhere.get("round")) != (url, index):
                found.note(f"{other} learned from {runs.learned_from(elsewhere)}, which is not shown")
        return None if index is None else int(index)
    return None


# -------------------------------------------------------------------------------------------------------------- sets


def _checker(sources: _Sources, recipe: str | None, run_paths: Sequence[str]) -> Checker | None:
    """What a right answer is: by the recipe that is given, else by the first run's; None where there is neither."""
    if recipe is not None:
        return Checker.of(load_recipe(recipe).eval)
    paths = [path for run in run_paths if (path := Path(run) / "recipe.toml").is_file()]
    try:
        return Checker.of(load_stored_recipe(paths[0]).eval) if paths else None
    except ConfigError as error:
        sources.note(f"right and wrong answers are not told apart: {error}")
        return None


def _cached(sources: _Sources, checker: Checker | None, rollouts: int, room: int) -> dict[str, Any] | None:
    round_ = sources.round
    assert round_ is not None and sources.cache is not None
    rereads = []
    for path in sources.runs:
        reread = Reread.load(path, round_)
        if isinstance(reread, str):
            sources.note(reread)
        elif reread is not None:
            rereads.append(reread)
    name = f"round {round_.index} of {sources.cache.url.rstrip('/').rpartition('/')[2]}"
    request = Request(name, "cache", rollouts, room, _judge(round_, checker), rereads=rereads)
    return collect(round_, request, _tokenizer(sources, round_))


def _tokenizer(sources: _Sources, round_: cs.Round) -> Decoder:
    found = load_decoder(round_.manifest)
    if isinstance(found, Ids):
        name = round_.manifest.tokenizer.name
        sources.note(f"tokenizer {name} was not on the machine that made this page: tokens are ids", said=True)
    return found


def _judge(round_: cs.Round, checker: Checker | None) -> Judge | None:
    return None if checker is None else answer_judge(round_.manifest, checker)


def _held_out(sources: _Sources, run: str, recipe: str | None, rollouts: int, room: int) -> list[dict[str, Any]]:
    """Fresh rollouts before and after training, of the same prompts: what is worst before or after, in both."""
    try:
        check(run, _EVAL_CACHE)
        cache = cs.open(Path(run) / _EVAL_CACHE)
        rounds = [cache.round(index) for index in cache.round_indices()[: len(_PHASES)]]
        if rounds:
            return _pair(sources, run, rounds, recipe, rollouts, room)
        sources.note(f"held-out rollouts of {run} are not shown: its {_EVAL_CACHE} holds none")
    except (cs.CacheError, RedpenError) as error:
        sources.note(f"held-out rollouts of {run} are not shown: {error}; `redpen eval {run}` makes them again")
    return []


def _pair(
    sources: _Sources, run: str, rounds: Sequence[cs.Round], recipe: str | None, rollouts: int, room: int
) -> list[dict[str, Any]]:
    checker = _checker(sources, recipe, [run])
    requests = [
        Request(f"{run}, {phase}", "heldout", rollouts, room // len(rounds), _judge(round_, checker), run, phase)
        for phase, round_ in zip(_PHASES, rounds, strict=False)
    ]
    tokenizer = _tokenizer(sources, rounds[0])
    pairs = list(zip(rounds, requests, strict=True))
    found = [collect(round_, request, tokenizer) for round_, request in pairs]
    numbers = [_numbers(rollout_set) for rollout_set in found]
    if any(not np.array_equal(np.sort(numbers[0]), np.sort(other)) for other in numbers[1:]):
        # Of a part, each student's worst: show what is worst to either in both. A third of each leaves room for the
        # other student's responses to the same prompts, however long.
        both = np.unique(np.concatenate([number[: len(number) // 3] for number in numbers]))
        found = [collect(r, replace(request, only=both), tokenizer) for r, request in pairs]
    return [rollout_set for rollout_set in found if rollout_set is not None]


def _numbers(found: dict[str, Any] | None) -> Int64:
    return np.array([row["number"] for row in found["rows"]] if found else [], np.int64)
