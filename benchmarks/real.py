"""Distillation of real pretrained models, measured: `make real`, or one experiment: `make real ROW=context`.

    python benchmarks/real.py [ROW ...] [--student DIR] [--teacher DIR] [--small DIR] [--seeds 3] [--engine vllm]

    larger_teacher   Qwen2.5-Coder-0.5B-Instruct learns word problems from 1.5B-Instruct in one round
    rounds           two rounds more
    teacher          what that teacher can do itself
    trl              the same pair, the same prompts and steps by TRL's DistillationTrainer
    rescue           SmolLM2-135M-Instruct learns a company's facts, and gets its instruction following back
    context          SmolLM2 learns from itself with a system message
    solution         Qwen2.5-Coder-0.5B-Instruct learns word problems from itself, shown the worked solutions
    other_tokenizer  SmolLM2 learns sums from Qwen2.5-Coder-1.5B-Instruct, by spans of text
    engines          transformers and vLLM as samplers

Models are Hub ids, or directories given instead. Every command of redpen has a process of its own. What has ended is
kept in WORK, so a run that was cut goes on where it was, and rows may be measured on different days: the page is
written from all that is in WORK/results.json. `--seeds 0` measures nothing and writes the page.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import real_plan
import torch
from real_rows import HELD_OUT, LIMIT, PROMPTS, ROWS, SUMS, Figures, Lab, Row
from toy_lab import ENVIRONMENT, ROOT, Results

HUB = {
    "student": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "teacher": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "small": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

HEAD = """# Real models

Pretrained models through redpen's own commands, by `make real`. Other work may have shared the machine, so CPU
time (user and system, of a command and all that it starts) is given beside time by the clock. Rows were
measured one by one; each names its date, the commit that last changed redpen before it, and its machine.
Intervals are 95 %. One seed shows a direction, not a spread.

Rows since 2026-11-29 also show `redpen plan` for that machine, from the rates of two matrix products. It is made for
GPUs: sampling there takes the longer of reading weights and computing. A CPU does one after the other, and has the
head's product in fp32 and a vocabulary of 151,936 to draw from, so it samples about half as fast as planned.
"""
NOTES = {
    "larger_teacher": f"""
        Qwen2.5-Coder-0.5B-Instruct learns from 1.5B-Instruct: {PROMPTS} word problems x 2 rollouts of at most
        {LIMIT} tokens at T = 1, 16 candidates, LoRA of rank 32, learning rate 1e-4, {2 * PROMPTS // 8} steps of
        16 rollouts, so that each is used twice. Held-out problems ({HELD_OUT}) share templates with those of
        training, but no name and no problem. Responses that are cut off at the limit count as they stand.

        Seed 0's effective sample size was at least 0.85 in all steps but two, in which one token of the tail, 800 to
        3,107 times as likely by then as when it was sampled, outweighs the rest.

        With other problems, of three and four steps, seed 0 came closer to the teacher and answered worse (revision
        79a6278 of this page: fresh reverse KL 0.164 -> 0.087, greedy 60.4 -> 41.7 %). There the teacher was hardly
        better, with 63.5 %, and 76 % of the training responses were cut at 192 tokens, before the answer.
    """,
    "rounds": "The same, and two rounds more of as many new problems, answered by the student so far.",
    "teacher": "What the teacher does on these prompts by itself, greedy and sampled.",
    "trl": """
        TRL's DistillationTrainer on the same pair, problems, LoRA rank, learning rate and steps of 16 rollouts;
        it samples anew at every step, with both models in memory and the whole vocabulary. Times a step are by
        the clock, so this row needs a quiet machine.
    """,
    "rescue": """
        `redpen continual`: SmolLM2-135M-Instruct is fine-tuned on 24 facts of a made-up company in 400
        documents and 300 chats (80 steps of 8 examples), then distilled for one round from itself as it was
        before, on 64 prompts with a wish about the answer's form x 2 rollouts of at most 96 tokens (8 steps
        of 32 rollouts). Knowledge: the 24 facts, asked in words that were not trained on. Instructions: 64
        other prompts of this kind, by IFEval's checkers (strict) in lm-evaluation-harness.

        Seed 0 was cut on 2026-11-29 after `redpen continual`, before the evaluations. Its gate: knowledge 0.0
        % before, 95.8 % (80 to 99) after fine-tuning, 20.8 % (9 to 41) after distillation, so most of what
        was gained is lost with these settings. The fine-tuned student answered the prompts in 19 tokens on
        average, at a reverse KL of 2.47 nats a token, which 8 steps brought to 0.97: fine-tuning at 3e-4
        moved the student far. Fewer or smaller steps of both, and company questions among the prompts, have
        not been tried yet.
    """,
    "context": """
        SmolLM2-135M-Instruct learns from itself with a system message that it is not given: 64 prompts x 2
        rollouts of at most 64 tokens, 16 steps of 16 rollouts. Held out are 48 prompts about other topics. The
        column "with the message" is the untrained model that is given the message.
    """,
    "solution": f"""
        Qwen2.5-Coder-0.5B-Instruct learns from itself, as it was, shown the worked solution of each problem
        (`teacher.prompt`); problems, rollouts, steps and held-out problems are those of the larger teacher,
        {PROMPTS} x 2 rollouts and {2 * PROMPTS // 8} steps of 16. The column "shown the solution" is the
        untrained model that is given it.
    """,
    "other_tokenizer": f"""
        SmolLM2-135M-Instruct (49,152 tokens) learns bare sums from Qwen2.5-Coder-1.5B-Instruct (151,936
        tokens): `score.alignment = "spans"` compares spans of text, with `importance_sampling`; {PROMPTS} sums
        x 4 rollouts of at most 48 tokens, 16 steps of 32 rollouts. Held out are {SUMS} sums.
    """,
    "engines": f"The same {PROMPTS} x 2 rollouts of the larger teacher's student, by either engine, not compiled.",
}


def missing(models: dict[str, str], row: Row) -> str | None:
    """Why a row cannot be run here, or None."""
    from pipeline.config import ModelConfig
    from pipeline.errors import RedpenError
    from pipeline.models.resolve import resolve

    if absent := [name for name in row.packages if importlib.util.find_spec(name) is None]:
        return f"it needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed"
    try:
        for role in row.needs:
            resolve(ModelConfig(model=models[role]))
    except RedpenError as error:
        return str(error)
    return None


def product_code() -> str:
    """The commit that last changed redpen itself, and whether it has changed since."""

    def git(*args: str) -> str:
        command = ["git", *args, "--", "pipeline", "cache_schema"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--abbrev=8") + (", changed" if git("status", "--porcelain") else "")


def measured_row(lab: Lab, row: Row, name: str, seed: int, weights: str) -> Figures:
    """A row's figures for a seed, and what they are of: commands with their cost, date, code, machine and models."""
    directory = lab.work / f"{row.directory or name}-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    about = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "code": product_code(),
        "machine": f"{platform.machine()}, {ENVIRONMENT['OMP_NUM_THREADS']} threads, torch {torch.__version__}",
        "models": {role: Path(lab.models[role]).name for role in row.needs},
        "weights": weights,
    }
    lab.rates(directory)  # measured before the row's work
    found = row.measure(lab, directory, seed)
    return found | {"about": about, "commands": Results(directory / "commands.json").figures}


