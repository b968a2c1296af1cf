"""Distillation of real pretrained models, measured: `make real`, or one experiment: `make real ROW=context`.

    python benchmarks/real.py [ROW ...] [--student DIR] [--teacher DIR] [--small DIR] [--seeds 3] [--engine vllm]

    larger_teacher   Qwen2.5-Coder-0.5B-Instruct learns word problems from 1.5B-Instruct, one round and three
    trl              the same pair, the same prompts and steps by TRL's DistillationTrainer (pip install trl==1.16.0)
    rescue           SmolLM2-135M-Instruct learns a company's facts, and gets its instruction following back
    context          SmolLM2 learns from itself with a system message
    other_tokenizer  SmolLM2 learns sums from Qwen2.5-Coder-1.5B-Instruct, by spans of text
    engines          transformers and vLLM as samplers

Models are Hub ids, or directories given instead. A row whose models are not available says so and the others go on.
Figures are kept in WORK/results.json as soon as they are there, so a run that was cut goes on where it was; the page
is written from all of them. Everything is done by redpen's commands in processes of their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from claims import measured_at
from real_rows import ROWS, Lab
from toy_lab import ROOT, Results

TITLES = {
    "larger_teacher": "A larger teacher",
    "trl": "Beside TRL",
    "rescue": "New facts, old behaviour",
    "context": "A system message, learnt",
    "other_tokenizer": "A teacher with another tokenizer",
    "engines": "transformers and vLLM as samplers",
}
#: The models of each row, by role.
NEEDS = {
    "larger_teacher": ("student", "teacher"),
    "trl": ("student", "teacher"),
    "rescue": ("small",),
    "context": ("small",),
    "other_tokenizer": ("small", "teacher"),
    "engines": ("student", "teacher"),
}
HUB = {
    "student": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "teacher": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "small": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def missing(models: dict[str, str], row: str) -> str | None:
    """Why a row cannot be run here, or None."""
    from pipeline.config import ModelConfig
    from pipeline.errors import RedpenError
    from pipeline.models.resolve import resolve

    try:
        for role in NEEDS[row]:
            resolve(ModelConfig(model=models[role]))
    except RedpenError as error:
        return str(error)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="default: all")
    for role, name in HUB.items():
        parser.add_argument(f"--{role}", default=name, help=f"default: {name}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="for rollouts")
    parser.add_argument("--quick", action="store_true", help="a few prompts and steps, to try that everything runs")
    parser.add_argument("--work", type=Path, default=ROOT / ".real", help="caches, runs and results.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "real.md")
    args = parser.parse_args()
    models = {role: str(Path(name).resolve()) if Path(name := getattr(args, role)).exists() else name for role in HUB}
    work = args.work.resolve()
    results = Results(work / "results.json")
    lab = Lab(work, models, args.seeds, args.engine, args.quick, results)
    where = results.get("measured at", measured_at)
    parts = []
    for row in args.rows or ROWS:
        print(f"{row} ...", file=sys.stderr, flush=True)
        reason = missing(models, row)
        text = f"Not run: {reason}" if reason else ROWS[row](lab)
        parts.append(f"## {TITLES[row]}\n\n    make real ROW={row}\n\n{text}\n")
        print(f"\n{parts[-1]}", flush=True)
    if not args.rows and not args.quick:
        minutes = sum(run["seconds"] for run in results.figures.values() if isinstance(run, dict)) / 60
        head = f"# Real models\n\nMeasured by `make real` at {where}: {minutes:.0f} minutes.\n"
        args.page.write_text("\n".join([head, *parts]), encoding="utf-8")
        print(f"{args.page}: {len(parts)} rows")


if __name__ == "__main__":
    main()
