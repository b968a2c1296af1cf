"""A diagnosis as text on stdout: a headline, the results of the checks, key figures, what training would correct.

Control characters from models, tokenizers and manifests are escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.console import escape_control, results
from pipeline.diagnose.figures import EARLY, FIRST_TOKENS, percent

#: Longest line, in columns.
_WIDTH = 110
#: Fraction of the reverse KL from which a token is named.
_WORTH_NAMING = 0.005
_SIGNS = {"blocks": ("✗ blocks", "bold red"), "harms": ("! harms", "bold yellow"), "note": ("· note", "bold blue")}


def show(found: dict[str, Any]) -> None:
    """Print what `stage.diagnosis` returned."""
    out = results()
    _paragraph(out, _headline(found), style="bold")
    _paragraph(out, _looked_at(found))
    for finding in found["findings"]:
        sign, style = _SIGNS[finding["severity"]]
        teacher = f" [{finding['teacher']}]" if finding["teacher"] and len(found["teachers"]) > 1 else ""
        out.print()
        _paragraph(out, f": {finding['verdict']}{teacher} ({finding['key']})", before=(sign, style))
        for line in finding["evidence"]:
            _paragraph(out, f"- {line}", indent=4)
        _paragraph(out, f" {finding['remedy']}", indent=4, before=("what to do:", "bold"))
    out.print()
    out.print(_table(found))
    out.print()
    for pair in found["between"]:
        _paragraph(out, _disagreement(pair))
    for name, corrected in found["corrected"].items():
        if corrected:
            _paragraph(out, _expectation(found, name, corrected))
    if found["distinct_responses"] < 0.5 and all(finding["severity"] == "note" for finding in found["findings"]):
        _paragraph(
            out,
            "Most responses repeat another: with fewer rollouts.rollouts_per_prompt and more prompts, the teacher "
            "would score more different ones.",
        )


def _headline(found: dict[str, Any]) -> str:
    worst = {finding["severity"] for finding in found["findings"]}
    several = len(found["teachers"]) > 1
    pair = "These pairs" if several else "This pair"
    few = {finding["teacher"] for finding in found["findings"] if finding["key"] == "few-tokens"}
    if len(few) == len(found["teachers"]):
        return f"Too few tokens to say whether {pair.lower()} will work."
    if "blocks" in worst:
        blocked = {finding["teacher"] for finding in found["findings"] if finding["severity"] == "blocks"}
        if len(blocked) < len(found["teachers"]):
            return f"With {_listed(sorted(blocked))} this will not work; see below for the others."
        return f"{pair} will not work."
    if "harms" in worst:
        return f"{pair} can work, but not well."
    return f"{pair} can work." + ("" if worst else " Nothing wrong was found.")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _looked_at(found: dict[str, Any]) -> str:
    read, scored, total = (found["blocks"][key] for key in ("read", "scored", "total"))
    part = f"; of {scored} of {total} blocks" if scored < total else ""
    part += f"; of {read} evenly spaced blocks" if read < scored else ""
    teachers = ", ".join(f"{name} {model}" for name, model in found["teachers"].items())
    return (
        f"{found['cache']} round {found['round']}: student {found['student']}; {teachers}; "
        f"{found['responses']:,} responses of {found['mean_response_tokens']:.0f} tokens on average, "
        f"{percent(found['distinct_responses'])} of them different{part}"
    )


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


_ROWS: Sequence[tuple[str, Callable[[dict[str, Any]], str]]] = (
    ("scored tokens", lambda f: f"{f['tokens']:,}"),
    (
        "  fraction of the student's tokens",
        lambda f: "-" if f["scored_share"] == 1 else percent(f["scored_share"]),
    ),
    ("reverse KL, nats per token", lambda f: _nats(f["reverse_kl"])),
    ("  of the first, second, last third", lambda f: " ".join(_nats(third) for third in f["reverse_kl_thirds"])),
    (f"  of the first {FIRST_TOKENS} tokens", lambda f: _nats(f["reverse_kl_first_tokens"])),
    (f"  fraction of it in the first {EARLY:.0%}", lambda f: percent(f["early_share"])),
    ("  half of it lies in", lambda f: f"{percent(f['half_in'])} of the tokens" if f["half_in"] else "-"),
    ("teacher's probability of the student's candidates", lambda f: percent(f["shared"])),
    ("student's own of them", lambda f: "-" if f["shared"] is None else percent(f["student_shared"])),
    ("candidates among the teacher's likeliest", lambda f: percent(f["overlap"])),
    ("same likeliest candidate", lambda f: percent(f["agreement"])),
    ("log-prob of the tokens, student and teacher", lambda f: f"{_nats(f['student_logprob'])} {_nats(f['logprob'])}"),
    ("entropy, student and teacher", lambda f: f"{_nats(f['student_entropy'])} {_nats(f['entropy'])}"),
    ("teacher's log-prob of stop tokens, median", lambda f: _nats(f["stop_logprob"])),
    ("tokens unlikely, impossible for the teacher", lambda f: f"{percent(f['unlikely'])} {percent(f['impossible'])}"),
)


def _table(found: dict[str, Any]) -> Table:
    """One column per teacher; rows without any value are left out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("key figures")
    for name in found["figures"]:
        table.add_column(Text(escape_control(name)), justify="right")
    for label, cell in _ROWS:
        cells = [cell(figures) for figures in found["figures"].values()]
        if any(text != "-" for text in cells):
            table.add_row(label, *cells)
    return table


def _disagreement(pair: dict[str, Any]) -> str:
    one, other = pair["teachers"]
    if not pair["differ"]:
        return f"{one} and {other} prefer different tokens nowhere: a mixture of them has one target."
    at = "; ".join(
        f"{item['token']} ({one} {item['wants'][one]}, {other} {item['wants'][other]})" for item in pair["at"]
    )
    return (
        f"{one} and {other} prefer different tokens at {percent(pair['differ'])} of the positions, most "
        f"often at {at}. There a mixture has two targets; with train.route each teacher has its own sources."
    )


def _expectation(found: dict[str, Any], name: str, corrected: Sequence[dict[str, Any]]) -> str:
    figures = found["figures"][name]
    tokens = ", ".join(
        item["token"] + (f" (rather {item['prefers']})" if item["prefers"] else "") + f" {percent(item['share'])}"
        for item in corrected
        if item["share"] >= _WORTH_NAMING
    )
    return (
        f"What {name} would correct: half of the reverse KL lies in {percent(figures['half_in'])} of the tokens; "
        + (f"by token, of all of it: {tokens}" if tokens else "no token stands out")
        + f". `redpen inspect {found['cache']} --rollout N` shows the positions."
    )


def _paragraph(
    out: Console, text: str, *, indent: int = 0, style: str = "", before: tuple[str, str] | None = None
) -> None:
    """Text in lines of at most _WIDTH columns; those after the first are indented a little more."""
    line = Text(style=style)
    if before is not None:
        line.append(*before)
    line.append(escape_control(text))
    margin = indent + 2 if indent else 0
    for number, part in enumerate(line.wrap(out, min(out.width, _WIDTH) - margin)):
        part.rstrip()
        out.print(Text(" " * (margin if number else indent)).append_text(part), soft_wrap=True)