def cost_line(seed: int, run: Figures) -> str:
    """Where and when, minutes of CPU by command, and the most memory."""
    parts, about = run["commands"], run["about"]
    by_command = ", ".join(f"{name} {cost['cpu_seconds'] / 60:.1f}" for name, cost in parts.items())
    cpu, wall = (sum(cost[key] for cost in parts.values()) / 60 for key in ("cpu_seconds", "seconds"))
    cut = [name for name, cost in parts.items() if cost["continued"]]
    largest = max(parts, key=lambda name: parts[name]["gb"])
    text = (
        f"Seed {seed}: {about['date']}, redpen as of {about['code']}, {about['machine']}; "
        f"weights {about['weights']}. "
        f"{cpu:.0f} CPU minutes ({wall:.0f} by the clock): {by_command}. "
        f"Memory of a process: {parts[largest]['gb']:.1f} GB at most ({largest})."
    )
    return f"{text} Cut and continued, with the time of the last attempt: {', '.join(cut)}." if cut else text


def section(name: str, figures: dict[str, Any]) -> str:
    row = ROWS[name]
    runs = {int(key.split()[1]): run for key, run in sorted(figures.items()) if key.split()[0] == name}
    parts = [f"## {row.title}", f"    make real ROW={name}", wrapped(NOTES[name])]
    parts += [row.render(runs)] if runs else ["Not run."]
    for seed, run in runs.items():
        parts += [wrapped(cost_line(seed, run)), *([real_plan.rendered(run["plan"])] if "plan" in run else [])]
    return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> str:
    return "\n\n".join(textwrap.fill(paragraph, 118) for paragraph in textwrap.dedent(text).strip().split("\n\n"))


def write(page: Path, figures: dict[str, Any]) -> None:
    """All rows, those without figures too."""
    page.write_text("\n".join([HEAD, *(section(name, figures) for name in ROWS)]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="default: all")
    for role, name in HUB.items():
        parser.add_argument(f"--{role}", default=name, help=f"default: {name}")
    parser.add_argument(
        "--weights", default="as on the Hub", help="what the page says of directories, e.g. their source"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="for rollouts")
    parser.add_argument("--quick", action="store_true", help="a few prompts and steps, to try that everything runs")
    parser.add_argument("--work", type=Path, default=ROOT / ".real", help="caches, runs and results.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "real.md")
    args = parser.parse_args()
    models = {role: str(Path(name).resolve()) if Path(name := getattr(args, role)).exists() else name for role in HUB}
    work = args.work.resolve() / ("quick" if args.quick else "")
    lab, results = Lab(work, models, args.engine, args.quick), Results(work / "results.json")
    for name in args.rows or ROWS:
        row = ROWS[name]
        for seed in range(min(args.seeds, row.seeds or args.seeds)):
            if f"{name} {seed}" not in results.figures and (reason := missing(models, row)):
                print(f"{name}: not run, {reason}", file=sys.stderr, flush=True)
                break
            results.get(f"{name} {seed}", partial(measured_row, lab, row, name, seed, args.weights))
            if args.quick:
                print(section(name, results.figures), flush=True)
            else:
                write(args.page, results.figures)
    if not args.quick:
        write(args.page, results.figures)


if __name__ == "__main__":
    main()
