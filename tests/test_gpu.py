"""What differs on CUDA: the varlen attention kernel, half-precision products with fp32 output, the stages there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.caches import make_cache, small_recipe
from helpers.models import FAMILIES, LENGTHS, STARTS, STARTS_OF_FEW, of_few_prompts, random_model
from pipeline.forward.attention import register_packed_attention
from pipeline.forward.head import Head, score_rows
from pipeline.forward.loss_head import chunked_head_loss
from pipeline.forward.packing_check import check_layout
from pipeline.train import stage as train_stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rollouts_have_their_own_logprobs(family: str, dtype: torch.dtype) -> None:
    register_packed_attention()
    config = FAMILIES[family]
    model = random_model(config).to("cuda", dtype)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, config.vocab_size, n) for n in LENGTHS]
    tolerance = 1e-3 if dtype == torch.float32 else 1.0
    check_layout(model, sequences, STARTS, tolerance)
    check_layout(model, of_few_prompts(), STARTS_OF_FEW, tolerance, share_prompts_from=1)


def test_bf16_head_on_cuda_is_as_good_as_its_weights() -> None:
    """Log-probs and gradient against float64 from the same bf16 operands."""
    torch.manual_seed(0)
    n, d, v = 300, 256, 32_000
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(v, d, device="cuda") / d**0.5).bfloat16()
    tokens = torch.randint(v, (n, 1), device="cuda")
    logp = (hidden.detach().double() @ weight.double().T).log_softmax(1)

    scores = score_rows(hidden.detach(), Head(weight), tokens[:, 0], candidates=8)
    assert (scores.logprobs.double() - logp.gather(1, tokens)[:, 0]).abs().max() < 1e-4

    result = chunked_head_loss(hidden, Head(weight), tokens, lambda rows, logprobs, rest: -logprobs.sum() / n, 128)
    result.loss.backward()
    one_hot = torch.zeros_like(logp).scatter_(1, tokens, 1.0)
    expected = ((logp.exp() - one_hot) @ weight.double()) / n
    assert hidden.grad is not None
    assert (hidden.grad.double() - expected).norm() / expected.norm() < 1e-2


def test_stages_on_cuda(tmp_path: Path) -> None:
    settings = ["student.dtype=bfloat16", "teacher.dtype=bfloat16", "train.steps=20", "train.lora_rank=32"]
    recipe = small_recipe(*settings, "train.learning_rate=1e-3")
    cache = make_cache(tmp_path / "cache", recipe)
    assert train_stage.run(recipe, str(cache), tmp_path / "run") == 0
    curve = [json.loads(line)["reverse_kl"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert np.mean(curve[-5:]) < 0.7 * np.mean(curve[:5])
