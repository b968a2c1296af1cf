"""Published claims about the method, measured on the toys: `make claims`, or one row: `make claims ROW=company`.

    python benchmarks/claims.py [ROW ...] [--seeds 3] [--work .claims] [--page docs/claims.md]

    routes         distillation, more fine-tuning on teacher samples, or reinforcement learning, at equal accuracy
    curve          accuracy and reverse KL by step
    rounds         one cache against rounds of new rollouts
    company        a company's facts by fine-tuning, its assistant's formats back by self-distillation
    rank           LoRA rank 8, 32, 128                        )
    temperature    rollouts at temperature 0, 0.3, 1           ) as benchmarks/ablations.py has them,
    single_prompt  20 epochs on one prompt                     ) with one seed
    teacher_time   cached replay against a live teacher        )

Every run's figures are kept in WORK/results.json as soon as they are there, so what is cut goes on where it was; the
page is written from all of them, and only then. Everything is done by redpen's own stages.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import torch
from claim_rows import ROWS, Found, Work
from toy_lab import ROOT

TITLES = {
    "routes": "Distillation, more fine-tuning, or reinforcement learning",
    "curve": "Learning curve and reverse KL",
    "rounds": "One cache, or rounds",
    "company": "The company's assistant",
    "rank": "LoRA rank",
    "temperature": "Temperature of the rollouts",
    "single_prompt": "20 epochs on one prompt",
    "teacher_time": "Cached replay or a live teacher",
}
NOTES = {
    "routes": """
Compared are one round of rollouts with reverse KL over 8 candidates, fine-tuning on responses of the teacher to
the same prompts, and GRPO (`toy-grpo`) in rounds of 256 prompts x 8. The first two use 64, 256 and 1,024 prompts
x 4, and 15, 30 and 60 steps of 256 responses; each cell is the minimum over these, interpolated log-linearly.
FLOPs are from the ledgers: sampling, scoring and training, of the student and of the teacher, which is 3.5 times
as large. The student fails for one reason, a forgotten carry, in four answers of ten. This favours rewards,
because right answers are frequent, and fine-tuning, because the teacher's answers show the missing carry as well
as its corrections do.
""",
    "curve": """
`redpen train toy` without its stop at a cached reverse KL of 0.002: 512 prompts x 4, replayed for 150 steps
of 64 prompts. The cached reverse KL falls as the cache is memorised; the fresh one shows the actual progress.
""",
    "rounds": """
`redpen train toy` and `redpen distill toy`, then `redpen eval` on the 2,048 held-out sums. A round is 512
prompts x 4, and the learning rate decreases by 15 % per round.
""",
    "company": """
`redpen continual company` ([continual.md](continual.md)): a base model that follows formatting instructions, 43
private facts in documents (70 % of the tokens) and ordinary chats (30 %), then self-distillation on
instructions without answers.
""",
    "rank": "80 steps on 2,048 rollouts.",
    "temperature": "80 steps on 2,048 rollouts at each temperature, with both losses.",
    "single_prompt": "An epoch is one step, on 64 rollouts of one prompt.",
    "teacher_time": "80 steps of 256 rollouts, with a live teacher at every step, or from a cache.",
}


def measured_at() -> str:
    """Which code, and on what."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    written = ("docs/claims.md", "docs/figures/claims_")
    changed = [line for line in git("status", "--porcelain").splitlines() if not line[3:].startswith(written)]
    tree = "a clean tree" if not changed else f"a tree with {len(changed)} changed files"
    return (
        f"{git('rev-parse', '--short=8', 'HEAD')}, {tree}, on {datetime.now(UTC):%Y-%m-%d} ({platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__})"
    )


def page(found: dict[str, Found], work: Work, where: str) -> str:
    minutes = sum(run["seconds"] for run in work.results.figures.values() if isinstance(run, dict)) / 60
    lines = [
        "# The claims, in miniature",
        "",
        *textwrap.wrap(
            f"Measured by `make claims` at {where}: {minutes:.0f} minutes, and some more for the ablations. The "
            "models are the built-in toys of 0.2 to 0.8 M parameters, so only the direction of a claim is compared, "
            "not its size. Figures are medians, with the lowest and highest of the seeds.",
            118,
        ),
        "",
        "| published claim | published result | here | seeds | holds here |",
        "|---|---|---|---|---|",
        *(
            f"| {c.claim} | {c.source} | {c.ours} | {c.seeds} | {c.holds} |"
            for row in found.values()
            for c in row.claims
        ),
        "",
    ]
    for name, row in found.items():
        drawing = work.figures / f"claims_{name}.svg"
        lines += [f"## {TITLES[name]}", "", f"    make claims ROW={name}", "", NOTES[name].strip(), ""]
        if drawing.exists():
            lines += [f"![{TITLES[name]}: the table below as curves](figures/{drawing.name})", ""]
        lines += [row.table.strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / ".claims", help="runs, and results.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "claims.md")
    args = parser.parse_args()
    work = Work(args.work, args.seeds, args.page.parent / "figures")
    where = work.results.get("measured at", measured_at)
    found = {}
    for name in args.rows or ROWS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = ROWS[name](work)
        for claim in found[name].claims:
            print(f"{claim.claim}: {claim.ours}; holds: {claim.holds}", flush=True)
    if args.rows:
        for row in found.values():
            print(f"\n{row.table.strip()}")
    else:
        args.page.write_text(page(found, work, where), encoding="utf-8")
        print(f"{args.page}: {len(found)} rows")


if __name__ == "__main__":
    main()
