"""How full micro-batches are, and how evenly ranks are loaded: one step's packs for several shapes of rollouts.

    python benchmarks/packing_fill.py

Fill is tokens in packs over the room in as few packs as the tokens need at all, rounded up; balance is the mean load
of the ranks over the largest, which is what they wait for. The mean of 50 random steps.
"""

from __future__ import annotations

import numpy as np

from pipeline.train.packs import deal, pack_rows

STEPS, PROMPTS, SAMPLES = 50, 64, 4


def rollouts(rng: np.random.Generator, prompt: tuple[int, int], median: float, spread: float, most: int) -> list[int]:
    """Lengths of one step's rollouts: uniform prompts, log-normal responses cut at `most`."""
    prompts = np.repeat(rng.integers(*prompt, PROMPTS), SAMPLES)
    responses = np.minimum(rng.lognormal(np.log(median), spread, PROMPTS * SAMPLES), most)
    return [int(n) for n in prompts + np.maximum(responses, 1)]


SHAPES = {
    "chat, 50-400 + ~300 tokens": ((50, 400), 300.0, 0.7, 2048),
    "maths, 80-300 + ~900 tokens": ((80, 300), 900.0, 0.6, 2048),
    "maths, most cut at 2,048": ((80, 300), 2500.0, 0.4, 2048),
}


def main() -> None:
    print("| rollouts | tokens a micro-batch | fill, 1 rank | balance, 2 | 4 | 8 ranks |\n|---|---|---|---|---|---|")
    for name, (prompt, median, spread, most) in SHAPES.items():
        for budget in (4096, 8192, 16384):
            rng = np.random.default_rng(0)
            fills, balance = [], {world: [] for world in (2, 4, 8)}
            for _ in range(STEPS):
                lengths = rollouts(rng, prompt, median, spread, most)
                packs = pack_rows(lengths, budget)
                fills.append(sum(lengths) / (len(packs) * budget))
                for world, ratios in balance.items():
                    packs = pack_rows(lengths, budget, world)
                    loads = [
                        sum(lengths[row] for pack in deal(packs, rank, world) if pack for row in pack)
                        for rank in range(world)
                    ]
                    ratios.append(sum(loads) / world / max(loads))
            shown = " | ".join(f"{np.mean(ratios):.1%}" for ratios in balance.values())
            print(f"| {name} | {budget:,} | {np.mean(fills):.1%} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
