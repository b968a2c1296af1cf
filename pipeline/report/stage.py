"""One page of a cache and of runs: rollouts under the red pen, before and after training, curves and provenance.

redpen report RUN_OR_CACHE... -o report.html
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import cache_schema as cs
from pipeline.config import load_recipe
from pipeline.console import say, show, warn
from pipeline.credentials import mask, masked
from pipeline.errors import ConfigError, RedpenError
from pipeline.files import check_output, write_output
from pipeline.models.identity import created_by
from pipeline.report import inspect, page, runs, terminal
from pipeline.report.document import Document, RolloutSet, SetRequest, rollout_set
from pipeline.report.read import answer_check
from pipeline.report.runs import Reread, RunRecord
from pipeline.rounds.identity import cache_identity
from pipeline.rounds.scored_block import Int64
from pipeline.runs.files import EVAL_CACHE, RECIPE, check, is_run, read_recipe
from pipeline.runs.lock import reading_results
from pipeline.text.answers import Checker
from pipeline.text.detokenize import Decoder, Ids, load_decoder

#: Bytes of a page that its rollouts may fill, and the fraction of held-out rollouts if a run has them.
PAGE_BYTES, HELDOUT_FRACTION = 32_000_000, 0.3
_PHASES = ("before", "after")


@dataclass
class _Sources:
    """The inputs of a page, and sentences on what is missing from it."""

    runs: list[str] = field(default_factory=list)
    cache: cs.Cache | None = None
    round: cs.Round | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str, *, on_stderr: bool = True) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            if on_stderr:
                warn(sentence)


def run(
    targets: Sequence[str],
    output: str | os.PathLike[str],
    *,
    round_index: int | None = None,
    recipe: str | None = None,
    rollouts: int = 2000,
) -> int:
    """Write the page and print its path; with several runs also a table that compares them. Returns exit code 0.

    Args:
        targets: runs, and at most one cache; default: the cache of the runs, if it can be opened.
        round_index: of the cache; default: the one that the runs learned from, else the latest.
        recipe: its `[eval]` decides which answers are right; default: the recipe of the run.
        rollouts: how many to show at most.

    Raises:
        RedpenError: a target is neither a run nor a cache, there are several caches, or the page cannot be written.
        CacheError: a block is damaged.
    """
    path = Path(output)
    if path.is_dir():
        raise ConfigError(f"-o {output}: expected a file such as {path / 'report.html'}, got a directory")
    if not path.parent.is_dir():
        raise ConfigError(f"-o {output}: there is no directory {path.parent}; create it, or choose another file")
    check_output(path, page.BEGINS, "a page of redpen")
    try:
        where = path if path.exists() and not path.is_file() else Path(os.path.realpath(path)).parent
    except FileNotFoundError:  # the working directory itself is gone
        raise ConfigError(f"-o {output}: the working directory no longer exists; change to another") from None
    if not os.access(where, os.W_OK):
        raise ConfigError(f"-o {output}: cannot be written; choose another file")
    document = assemble(targets, round_index=round_index, recipe=recipe, rollouts=rollouts)
    if len(document["runs"]) > 1:
        terminal.compare_runs(document["runs"])
    text = page.render(document).encode("utf-8")
    try:
        write_output(path, text)
    except OSError as error:
        raise RedpenError(f"-o {output}: cannot be written ({error.strerror}); choose another file") from error
    show(f"{os.fspath(output)}: {len(text) / 1e6:.1f} MB; open it in a browser")
    return 0


def assemble(
    targets: Sequence[str], *, round_index: int | None = None, recipe: str | None = None, rollouts: int = 2000
) -> Document:
    """The page's document; arguments and errors as of `run`."""
    with reading_results(target for target in targets if is_run(target)):
        sources, records = _open(targets, round_index)
        heldout = [run for run in sources.runs if (Path(run) / EVAL_CACHE).is_dir()]
        fraction = (HELDOUT_FRACTION if sources.round else 1.0) / max(len(heldout), 1)
        sets = []
        if sources.round is not None:
            page_bytes = int(PAGE_BYTES * (1 - fraction * len(heldout)))
            sets.append(_cached_set(sources, sources.round, recipe, rollouts, page_bytes))
        for run in heldout:
            sets += _heldout_sets(sources, run, recipe, rollouts, int(PAGE_BYTES * fraction))
        return {
            "title": mask(", ".join([*([_name(sources.cache)] if sources.cache else []), *sources.runs])),
            "created_by": created_by(),
            "sets": [found for found in sets if found is not None],
            "runs": records,
            "cache": None if sources.cache is None else masked(inspect.summary(sources.cache, reverse_kl=False)),
            "notes": masked(sources.notes),
        }


