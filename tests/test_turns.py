"""What the chat template writes between the student's turns. The oracle is the template over the whole chat."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.config import PromptsConfig
from pipeline.errors import ConfigError
from pipeline.text.rendering import render
from pipeline.text.turns import TurnError, TurnTemplate
from pipeline.toy import asset_path

CFG = PromptsConfig(path="p.jsonl")
RECORD = {"prompt": "2+2?", "answer": "4"}
END, IM_END = 256, 258  # <|endoftext|>, <|im_end|>

_CHATML = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
_GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
#: Templates in the manner of families, which can all continue a chat.
TEMPLATES = {
    "toy": None,
    # writes the reasoning of the last turn alone, so that the last turn is written differently from earlier ones
    "qwen3": "{% for m in messages %}<|im_start|>"
    "{{ 'user\n<tool_response>' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}" + _GENERATION,
    "llama 3, JSON of tools": "{% for m in messages %}<|im_start|>{{ 'ipython' if m.role == 'tool' else m.role }}\n\n"
    "{{ m.content | tojson if m.role == 'tool' else m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    "llama 2, spaces": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} <|im_end|>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "gemma, strict": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
}
#: Begins every turn with reasoning, and leaves it out of turns before the last user message.
THINKS = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def tokenizer_with(template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def whole(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in ids]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_student_reads_what_the_template_writes_for_the_whole_chat(template: str | None) -> None:
    tokenizer = tokenizer_with(template)
    turns = TurnTemplate(tokenizer, CFG, (END, IM_END), RECORD)
    assert turns.turn_ends == {IM_END}  # none of them writes <|endoftext|> after a turn
    cfg = CFG.model_copy(update={"system": "add"})
    spaces = template == TEMPLATES["llama 2, spaces"]  # which are the student's to write
    strict = template == TEMPLATES["gemma, strict"]
    for settings in (CFG, cfg) if not strict else (CFG,):
        conversation = TurnTemplate(tokenizer, settings, (END, IM_END), RECORD).begin(RECORD)
        ids = render(RECORD, tokenizer, settings)
        messages = list(conversation.messages)
        for said, role in (("it is 5", "user" if strict or spaces else "tool"), ("so: 4", "user")):
            sampled = [*f" {said} ".encode(), IM_END] if spaces else [*said.encode(), IM_END]
            new = [{"role": role, "content": 'wrong, "try"\nagain<|im_end|>'}]
            conversation.student(sampled)
            reply = conversation.reply(new)
            ids = [*ids, *sampled, *reply.tolist()]
            messages += [{"role": "assistant", "content": said}, *new]
            assert reply.dtype == np.int32 and ids == whole(tokenizer, messages)
            expected = [m | {"content": m["content"].strip()} for m in conversation.messages]
            assert expected == messages


def test_reasoning_stays_as_it_was_sampled() -> None:
    tokenizer = tokenizer_with(THINKS)
    conversation = TurnTemplate(tokenizer, CFG, (IM_END,), RECORD).begin(RECORD)
    ids = render(RECORD, tokenizer, CFG)
    assert tokenizer.decode(ids).endswith("assistant\n<think>\n")
    sampled = [*b"hm\n</think>\n\nit is 5", IM_END]
    conversation.student(sampled)
    ids = [*ids, *sampled, *conversation.reply([{"role": "tool", "content": "no"}]).tolist()]
    turn = {"role": "assistant", "content": "it is 5", "reasoning_content": "hm"}
    assert ids == whole(tokenizer, [{"role": "user", "content": "2+2?"}, turn, {"role": "tool", "content": "no"}])
    conversation.student([*b"\n</think>\n\n4", IM_END])
    with pytest.raises(TurnError, match=r"what came before in another way: expected \"<think>\\n"):
        conversation.reply([{"role": "user", "content": "thanks"}])  # the template now leaves out the reasoning


def test_tools_and_several_messages_reach_the_template() -> None:
    tokenizer = tokenizer_with("{% if tools %}{{ tools | tojson }}{% endif %}" + _CHATML + _GENERATION)
    record = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "add"}]}
    conversation = TurnTemplate(tokenizer, CFG, (IM_END,), record).begin(record)
    conversation.student([*b"x", IM_END])
    new = [{"role": "tool", "content": "1", "tool_call_id": "7"}, {"role": "tool", "content": "1"}]
    text = tokenizer.decode(conversation.reply(new))
    assert text.count("<|im_start|>tool\n1<|im_end|>") == 2 and text.endswith("<|im_start|>assistant\n")
    assert conversation.messages == [*record["messages"], {"role": "assistant", "content": "x"}, *new]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "needs a chat template"),
        (_CHATML.replace("<|im_end|>", "</s>") + _GENERATION, 'expected the stop token "<|endoftext|>"'),
        (_CHATML + "<|im_start|>assistant\n<think>\n\n</think>\n\n", "what came before in another way"),
        ("{% for m in messages[-1:] %}" + _CHATML[len("{%- for m in messages %}") :] + _GENERATION, "another way"),
        (_CHATML.replace("{{ m.content }}", "{{ '> ' if m.role == 'assistant' }}{{ m.content }}") + _GENERATION,
         'begins it with "> "'),
        ("{{ messages[0].content }}\n", "which the student was not given"),
        ("{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + _CHATML + _GENERATION,
         "refuses it: TemplateError: one turn"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_continue_a_chat_is_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^rollouts\.environment") as error:
        TurnTemplate(tokenizer_with(template), CFG, (END, IM_END), RECORD)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_stop_token_without_text_is_refused() -> None:
    """Such as one of the rows that pad the vocabulary of a model."""
    tokenizer = tokenizer_with(_CHATML + _GENERATION)
    assert tokenizer.decode([5000]) == ""
    assert TurnTemplate(tokenizer, CFG, (IM_END, 5000), RECORD).turn_ends == {IM_END}
    with pytest.raises(ConfigError, match="the stop token 5000 has no text"):
        TurnTemplate(tokenizer, CFG, (5000,), RECORD)


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    template = _CHATML.replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'tool' %}")
    conversation = TurnTemplate(tokenizer_with(template + _GENERATION), CFG, (IM_END,), RECORD).begin(RECORD)
    conversation.student([*b"x", IM_END])
    for content in ("4", "", " \n", "a"):  # the last is in what the template writes in any case
        with pytest.raises(TurnError, match='leaves out messages of the role "tool"'):
            conversation.reply([{"role": "tool", "content": content}])
    assert conversation.reply([{"role": "user", "content": "4"}]).size  # a refused reply leaves no trace


def test_a_stop_token_that_merges_with_what_follows_is_refused() -> None:
    """An ordinary token as the end of a turn: the tokenizer would join it with the line feed after it."""
    vocabulary = {character: n for n, character in enumerate([*map(chr, range(33, 127)), "Ġ", "Ċ", ";Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(";", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ends = "{% for m in messages %}{{ m.role }}:{{ m.content }};SPACE{% endfor %}assistant:"
    made.chat_template = ends.replace("SPACE", " ")
    assert TurnTemplate(made, CFG, (vocabulary[";"],), RECORD).turn_ends == {vocabulary[";"]}
    made.chat_template = ends.replace("SPACE", "\n")
    with pytest.raises(ConfigError, match=r"follows the stop token \";\" changes the token ids before it"):
        TurnTemplate(made, CFG, (vocabulary[";"],), RECORD)
