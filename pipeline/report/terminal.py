"""Views in the terminal: `redpen inspect`, a cache as tables or a rollout as marked text, and a table of runs.

Control characters from models and files are escaped: no rollout can steer the terminal.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import cache_schema as cs
from pipeline.console import escape_control, results, say, show, warn
from pipeline.disk import readable
from pipeline.models.identity import DATA
from pipeline.report import inspect
from pipeline.report.runs import MEASURES, RunRecord, differing, estimates, interval, learned_from, setting
from pipeline.text.answers import answers_of
from pipeline.text.detokenize import load_decoder

#: Reverse KL (nats) from which a token is marked, its style, and the sign that follows it without colour.
LEVELS = ((1.0, "bold white on red3", "^^^"), (0.3, "black on light_coral", "^^"), (0.1, "black on misty_rose1", "^"))
#: Style of text that is not trained on, and the signs around it without colour.
UNTRAINED_STYLE, UNTRAINED = "dim italic", ("⟨", "⟩")
WORST_TOKENS = 5
#: Reverse KL (nats) from which a token is worth a line, and probability from which an alternative is worth showing.
NEGLIGIBLE, UNLIKELY = 1e-3, 1e-2
SHOWN_CANDIDATES = 3
_NAME_WIDTH, _RUN_WIDTH, _GAP = 24, 23, 2  # three runs in 100 columns


def run(cache_url: str, round_index: int | None, rollout: int | None, teacher: str | None, as_json: bool) -> None:
    """Print a summary of a cache, or one rollout of its latest (or the given) round with the marks of each teacher
    (or the given one).
    """
    cache, out = cs.open(cache_url), results()
    if rollout is None:
        found = inspect.summary(cache, round_index)
        if as_json:
            show(json.dumps(found, allow_nan=False))
        else:
            show_summary(found, out)
            _warn_of_stale_scores(found)
            say(f"next: {next_command(found)}")
        return
    round_ = cache.round(round_index)
    decoder = functools.cache(lambda: load_decoder(round_.manifest))
    if as_json:
        show(json.dumps(inspect.rollout(round_, rollout, teacher, decoder), allow_nan=False))
    else:
        names: Sequence[str | None] = [teacher] if teacher is not None else round_.teacher_names() or [None]
        show_rollout([inspect.rollout(round_, rollout, name, decoder) for name in names], out)


def _warn_of_stale_scores(summary: dict[str, Any]) -> None:
    for round_ in summary["rounds"]:
        for scores in round_["scores"]:
            if stale := scores["blocks"]["stale"]:
                warn(
                    f"round {round_['index']}: {scores['name']} scored {stale} blocks whose rollouts or candidates "
                    "are others now; they do not count, and `redpen score` scores them again"
                )


def next_command(summary: dict[str, Any]) -> str:
    """The command that completes the latest round of a summary, or that uses it."""
    cache, round_ = summary["cache"], summary["rounds"][-1] if summary["rounds"] else None
    if round_ is None or not _complete(round_["blocks"]):
        return f"redpen rollouts RECIPE --cache {cache}"
    if round_["engine"] == DATA:
        return f"redpen inspect {cache} --rollout 0 (a round of fine-tuning data, which is not scored)"
    scored = [score["role"] for score in round_["scores"] if _complete(score["blocks"])]
    if len(scored) < len(round_["scores"]) or {"student", "teacher"} - set(scored):
        return f"redpen score RECIPE --cache {cache}"
    return f"redpen inspect {cache} --rollout 0, redpen train RECIPE --cache {cache} --run DIR"


def show_summary(summary: dict[str, Any], out: Console) -> None:
    """Print a summary of `inspect.summary`."""
    size = f", {readable(summary['bytes'])}" if summary["bytes"] is not None else ""
    _print(out, _text(f"{summary['cache']}: redpen cache, format {summary['format_version']}{size}"))
    if not summary["rounds"]:
        out.print("no rounds yet")
    for round_ in summary["rounds"]:
        finish, rollouts = round_["finish"], round_["rollouts"]
        lines = [
            f"round {round_['index']}: student {_model(round_['student'])}",
            f"  {_count(round_['rollouts_per_prompt'], 'rollout')} of each of {_count(round_['prompts'], 'prompt')} "
            f"by {round_['engine']}, temperature {round_['temperature']:g}, top-p {round_['top_p']:g}, "
            f"seed {round_['seed']}",
            f"  {_blocks(round_)}: {_count(rollouts, 'rollout')}, {_count(round_['tokens'], 'response token')}",
        ]
        if rollouts:
            lines.append(
                f"  mean response {round_['mean_response_tokens']:.1f} tokens; "
                f"{finish['length'] / rollouts:.1%} cut at {round_['max_response_tokens']} tokens"
            )
        out.print()
        for line in lines:
            _print(out, _text(line))
        if round_["scores"]:
            out.print(_scores_table(round_["scores"]))
        for score in round_["scores"]:
            if score["read"] is not None:
                _print(out, _text(f"  {score['name']} read other prompts than the student: {score['read']}"))


def _scores_table(scores: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for column in ("scored by", "model", "dtype", "engine", "K", "blocks", "reverse KL, nats/token"):
        table.add_column(column, overflow="fold")
    for score in scores:
        kl = score.get("reverse_kl")
        table.add_row(
            *(
                _text(cell)
                for cell in (
                    score["name"],
                    _model(score["model"]),
                    score["dtype"],
                    score["engine"],
                    f"{score['candidates']}{' sampled' if score['candidate_kind'] == 'sampled' else ''}"
                    + (f" + {score['topk']}" if score["topk"] else ""),
                    f"{score['blocks']['committed']}/{score['blocks']['total']}",
                    "" if score["role"] == "student" else _nats(kl, 4),
                )
            )
        )
    return table


def show_rollout(views: Sequence[dict[str, Any]], out: Console) -> None:
    """Print one rollout by `inspect.rollout`: the prompt, and for each teacher the marked response, a legend, and the
    most corrected tokens.
    """
    rollout = views[0]
    source = f", source {rollout['source']}" if rollout["source"] else ""
    answer = f", answer {' or '.join(accepted)}" if (accepted := answers_of(rollout)) else ""
    _print(
        out,
        _text(
            f"round {rollout['round']}, rollout {rollout['rollout']}: prompt {rollout['prompt_index']}, sample "
            f"{rollout['sample_index']}, {_count(len(rollout['tokens']), 'token')}{_trained(rollout)}, finished by "
            f"{rollout['finish']}{source}{answer}"
        ),
    )
    _print(out, Text.assemble(("prompt    ", "bold"), _lines(rollout["prompt"])))
    for view in views:
        if view is not rollout:
            out.print()
        if view["teacher_prompt"] is not None:
            _print(out, Text.assemble((f"{view['teacher']} read ", "bold"), _lines(view["teacher_prompt"])))
        _show_view(view, out)


def _show_view(rollout: dict[str, Any], out: Console) -> None:
    coloured = out.color_system is not None and not out.no_color
    response = Text.assemble(("response  ", "bold"))
    for is_trained, tokens in itertools.groupby(rollout["tokens"], lambda token: token["trained"]):
        part = Text.assemble(*(_marked(token, coloured) for token in tokens))
        if not is_trained:
            part = part if coloured else Text.assemble(UNTRAINED[0], part, UNTRAINED[1])
            part.stylize(UNTRAINED_STYLE)
        response.append_text(part)
    _print(out, response)
    if _trained(rollout):
        sample = Text("like this", UNTRAINED_STYLE) if coloured else Text("".join(UNTRAINED))
        _print(out, Text.assemble(sample, " not written by the student, not trained on"))
    if not rollout["scored"]:
        missing = "no teacher has" if rollout["teacher"] is None else f"student or {rollout['teacher']} has not"
        _print(out, _text(f"not marked: {missing} scored this block"))
        return
    legend = Text(f"marked by {escape_control(rollout['teacher'])}, reverse KL in nats: ")
    for bound, style, sign in reversed(LEVELS):
        legend.append(f" from {bound:g} " if coloured else f" {sign} from {bound:g}", style if coloured else "")
        legend.append(" ")
    legend.append(f" mean {_nats(rollout['mean_reverse_kl'], 4)}")
    _print(out, legend)
    out.print(_worst_table(rollout))


def _marked(token: dict[str, Any], coloured: bool) -> Text:
    """A token's text with its mark."""
    shown = _lines(token["text"] or "·")
    level = _level(token["reverse_kl"]) if token["trained"] else None
    if level is not None and coloured:
        shown.stylize(LEVELS[level][1])
    elif level is not None:
        shown.append(LEVELS[level][2])
    return shown


