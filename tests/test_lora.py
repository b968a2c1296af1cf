"""What of a student is trained: LoRA on its decoder alone, and nothing drops out but LoRA's own dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BioGptConfig, Gemma3Config, OPTConfig, PhimoeConfig, XGLMConfig

from helpers.tiny_configs import tiny_config
from pipeline.config import TrainConfig
from pipeline.errors import ModelError
from pipeline.forward.attention import register_packed_attention
from pipeline.forward.head import unwrapped
from pipeline.forward.packing import pack, packed_hidden
from pipeline.merge import merge
from pipeline.models.lora import add_lora, make_trainable, trainable, training_mode

SHAPE: dict[str, Any] = dict(
    vocab_size=71, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, bos_token_id=1, eos_token_id=2
)
DROPOUT = {
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5),
    "biogpt": BioGptConfig(**SHAPE, intermediate_size=48),
    "xglm": XGLMConfig(vocab_size=71, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, dropout=0.5),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", DROPOUT)
def test_training_mode_switches_on_no_dropout_of_the_base(family: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = add_lora(AutoModelForCausalLM.from_config(DROPOUT[family]).eval(), TrainConfig())
    ids = torch.arange(3, 20)[None]
    expected = model(input_ids=ids).logits
    if checkpointing:
        unwrapped(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    training_mode(model)
    training_mode(model)
    logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, expected)
    logits.square().mean().backward()  # layers run once more
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable(model).values())
    layers = [m for m in model.modules() if hasattr(m, "_was_training")]
    assert len(layers) == 2 and all(layer.training for layer in layers)


def test_a_first_step_is_by_the_student_that_sampled() -> None:
    """Ratio and effective sample size are 1 in a family with dropout in its layers."""
    from pipeline.train.metrics import drift_metrics, drift_sums

    register_packed_attention()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(DROPOUT["opt"], attn_implementation="redpen_packed").eval()
    model = add_lora(base, TrainConfig(gradient_checkpointing=True))
    packed = pack([np.arange(3, 20), np.arange(5, 60)], [4, 5])

    def logprobs() -> torch.Tensor:
        logits = unwrapped(model).lm_head(packed_hidden(model, packed))
        return logits.log_softmax(1).gather(1, packed.target_ids[:, None])[:, 0]

    sampled = logprobs().detach()
    unwrapped(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    training_mode(model)
    drift = drift_metrics(drift_sums(logprobs().detach(), sampled, torch.ones(len(sampled))))
    assert drift["ess"] == pytest.approx(1, abs=1e-6) and drift["ratio_mean"] == pytest.approx(1, abs=1e-6)


def test_all_linear_layers_are_those_of_the_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    shape = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    wrapper = Gemma3Config(text_config=shape | {"head_dim": 8}, vision_config=vision, mm_tokens_per_image=4)
    for targets in ("all-linear", ["q_proj"]):
        found = trainable(add_lora(AutoModelForCausalLM.from_config(wrapper), TrainConfig(lora_targets=targets)))
        assert found and all("language_model.layers" in name for name in found)
    assert "experts" not in capsys.readouterr().err
    mixture = add_lora(AutoModelForCausalLM.from_config(PhimoeConfig(**shape)), TrainConfig())
    assert not any("router" in name or "experts" in name for name in trainable(mixture))
    assert "experts" in capsys.readouterr().err
    mixture(input_ids=torch.arange(5)[None])


@pytest.mark.filterwarnings("ignore:The following .*_pattern")  # of peft, for experts that get no LoRA
def test_no_adapter_on_a_layer_whose_weight_the_model_uses_past_it() -> None:
    """LongCat's router takes its classifier's weight, so that an adapter there would change nothing until merged."""
    model = AutoModelForCausalLM.from_config(tiny_config("longcat_flash", head_dim=4))
    names = trainable(add_lora(model, TrainConfig()))
    assert not any("classifier" in name for name in names) and any("q_a_proj" in name for name in names)


def test_what_cannot_be_loaded_again_is_not_trained_whole() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("mllama"))
    with pytest.raises(ModelError, match="neither merged"):
        make_trainable(model, TrainConfig(method="full"))
    with pytest.raises(ModelError, match="neither merged"):
        merge(make_trainable(model, TrainConfig()), torch.float32)
