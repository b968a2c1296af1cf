"""Chat templates with tools, built like those of three families, and tokenizers that have their special tokens.

Each does to earlier turns what the family's own does: Qwen3 drops reasoning before the last user message and writes
an empty one into the last turn, Llama 3.1 takes one call a turn and no text beside it, gpt-oss drops the reasoning of
calls before a final answer, and ends that in one way at the end of a chat and in another within it.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoTokenizer

from pipeline.toy import asset_path

QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
            {{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{%- for m in messages %}
    {%- set role = 'ipython' if m.role == 'tool' else m.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls at once') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
    {%- else %}
        {{- m.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GPT_OSS = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- set later = messages[loop.index:] | rejectattr('tool_calls', 'defined') %}
        {%- if m.thinking and not later | selectattr('role', 'equalto', 'assistant') | list %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
        {{- (call.arguments | tojson) + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if m.thinking and loop.last and not add_generation_prompt %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""

#: Template, tokens that end a turn, and the other special tokens that it writes.
FAMILIES = {
    "qwen3": (QWEN3, ("<|im_end|>",), ("<|im_start|>",)),
    "llama3": (LLAMA3, ("<|eot_id|>",), ("<|start_header_id|>", "<|end_header_id|>")),
    "gpt-oss": (
        GPT_OSS,
        ("<|return|>", "<|call|>"),
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    ),
}


def family_tokenizer(family: str) -> tuple[Any, tuple[int, ...]]:
    """A tokenizer of bytes and the family's special tokens, with its template, and the ids that end a turn."""
    template, ends, others = FAMILIES[family]
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(asset_path("student")))
    tokenizer.add_tokens([*ends, *others], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(ends)))


def call(name: str, arguments: Any) -> dict[str, Any]:
    """An assistant turn of one tool call."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def two_calls(*thoughts: str, field: str = "reasoning_content") -> list[dict[str, Any]]:
    """A question, two tool calls with their results, and the answer; each assistant turn after a thought, if given.

    The arguments of one call are an object, those of the other the text of one, as OpenAI's API has them.
    """
    turns = [call("add", {"x": 1}), call("add", '{"x": 2}'), {"role": "assistant", "content": "3"}]
    for turn, thought in zip(turns, thoughts, strict=False):
        turn[field] = thought
    results = [{"role": "tool", "content": "one", "tool_call_id": "c"}, {"role": "tool", "content": "two"}]
    return [{"role": "user", "content": "1+2?"}, turns[0], results[0], turns[1], results[1], turns[2]]