def _trained(rollout: dict[str, Any]) -> str:
    """How many tokens are trained on, if not all are."""
    n = sum(token["trained"] for token in rollout["tokens"])
    return "" if n == len(rollout["tokens"]) else f", {n:,} of them trained on"


def _worst_table(rollout: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title="most corrected tokens", title_justify="left")
    for column in (
        "at",
        "token",
        "reverse KL",
        "student",
        rollout["teacher"],
        "student prefers",
        "teacher prefers",
    ):
        table.add_column(_text(column), overflow="fold")
    marked = [token for token in rollout["tokens"] if token["trained"] and (token["reverse_kl"] or 0) >= NEGLIGIBLE]
    for token in sorted(marked, key=lambda token: -token["reverse_kl"])[:WORST_TOKENS]:
        table.add_row(
            str(token["position"]),
            _quoted(token["text"]),
            _nats(token["reverse_kl"], 3),
            _percent(token["student_logprob"]),
            _percent(token["teacher_logprob"]),
            _preferences(token["candidates"], "student_logprob"),
            _preferences(token["candidates"], "teacher_logprob"),
        )
    return table


def _preferences(candidates: Sequence[dict[str, Any]], key: str) -> Text:
    known = [item for item in candidates if item[key] is not None and item[key] >= math.log(UNLIKELY)]
    best = sorted(known, key=lambda item: -item[key])[:SHOWN_CANDIDATES]
    return Text("  ").join(Text.assemble(_quoted(item["text"]), " ", _percent(item[key])) for item in best)


