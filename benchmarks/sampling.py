"""Sampling on CPUs: redpen with transformers and with vLLM, `generate` of transformers, and an earlier redpen.

    python benchmarks/sampling.py MODEL [--before CHECKOUT] [--vllm] [--prompts 24] [--tokens 96]

Word problems x 2 rollouts at temperature 1 from a chat model (a directory or Hub id) in bf16, 48 at a time, in a
process each. Tokens a second are as each prints them, by the clock, without loading; tokens a CPU second are of the
whole process, the checks before the first rollout included. `generate` returns no log-probs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import real_data as data
import tomlkit
from toy_lab import ROOT, Cost, measured, redpen, sampled

BATCH, ROLLOUTS = 48, 2


def generate(model_name: str, prompts: Path, longest: int) -> None:
    """By transformers in this process; prints tokens and seconds as `redpen rollouts` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows for _ in range(ROLLOUTS)]
    n_tokens, started = 0, time.perf_counter()
    for first in range(0, len(chats), BATCH):
        inputs = tokenizer.apply_chat_template(
            chats[first : first + BATCH],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        made = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest)
        n_tokens += int((made[:, inputs["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())
    print(f"{n_tokens} tokens in {time.perf_counter() - started:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--before", type=Path, help="another checkout of redpen")
    parser.add_argument("--vllm", action="store_true", help="with vLLM too")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96, help="of a rollout, at most")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate:
        generate(args.model, args.generate, args.tokens)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prompts, recipe = directory / "prompts.jsonl", directory / "recipe.toml"
        data.write(prompts, data.word_problems(args.prompts, 1, data.TRAIN_NAMES))
        sections = {
            "student": {"model": args.model},
            "teacher": {"model": args.model},
            "prompts": {"path": str(prompts), "template": "chat"},
            "rollouts": {
                "rollouts_per_prompt": ROLLOUTS,
                "max_response_tokens": args.tokens,
                "prompts_per_block": BATCH // ROLLOUTS,
                "batch_size": BATCH,
            },
            "vllm": {"enforce_eager": True},
        }
        recipe.write_text(tomlkit.dumps(sections))

        def by_redpen(engine: str, root: Path = ROOT) -> Cost:
            cache = directory / f"{engine}-{root.name}.zarr"
            return redpen("rollouts", recipe, "--cache", cache, settings=[f"rollouts.engine={engine}"], root=root)

        costs = {"transformers": by_redpen("transformers")}
        if args.before:
            costs["transformers, before"] = by_redpen("transformers", args.before.resolve())
        costs["generate"] = measured(__file__, args.model, "--tokens", args.tokens, "--generate", prompts)
        if args.vllm:
            costs["vLLM, not compiled"] = by_redpen("vllm")
        print(f"{'':24}{'tokens':>8}{'tokens/s':>10}{'tokens/CPU s':>14}{'GB':>6}")
        for way, cost in costs.items():
            n_tokens, seconds = sampled(cost.output)
            rates = f"{n_tokens / seconds:10.1f}{n_tokens / cost.cpu_seconds:14.1f}"
            print(f"{way:24}{n_tokens:8}{rates}{cost.anonymous / 1e9:6.1f}")


if __name__ == "__main__":
    main()
