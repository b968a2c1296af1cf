"""How full micro-batches are, and how evenly ranks are loaded: a step's packs for several shapes of rollouts.

    python benchmarks/packing_fill.py

64 prompts x 4 rollouts, the mean of 30 random steps. Fill is tokens in packs over the room in them; the last pack is
part of it, so few packs cannot be full. Balance is the mean load of the ranks over the largest, for which the
others wait.
"""

from __future__ import annotations

import numpy as np

from pipeline.train.packs import PackedRow, deal, pack_rows, tokens_of

STEPS, PROMPTS, SAMPLES = 30, 64, 4
SHAPES = {
    "chat, 50-400 + ~300 tokens": ((50, 400), 300.0, 0.7),
    "maths, 80-300 + ~900 tokens": ((80, 300), 900.0, 0.6),
    "maths, most cut at 2,048": ((80, 300), 2500.0, 0.4),
}


def step(
    rng: np.random.Generator, prompt: tuple[int, int], median: float, spread: float, share: bool
) -> list[PackedRow]:
    """One step's rollouts: uniform prompts, log-normal responses of at most 2,048 tokens."""
    prompts = np.repeat(rng.integers(*prompt, PROMPTS), SAMPLES)
    responses = np.clip(rng.lognormal(np.log(median), spread, PROMPTS * SAMPLES), 1, 2048)
    sizes = zip(prompts, responses, strict=True)
    return [PackedRow(i // SAMPLES if share else i, int(p), int(r)) for i, (p, r) in enumerate(sizes)]


def main() -> None:
    print("| rollouts | tokens a micro-batch | prompts | tokens read | fill | balance, 2 ranks | 4 | 8 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for budget in (4096, 8192, 16384):
            for share in (False, True):
                rng, read, fills = np.random.default_rng(0), [], []
                balance: dict[int, list[float]] = {2: [], 4: [], 8: []}
                for _ in range(STEPS):
                    rows = step(rng, *shape, share)
                    packs = pack_rows(rows, budget)
                    tokens = sum(tokens_of([rows[i] for i in pack]) for pack in packs)
                    read.append(tokens / sum(row.tokens for row in rows))
                    fills.append(tokens / (len(packs) * budget))
                    for world, ratios in balance.items():
                        dealt = pack_rows(rows, budget, world)
                        mine = [[pack for pack in deal(dealt, rank, world) if pack] for rank in range(world)]
                        loads = [sum(tokens_of([rows[i] for i in pack]) for pack in packs) for packs in mine]
                        ratios.append(sum(loads) / world / max(loads))
                shown = " | ".join(f"{np.mean(values):.1%}" for values in (read, fills, *balance.values()))
                print(f"| {name} | {budget:,} | {'shared' if share else 'apart'} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
