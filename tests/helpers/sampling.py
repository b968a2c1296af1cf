"""Requests to a sampler, and float64 log-probs to compare its answers with."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.engines.sampling import PromptBlock, Sampling

VOCAB, STOP = 24, (3, 5)


def sampling(**changes: object) -> Sampling:
    values: dict[str, object] = dict(
        temperature=1.0, top_p=1.0, stop_token_ids=STOP, rollouts_per_prompt=5, max_response_tokens=12, seed=7
    )
    return Sampling(**(values | changes))  # type: ignore[arg-type]


def prompt_block(lengths: tuple[int, ...] = (1, 9, 4, 4), block: int = 0) -> PromptBlock:
    rng = np.random.default_rng(block)
    prompts = [rng.integers(6, VOCAB, n).astype(np.int32) for n in lengths]
    return PromptBlock(block, [(block * len(lengths) + i, ids) for i, ids in enumerate(prompts)])


@torch.inference_mode()
def oracle_logits(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """float64 [T, V]: logits at every position of one response, alone, without a KV cache."""
    double = type(model)(model.config).eval().double()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
    return double(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].numpy()


def processed_logprobs(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """float64 log-probs after temperature and top-p, written out naively."""
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    for row in probs:
        order = np.argsort(-row)
        kept = np.cumsum(row[order]) - row[order] < top_p  # the smallest set that reaches top_p
        row[order[~kept]] = 0
        row /= row.sum()
    with np.errstate(divide="ignore"):
        return np.log(probs)
