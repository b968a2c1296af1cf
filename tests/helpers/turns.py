"""A tiny student with a chat template and short turns, its prompts, and an environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # vLLM has no kernels for smaller ones
        max_position_embeddings=96,
        initializer_range=0.3,
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


def replayed(record: dict[str, Any], response: Sequence[int], max_turns: int, longest: int) -> tuple[list[int], str]:
    """What `trained` must be for a response, and how it ended: "stop", "length" or "reply" (which did not fit).

    Asserts that the tokens that are not the student's are the environment's reply to the turns before.
    """
    code: dict[str, Any] = {}
    exec(ENVIRONMENT, code)
    environment, messages = code["Counting"](record), [{"role": "user", "content": record["prompt"]}]
    ids, trained = list(response), list[int]()
    for turn in range(1, max_turns + 1):
        start = len(trained)
        end = next((n for n in range(start, len(ids)) if ids[n] in (END, STOP)), None)
        if end is None:
            assert len(ids) == longest
            return [*trained, *[1] * (len(ids) - start)], "length"
        trained += [1] * (end + 1 - start)
        messages.append({"role": "assistant", "content": tokenizer().decode(ids[start:end])})
        reply = environment.env_response(messages) if turn < max_turns and ids[end] == END else None
        if reply is None:
            break
        messages += reply
        added = [*tokenizer()(f"t{reply[0]['content']}")["input_ids"], END, 0]
        if len(trained) + len(added) >= longest:
            assert len(trained) == len(ids)
            return trained, "reply"
        assert ids[end + 1 : end + 1 + len(added)] == added
        trained += [0] * len(added)
    assert len(trained) == len(ids)
    return trained, "stop"
