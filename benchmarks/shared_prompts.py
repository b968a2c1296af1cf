"""What reading a prompt once for all its rollouts saves: gradients with and without, in turn.

    python benchmarks/shared_prompts.py [--device cuda]

A Qwen3-shaped student with random weights and a LoRA of rank 32; 4 rollouts a prompt, one micro-batch of 16 rollouts;
forward and backward, medians of `--repeats`. The gradients of both ways are compared, too.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.config import TrainConfig
from pipeline.forward.attention import ATTENTION, register_packed_attention
from pipeline.forward.head import Head
from pipeline.forward.loss_head import chunked_head_loss
from pipeline.forward.packing import pack, packed_hidden
from pipeline.models import lora

PROMPTS, SAMPLES, VOCAB = 4, 4, 8192


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    register_packed_attention()
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "head_dim": 64}
    config = Qwen3Config(vocab_size=VOCAB, num_attention_heads=8, num_key_value_heads=4, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).to(args.device)
    if args.device == "cuda":
        model = model.bfloat16()
    model = lora.add_lora(model, TrainConfig(lora_rank=32))
    with torch.no_grad():
        for parameter in lora.trainable(model).values():
            parameter.normal_(std=0.02)
    head = Head.of(model)

    def step(sequences: list[np.ndarray], start: int, share: bool) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        began = time.perf_counter()
        packed = pack(sequences, [start] * len(sequences), args.device, share_prompts_from=1 if share else None)
        loss = chunked_head_loss(
            packed_hidden(model, packed), head, packed.target_ids[:, None], lambda _, logprobs, rest: -logprobs.mean()
        ).loss
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in lora.trainable(model).values()])
        gradient.sum().item()
        return time.perf_counter() - began, gradient

    print("| prompt + response tokens | tokens read, x apart | seconds, x apart | gradient differs by |")
    print("|---|---|---|---|")
    for prompt, response in ((8, 16), (32, 256), (128, 256), (256, 256), (512, 128)):
        rng = np.random.default_rng(0)
        prompts = [rng.integers(VOCAB, size=prompt) for _ in range(PROMPTS)]
        sequences = [np.r_[p, rng.integers(VOCAB, size=response)] for p in prompts for _ in range(SAMPLES)]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        gradients = {}
        for repeat in range(args.repeats + 1):
            for share, times in seconds.items():
                taken, gradients[share] = step(sequences, prompt, share)
                times += [taken] if repeat else []
        tokens = (prompt + SAMPLES * response) / (SAMPLES * (prompt + response))
        ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
        differs = float((gradients[True] - gradients[False]).norm() / gradients[False].norm())
        print(f"| {prompt} + {response} | {tokens:.2f} | {ratio:.2f} | {differs:.1e} |", flush=True)


if __name__ == "__main__":
    main()