# ----------------------------------------------------------------------------------------------------------- targets


def _open(targets: Sequence[str], round_index: int | None) -> tuple[_Sources, list[RunRecord]]:
    """Runs and cache of the command line, and the runs' records."""
    sources = _Sources([target for target in targets if is_run(target)])
    caches = [target for target in targets if not is_run(target)]
    for target in caches:
        try:
            sources.cache = cs.open(target)
        except cs.NotACacheError as error:
            raise RedpenError(f"{target}: expected a run of `redpen train` or a cache ({error})") from error
    if len(caches) > 1:
        raise ConfigError(f"report: expected one cache at most, got {' and '.join(caches)}; make a page of each")
    records = runs.read_runs(sources.runs)
    for run in records:
        for sentence in run["notes"]:
            sources.note(f"{run['name']}: {sentence}", on_stderr=False)
    if caches:
        _require_related(sources, records, caches[0])
        learned = [run["cache"].get("round") for run in records if _same(run["cache"].get("url"), caches[0])]
        index = next((round_ for round_ in learned if round_ is not None), None)
    else:
        index = _open_cache_of_runs(sources, records)
    if sources.cache is None and round_index is not None:
        raise ConfigError(f"--round {round_index}: there is no cache to show a round of; name one, or leave it out")
    if sources.cache is not None:
        there, index = sources.cache.round_indices(), index if round_index is None else round_index
        if not there:
            sources.note(f"cache {sources.cache.url} holds no rollouts yet")
        elif round_index is None and index is not None and index not in there:
            sources.note(f"cache {sources.cache.url} no longer holds round {index}, so there are no rollouts to show")
        else:
            round_ = sources.round = sources.cache.round(index)
            if not round_.rollouts.committed().any():
                sources.note(f"cache {sources.cache.url}, round {round_.index}: no rollouts have been sampled yet")
    return sources, records


def _require_related(sources: _Sources, records: Sequence[RunRecord], url: str) -> None:
    """Raise `ConfigError` if no run learned from the cache that is given, by its place or its rollouts' digests."""
    assert sources.cache is not None
    rounds = [sources.cache.round(index) for index in sources.cache.round_indices()]
    digests = {cache_identity(url, round_, ())["rollouts digest"] for round_ in rounds}
    if records and not any(
        _same(run["cache"].get("url"), url) or run["cache"].get("rollouts digest", None) in {None, *digests}
        for run in records
    ):
        name, cache = records[0]["name"], records[0]["cache"]
        raise ConfigError(
            f"report: {name} learned from {runs.learned_from(cache)}, and not from {url}; leave the cache out, or "
            "make a page of each"
        )


def _same(url: str | None, target: str) -> bool:
    return url is not None and (url == target or os.path.realpath(url) == os.path.realpath(target))


def _open_cache_of_runs(sources: _Sources, records: Sequence[RunRecord]) -> int | None:
    """Open the first run's cache that can be opened; the round that the run learned from."""
    known = [(run["name"], run["cache"]) for run in records if run["cache"].get("url")]
    for place, (name, cache) in enumerate(known):
        url, index = cache["url"], cache.get("round")
        try:
            sources.cache = cs.open(url)
        except cs.CacheError as error:
            sources.note(f"the rollouts of {name} are not shown: {error}")
            continue
        say(f"{name} learned from {runs.learned_from(cache)}")
        for other, elsewhere in known[place + 1 :]:
            if (elsewhere["url"], elsewhere.get("round")) != (url, index):
                sources.note(f"{other} learned from {runs.learned_from(elsewhere)}, which is not shown")
        return None if index is None else int(index)
    return None


