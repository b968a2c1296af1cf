"""How often the 95 % intervals of a mean per token hold the true mean, by the number of prompts.

    python benchmarks/interval_coverage.py [--trials 2000]

Each prompt has a mean of its own, from a normal, gamma, exponential or log-normal distribution of mean 0.1, and a
log-normal number of tokens (coefficient of variation 0.8). Prints, for each, the fraction of samples that give an
interval, the fraction of these intervals that hold 0.1, and the median ratio of upper end to mean.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np

from pipeline.rounds.intervals import mean_per_token

PROMPTS = (5, 8, 15, 30, 100)
LEVELS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal, cv 0.3": lambda rng, n: rng.normal(0.1, 0.03, n),
    "gamma, shape 2": lambda rng, n: rng.gamma(2.0, 0.05, n),
    "exponential": lambda rng, n: rng.exponential(0.1, n),
    "gamma, shape 0.5": lambda rng, n: rng.gamma(0.5, 0.2, n),
    "log-normal, sigma 1": lambda rng, n: 0.1 * rng.lognormal(-0.5, 1.0, n),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    args = parser.parse_args()
    print("| prompts |" + "".join(f" {level} |" for level in LEVELS))
    print("|---|" + "---|" * len(LEVELS))
    for n_prompts in PROMPTS:
        cells = []
        for draw in LEVELS.values():
            rng, found = np.random.default_rng(0), []
            for _ in range(args.trials):
                tokens = np.ceil(rng.lognormal(3, 0.7, n_prompts))
                found.append(mean_per_token(draw(rng, n_prompts) * tokens, tokens))
            given = [each for each in found if not math.isnan(each.low)]
            covered = sum(each.low <= 0.1 <= each.high for each in given) / len(given)
            ratio = float(np.median([each.high / each.value for each in given]))
            cells.append(f"{len(given) / args.trials:.0%} given, {covered:.1%} hold, x {ratio:.2f}")
        print(f"| {n_prompts} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
