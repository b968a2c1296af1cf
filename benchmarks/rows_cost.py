"""What padded rows cost against packed rollouts: one model that can be packed, scored and trained both ways.

    python benchmarks/rows_cost.py [--hidden 256] [--layers 4] [--rollouts 48]

Chat-like rollouts: prompts of 50 to 400 tokens, log-normal responses with a median of 300. Padding is the fraction of
tokens in a forward that belong to no rollout. Both layouts are timed in turn, in one process; figures are
medians, on a CPU of the time that it worked, so that other work hardly matters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import cache_schema as cs
from pipeline.config import TrainConfig
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, TokenBatch, sequences
from pipeline.forward.attention import ATTENTION, register_packed_attention
from pipeline.forward.packing import tiles
from pipeline.forward.rows import RowTokens
from pipeline.models.lora import make_trainable
from pipeline.train import in_memory
from pipeline.train.objective import CrossEntropy
from pipeline.train.trainer import StudentTrainer

VOCAB, LAYOUTS = 1024, {"packed": ATTENTION, "rows": "sdpa"}


def chat_like(count: int, seed: int = 0) -> cs.RolloutBlock:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(50, 400, count)
    responses = np.clip(rng.lognormal(np.log(300), 0.7, count), 1, 2048).astype(int)
    rows = [
        cs.RolloutRow(i, 0, rng.integers(0, VOCAB, n).astype(np.int32), np.zeros(n, np.float32), cs.FINISH_OTHER)
        for i, n in enumerate(responses)
    ]
    return cs.RolloutBlock.from_rows(
        [(i, rng.integers(0, VOCAB, n).astype(np.int32)) for i, n in enumerate(prompts)], rows
    )


def padding(block: cs.RolloutBlock, budget: int) -> float:
    """The fraction of padding in the rows of tiles of so many tokens."""
    ids, starts = sequences(block, range(block.n_rows))
    read = sum(map(len, ids))
    laid_out = [
        RowTokens.of(ids[r.start : r.stop], starts[r.start : r.stop]) for r in tiles([len(s) for s in ids], budget)
    ]
    return 1 - read / sum(group.input_ids.numel() for tokens in laid_out for group in tokens.groups)


def timed(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, all called in turn, after one call to warm up."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, call in work.items():
            started = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tile-tokens", type=int, default=8192)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    register_packed_attention()
    block = chat_like(args.rollouts)
    tokens = int((block.prompt_length[block.row_prompt] + block.response_length).sum())
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
    )
    train = TrainConfig(tokens_per_microbatch=args.tile_tokens, share_prompts_from=10**6)
    scoring, training = {}, {}
    for layout, attention in LAYOUTS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).to(device).eval()
        scorer = ResidentScorer(model.requires_grad_(False), ScoreOptions(tile_tokens=args.tile_tokens))
        scoring[layout] = lambda scorer=scorer: scorer.compute_logprobs(TokenBatch((block,)))
    scored = timed(scoring, args.rounds)
    for layout, attention in LAYOUTS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).to(device).eval()
        trainer = StudentTrainer(make_trainable(model, train), CrossEntropy(), train)
        batch = in_memory.batch(0, block, block.rollout_logprobs, {})
        training[layout] = lambda trainer=trainer, batch=batch: trainer.gradient(batch)
    trained = timed(training, args.rounds)
    fraction = padding(block, args.tile_tokens)
    shape = f"{args.layers} layers of {args.hidden}, {dtype}, {device}"
    print(f"{args.rollouts} chat-like rollouts, {tokens:,} tokens; {shape}")
    print("| step | packed, tokens/s | rows, tokens/s | rows / packed | padding of rows |")
    print("|---|---|---|---|---|")
    for step, seconds in {"score": scored, "train": trained}.items():
        rates = [tokens / seconds[layout] for layout in LAYOUTS]
        print(f"| {step} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[1] / rates[0]:.2f} | {fraction:.1%} |")


if __name__ == "__main__":
    main()