def _name(cache: cs.Cache) -> str:
    return str(cache.url.rstrip("/").rpartition("/")[2])


# -------------------------------------------------------------------------------------------------------------- sets


def _checker(sources: _Sources, recipe: str | None, run_paths: Sequence[str]) -> Checker | None:
    """What a right answer is, by the given recipe or the first run's; None without either."""
    if recipe is not None:
        return Checker.of(load_recipe(recipe).eval)
    paths = [run for run in run_paths if (Path(run) / RECIPE).is_file()]
    try:
        return Checker.of(read_recipe(paths[0]).eval) if paths else None
    except RedpenError as error:
        sources.note(f"answers are not checked: {error}")
        return None


def _tokenizer(sources: _Sources, round_: cs.Round) -> Decoder:
    found = load_decoder(round_.manifest)
    if isinstance(found, Ids):
        name = round_.manifest.tokenizer.name
        sources.note(f"tokenizer {name} was not on the machine that made this page: tokens are ids", on_stderr=False)
    return found


def _cached_set(
    sources: _Sources, round_: cs.Round, recipe: str | None, rollouts: int, page_bytes: int
) -> RolloutSet | None:
    checker = _checker(sources, recipe, sources.runs)
    rereads = []
    for path in sources.runs:
        reread = Reread.load(path, round_)
        if isinstance(reread, str):
            sources.note(reread)
        elif reread is not None:
            rereads.append(reread)
    check = None if checker is None else answer_check(round_.manifest, checker)
    name = f"round {round_.index} of {_name(round_.cache)}"
    request = SetRequest(name, "cache", rollouts, page_bytes, check, rereads=rereads)
    return rollout_set(round_, request, _tokenizer(sources, round_))


def _heldout_sets(
    sources: _Sources, run: str, recipe: str | None, rollouts: int, page_bytes: int
) -> list[RolloutSet]:
    """Fresh rollouts before and after training, of the same prompts: the worst of either, in both."""
    try:
        check(run, EVAL_CACHE)
        cache = cs.open(Path(run) / EVAL_CACHE)
        rounds = [cache.round(index) for index in cache.round_indices()[: len(_PHASES)]]
        if rounds:
            return _pair(sources, run, rounds, recipe, rollouts, page_bytes)
        sources.note(f"held-out rollouts of {run} are not shown: its {EVAL_CACHE} holds none")
    except (cs.CacheError, RedpenError) as error:
        sources.note(f"held-out rollouts of {run} are not shown: {error}; run `redpen eval {run}` to make them again")
    return []


def _pair(
    sources: _Sources, run: str, rounds: Sequence[cs.Round], recipe: str | None, rollouts: int, page_bytes: int
) -> list[RolloutSet]:
    checker = _checker(sources, recipe, [run])
    tokenizer = _tokenizer(sources, rounds[0])
    requests = []
    for phase, round_ in zip(_PHASES, rounds, strict=False):
        compare = None if checker is None else answer_check(round_.manifest, checker)
        room = page_bytes // len(rounds)
        requests.append(SetRequest(f"{run}, {phase}", "heldout", rollouts, room, compare, run, phase))
    pairs = list(zip(rounds, requests, strict=True))
    found = [rollout_set(round_, request, tokenizer) for round_, request in pairs]
    numbers = [_numbers(shown) for shown in found]
    if any(not np.array_equal(np.sort(numbers[0]), np.sort(other)) for other in numbers[1:]):
        # Each student's worst were chosen: show the worst of either in both. A third of each leaves room for the
        # other student's responses to the same prompts, however long.
        both = np.unique(np.concatenate([number[: len(number) // 3] for number in numbers]))
        found = [rollout_set(r, replace(request, only=both), tokenizer) for r, request in pairs]
    return [shown for shown in found if shown is not None]


def _numbers(shown: RolloutSet | None) -> Int64:
    return np.array([row["number"] for row in shown["rows"]] if shown else [], np.int64)
