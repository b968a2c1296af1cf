"""A tiny student with a chat template and short turns, its prompts, and an environment."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pipeline.config import Recipe, load_recipe

#: 24 tokens: letters, and two that may end a response; only the first ends a turn of the template.
TOKENS = [*"abc", "<end>", "d", "<stop>", *"efghijklmnopqrstuv"]
END, STOP = 3, 5
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
#: Its reply depends on all that it is given; it has nothing to say after a turn with a "b".
ENVIRONMENT = """
class Counting:
    def __init__(self, row):
        self.row, self.calls = row, 0

    def env_response(self, messages):
        self.calls += 1
        said = messages[-1]["content"]
        assert messages[-1]["role"] == "assistant" and messages[0]["content"] == self.row["prompt"]
        assert self.calls == sum(message["role"] == "assistant" for message in messages)
        if "b" in said:
            return None
        letter = "defghijk"[(len(said) + len(self.row["answer"]) + self.calls) % 8]
        return [{"role": "tool", "content": letter * (1 + len(said) % 3)}]
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter."""
    made = Tokenizer(models.WordLevel({token: n for n, token in enumerate(TOKENS)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<end>", "<stop>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<stop>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def chat_model(path: Path, seed: int = 1) -> Path:
    """A random model whose turns end after a few tokens, saved with its tokenizer."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=96,
        initializer_range=0.4,
        tie_word_embeddings=False,
        eos_token_id=[END, STOP],
        pad_token_id=STOP,
    )
    model = Qwen3ForCausalLM(config)
    model.lm_head.weight.data[END] *= 3  # often far likelier than the others
    model.generation_config.eos_token_id = [END, STOP]
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def chat_recipe(path: Path, *overrides: str) -> Recipe:
    """A recipe with student, teacher, prompts and environment in `path`, which must be the current directory."""
    if not (path / "student").exists():
        chat_model(path / "student")
        chat_model(path / "teacher", seed=2)
        rows = [{"prompt": letters, "answer": letters[:2]} for letters in ("efg", "h", "klmnop", "qr", "stu", "v")]
        (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path / "counting.py").write_text(ENVIRONMENT)
    return load_recipe(
        "toy",
        [
            *(f"{role}.model={path / role}" for role in ("student", "teacher")),
            *(f"{role}.dtype=float32" for role in ("student", "teacher")),
            f"prompts.path={path / 'prompts.jsonl'}",
            "prompts.limit=",
            "prompts.template=chat",
            "rollouts.environment=counting:Counting",
            "rollouts.environment_workers=2",
            "rollouts.max_turns=3",
            "rollouts.max_response_tokens=40",
            "rollouts.prompts_per_block=2",
            "eval.path=",
            "eval.format=",
            "eval.answer_pattern=",
            "train.steps=2",
            "train.prompts_per_step=3",
            "train.lora_rank=4",
            "train.stop_reverse_kl=0",
            *overrides,
        ],
    )
