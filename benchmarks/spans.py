"""What a teacher with another tokenizer teaches through shared spans of text (`score.alignment = "spans"`).

    python benchmarks/spans.py [--work DIR] [--teacher-steps 300]

The toy teacher gets a tokenizer that writes `+`, `*` and `=` in one token with the digit that follows, and is trained
on right sums until it can write so. The student, whose tokens are bytes, then learns from it by spans, and
from the toy teacher itself by tokens: the same prompts, rollouts and steps, by importance sampling.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from toy_lab import evaluate
from toy_training import make_cache, toy_recipe
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import pipeline.score.stage
from pipeline.toy import asset_path, build, world
from pipeline.train import stage as train

END = build.END_OF_TEXT_ID


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The toy's bytes under their own ids, then its special tokens, then every sign with every digit."""
    vocab = {letter: byte for byte, letter in bytes_to_unicode().items()}
    special = (build.END_OF_TEXT, build.IM_START, build.IM_END)
    vocab |= {token: len(vocab) + i for i, token in enumerate(special)}
    merges = [(a, b) for a in "+*=" for b in "0123456789"]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=build.END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def make_teacher(path: Path, steps: int) -> None:
    """The toy teacher in that tokenizer, trained on right sums."""
    torch.manual_seed(0)
    tokenizer = merging_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(asset_path("teacher"), dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    problems, rng = list(world.problems("train")), random.Random(0)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for problem in rng.choices(problems, k=128):
            prompt, response = tokenizer(problem.prompt)["input_ids"], tokenizer(world.solve(problem)[0])["input_ids"]
            rows.append((prompt, [*response, END]))
        return build.padded(rows)

    build.fit(model, build.Course(steps=steps, learning_rate=1e-3), draw)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("spans"))
    parser.add_argument("--teacher-steps", type=int, default=300)
    args = parser.parse_args()
    if not (teacher := args.work / "model").exists():
        make_teacher(teacher, args.teacher_steps)
    spelt = (f"teacher.model={teacher}", "teacher.name=pairs", "score.alignment=spans")
    cache = make_cache(args.work / "cache.zarr", toy_recipe(0))
    pipeline.score.stage.run(toy_recipe(0, *spelt), str(cache), "pairs")
    for name, settings in {"teacher": (), "pairs": spelt}.items():
        recipe = toy_recipe(0, "train.loss=importance_sampling", f"train.teacher={name}", *settings)
        train.run(recipe, str(cache), args.work / name)
        found = evaluate(args.work / f"{name}.json", args.work / name / "adapter")
        print(json.dumps({"teacher": name} | found))


if __name__ == "__main__":
    main()