# ---------------------------------------------------------------------------------------------------- compared runs


def compare_runs(runs: Sequence[RunRecord]) -> None:
    """Print a table on stdout: a column for each run, as many beside one another as there is room for."""
    out = results()
    for run in runs:
        out.print(Text(escape_control(f"{run['name']}: {_ended(run)}")), soft_wrap=True)
    rows = [row for row in _comparison(runs) if any(row[1])]
    width = out.width if out.is_terminal else 100
    fit = max(1, (width - _NAME_WIDTH) // (_GAP + _RUN_WIDTH))
    beside = math.ceil(len(runs) / math.ceil(len(runs) / fit))  # as even as can be
    for first in range(0, len(runs), beside):
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        table.add_column("", width=_NAME_WIDTH, overflow="fold")
        for run in runs[first : first + beside]:
            table.add_column(_text(run["name"]), justify="right", width=_RUN_WIDTH, overflow="fold")
        for title, cells in rows:
            table.add_row(_text(title), *(_text(cell or "-") for cell in cells[first : first + beside]))
        out.print()
        out.print(table)
    if any(run["eval"] for run in runs):
        out.print("(95 % intervals, of tasks \u00b1 standard errors; fresh: on rollouts of the measured student)")


def _comparison(runs: Sequence[RunRecord]) -> Iterator[tuple[str, list[str]]]:
    """Title and a text for each run; empty if the run has no such value."""

    def figure(title: str, name: str, shown: Callable[[Any], str]) -> tuple[str, list[str]]:
        values = [run["figures"].get(name) for run in runs]
        return title, ["" if value is None else shown(value) for value in values]

    yield figure("steps", "steps", str)
    yield figure("reverse KL at the end", "reverse_kl", "{:.5f}".format)
    yield figure("  lowest", "best_reverse_kl", lambda best: f"{best[1]:.5f} at {best[0]}")
    yield figure("ESS at the end", "ess", "{:.3f}".format)
    yield figure("held-out accuracy, best", "best_heldout_accuracy", lambda best: f"{best[1]:.1%} at {best[0]}")
    yield figure("held-out format, best", "best_heldout_format", lambda best: f"{best[1]:.1%} at {best[0]}")
    yield figure("held-out rev. KL, best", "best_heldout_reverse_kl", lambda best: f"{best[1]:.5f} at {best[0]}")
    for measure in dict.fromkeys(key for run in runs for key in estimates(run, "after")):
        for phase in ("before", "after"):
            found = [estimates(run, phase).get(measure) for run in runs]
            shown = ["" if estimate is None else interval(measure, estimate) for estimate in found]
            yield (f"{MEASURES.get(measure, measure)}, before" if phase == "before" else "  after"), shown
    prompts = [(run["eval"] or {}).get("prompts") for run in runs]
    yield "  on prompts", [f"{p['count']:,} of {p['path']}" if p else "" for p in prompts]
    yield figure("seconds of training", "seconds", "{:,.0f}".format)
    yield figure("tokens/s", "tokens_per_second", "{:,.0f}".format)
    yield figure("FLOPs of training", "train_flops", "{:.2e}".format)
    yield figure("FLOPs of all stages", "flops", "{:.2e}".format)
    for key in differing(runs):
        if key == "cache":
            yield key, [learned_from(run["cache"]) if run["cache"] else "" for run in runs]
        else:
            yield key, [setting(run["recipe"][key]) if key in run["recipe"] else "" for run in runs]


def _ended(run: RunRecord) -> str:
    if run["sentence"] is None:
        return (
            f"has not ended, {run['figures'].get('steps', 0)} of {run['recipe'].get('train.steps', '?')} steps done"
        )
    return str(run["sentence"]) + (f" (exit code {run['exit_code']})" if run["exit_code"] else "")


# -------------------------------------------------------------------------------------------------------- formatting


def _level(kl: float | None) -> int | None:
    """Index into LEVELS; None for a token that is not marked."""
    return next((index for index, (bound, _, _) in enumerate(LEVELS) if kl is not None and kl >= bound), None)


def _print(out: Console, text: Text) -> None:
    """Print text without hard wraps: it is copied and piped as whole lines."""
    out.print(text, soft_wrap=True)


def _text(text: str) -> Text:
    """One line."""
    return Text(escape_control(text))


def _lines(text: str) -> Text:
    """Text with a sign before each line break."""
    return Text("↵\n".join(escape_control(line) for line in text.split("\n")))


def _quoted(text: str) -> Text:
    return Text(f"'{escape_control(text)}'")


def _nats(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(logprob: float | None) -> str:
    if logprob is None:
        return "-"
    percent = 100 * math.exp(logprob)
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%" if percent >= 0.01 else "<0.01%"


def _model(model: dict[str, Any]) -> str:
    adapter = f" + adapter {model['adapter_digest'][:8]}" if model["adapter_digest"] else ""
    return f"{model['name']}{adapter} ({model['digest'][:8]})"


def _blocks(round_: dict[str, Any]) -> str:
    return f"{round_['blocks']['committed']} of {_count(round_['blocks']['total'], 'block')} committed"


def _complete(blocks: dict[str, int]) -> bool:
    return blocks["committed"] == blocks["total"]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
