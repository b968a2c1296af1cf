"""The traces of verifiers as rollouts: recorded ones by hand, branches and agents, and what is refused or left out.

`fixtures/verifiers_traces.jsonl` is what `vf-eval` 0.4 wrote of runs with vLLM, except for paths and addresses:
`helpers.turns.chat_model` with token ids and without, in an environment that says "kk" after the first turn, and a
chat model of 0.5B that had to call a tool in each of four turns.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache_schema as cs
from helpers.turns import END, TOKENS, chat_model
from pipeline.config import Recipe, load_recipe
from pipeline.errors import RedpenError
from pipeline.interchange import importing
from pipeline.models.resolve import resolve
from pipeline.toy import asset_path

RECORDED = [
    json.loads(line) for line in (Path(__file__).parent / "fixtures/verifiers_traces.jsonl").read_text().splitlines()
]
WITH_IDS, WITHOUT, WITH_TOOL = RECORDED


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "student")


def recipe(path: Path | str, *overrides: str) -> Recipe:
    lengths = ["rollouts.max_prompt_tokens=60", "rollouts.max_response_tokens=30", "rollouts.prompts_per_block=2"]
    return load_recipe("toy", [f"student.model={path}", "prompts.template=chat", *lengths, *overrides])


def written(path: Path, episodes: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    return str(path)


def imported(
    episodes: Sequence[Any], student: Path, path: Path, *overrides: str
) -> list[tuple[list[str], list[tuple[int, str]], list[float | None], int]]:
    """Of each rollout the prompt, pairs of `trained` and token, log-probs (None: missing) and how it ended."""
    cache = path / "c"
    settings = recipe(student, *overrides)
    assert importing.run(written(path / "traces.jsonl", episodes), settings, str(cache)) == 0
    round_ = cs.open(str(cache)).round()
    assert list(cs.verify(round_.cache)) == []
    tokens, found = resolve(settings.student).tokenizer, []
    for number in range(round_.n_blocks):
        block = round_.rollouts.read(number)
        for row in range(block.n_rows):
            span = block.response_slice(row)
            prompt = tokens.convert_ids_to_tokens(block.prompt_ids(int(block.row_prompt[row])).tolist())
            response = tokens.convert_ids_to_tokens(block.token_ids[span].tolist())
            logprobs = [None if np.isnan(p) else float(p) for p in block.rollout_logprobs[span]]
            pairs = list(zip(block.trained[span].tolist(), response, strict=True))
            found.append((prompt, pairs, logprobs, int(block.finish_reason[row])))
    return found


def refused(episodes: Sequence[Any], student: Path, path: Path, *overrides: str) -> str:
    with pytest.raises(RedpenError) as error:
        importing.run(written(path / "x.jsonl", episodes), recipe(student, *overrides), str(path / "c"))
    assert "\n" not in str(error.value) and not (path / "c").exists()
    return str(error.value).removeprefix(f"{path / 'x.jsonl'}:")


# ------------------------------------------------------------------------------------------------------ recorded


def test_recorded_ids_by_hand(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [(prompt, pairs, logprobs, reason)] = imported([WITH_IDS], student, tmp_path)
    assert prompt == letters("uh.a") and pairs == marked("IH!ukk.aI!") and reason == cs.FINISH_STOP
    np.testing.assert_allclose([p for p in logprobs if p is not None], [-0.3819, -5.3354, -0.2583, -0.1577, -1.0452])
    assert [p is not None for p in logprobs] == [is_trained == 1 for is_trained, _ in pairs]
    assert "warning" not in capsys.readouterr().err


def test_recorded_messages_by_hand(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [(prompt, pairs, logprobs, reason)] = imported([WITHOUT], student, tmp_path)
    assert prompt == letters("uh.a") and pairs == marked("IT!ukk.aIL!") and reason == cs.FINISH_STOP
    assert logprobs == [None] * 11
    assert "warning" not in capsys.readouterr().err, "as many tokens as the server counted"


CALLING = (
    "{% if tools %}<|im_start|>{{ tools[0].function.name }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ call.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_recorded_tool_by_hand(tmp_path: Path) -> None:
    """With another template than the recorded model's, so it is refused until the server's counts are removed."""
    student = tmp_path / "student"
    shutil.copytree(asset_path("student"), student)
    (student / "chat_template.jinja").write_text(CALLING)
    longer = ("rollouts.max_prompt_tokens=600", "rollouts.max_response_tokens=700")
    assert refused([WITH_TOOL], student, tmp_path, *longer).startswith(
        "1: traces[0]: branch at nodes[7]: messages[1]: expected 213 tokens before it, as the server counted, got "
    )
    uncounted = copy.deepcopy(WITH_TOOL)
    for call in uncounted["traces"][0]["calls"]:
        del call["usage"]
    [(prompt, pairs, _, _)] = imported([uncounted], student, tmp_path, *longer)
    tokenizer = resolve(recipe(student).student).tokenizer
    text = tokenizer.convert_tokens_to_string(prompt)
    [tool] = WITH_TOOL["traces"][0]["nodes"][0]["tools"]
    schema = {"type": "function", "function": {key: tool[key] for key in ("name", "description", "parameters")}}
    [record] = cs.open(str(tmp_path / "c")).round().prompts
    assert record["tools"] == [schema] and record["answer"] == "28" and text.startswith("<|im_start|>code<|im_end|>")
    asked = WITH_TOOL["traces"][0]["task"]["data"]["prompt"]
    assert text.endswith(f"<|im_end|><|im_start|>user\n{asked}<|im_end|><|im_start|>assistant\n")
    pieces = [
        (is_trained, tokenizer.convert_tokens_to_string([token for _, token in group]))
        for is_trained, group in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]
    calls, results = ("12", "28", "732", "708"), ("28", "732", "708")
    expected = [(1, f'{{"name": "code", "arguments": {{"room": {room}}}}}<|im_end|>') for room in calls]
    between = [(0, f"<|im_start|>tool\n{said}<|im_end|><|im_start|>assistant\n") for said in results]
    assert pieces == [piece for both in itertools.zip_longest(expected, between) for piece in both if piece]


# ------------------------------------------------------------------------------------------------------- by hand


def node(role: str, content: str | None, parent: int | None, **more: Any) -> dict[str, Any]:
    """A message; with `sampled` and its ids, those of the message without the header of its role are sampled."""
    return {"parent": parent, "message": {"role": role, "content": content}, **more}


def turn(content: str, parent: int, **more: Any) -> dict[str, Any]:
    return node("assistant", content, parent, sampled=True, **more)


def called(number: int, **more: Any) -> dict[str, Any]:
    return {"node": number, "model": "s", "sampling": {"temperature": 1.0}, "finish_reason": "stop", **more}


def episode(*nodes: dict[str, Any], trace: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """An episode of one trace; `trace` has other fields of it."""
    calls = [called(number) for number, each in enumerate(nodes) if each.get("sampled")]
    made = {
        "version": 1,
        "task": {"data": {}},
        "agent": {"trainable": True},
        "ok": True,
        "nodes": nodes,
        "calls": calls,
    }
    return {"task": {"data": {}}, "ok": True, "traces": [made | (trace or {})], **more}


def with_ids(*nodes: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes with the ids of `TEMPLATE`, whose headers are the first letter of the role."""
    return [
        each
        | {
            "token_ids": [TOKENS.index(token) for token in (each["message"]["role"][0], *each["message"]["content"])]
            + [END],
            "mask": [False] + [each.get("sampled", False)] * (len(each["message"]["content"]) + 1),
            "logprobs": [-0.5] * (len(each["message"]["content"]) + 1) if each.get("sampled") else [],
        }
        for each in nodes
    ]


def letters(text: str) -> list[str]:
    """Tokens of a text; "." stands for the end of a turn."""
    return ["<end>" if letter == "." else letter for letter in text]


def marked(text: str) -> list[tuple[int, str]]:
    """Tokens of a text, in capitals those that are trained; so is "!", the end of a turn of the model."""
    return [
        (int(letter.isupper() or letter == "!"), "<end>" if letter in ".!" else letter.lower()) for letter in text
    ]


@pytest.mark.parametrize("ids", [False, True])
def test_only_what_the_model_wrote_is_trained(ids: bool, student: Path, tmp_path: Path) -> None:
    """The first turn of the assistant is an example in the prompt."""
    nodes = [
        *(node("user", "e", None), node("assistant", "ff", 0), node("user", "g", 1)),
        *(turn("hi", 2), node("tool", "j", 3), turn("k", 4), node("user", "l", 5)),
    ]
    chat = episode(*(with_ids(*nodes) if ids else nodes))
    chat["traces"][0]["task"]["data"] = {"answer": "k", "prompt": "not read"}
    [(prompt, pairs, logprobs, reason)] = imported([chat], student, tmp_path)
    assert prompt == letters("ue.aff.ug.a") and pairs == marked("HI!tj.aK!") and reason == cs.FINISH_STOP
    known = [-0.5] * 3 + [None] * 4 + [-0.5] * 2
    assert logprobs == (known if ids else [None] * 9)
    round_ = cs.open(str(tmp_path / "c")).round()
    assert round_.prompts[0] == {"messages": [each["message"] for each in nodes[:3]], "answer": "k"}


@pytest.mark.parametrize("ids", [False, True])
def test_a_turn_on_two_branches_is_trained_once(ids: bool, student: Path, tmp_path: Path) -> None:
    nodes = [
        *(node("user", "e", None), turn("f", 0), node("user", "g", 1), turn("h", 2)),
        *(node("user", "i", 1), turn("j", 4)),  # on, from the first turn
        *(node("user", "k", None), turn("l", 6)),  # with another beginning
        *(node("user", "m", 7),),  # that the model did not answer
    ]
    found = imported([episode(*(with_ids(*nodes) if ids else nodes))], student, tmp_path)
    assert [(prompt, pairs) for prompt, pairs, _, _ in found] == [
        (letters("ue.a"), marked("F!ug.aH!")),
        (letters("ue.af.ui.a"), marked("J!")),
        (letters("uk.a"), marked("L!")),
    ]


FORGETFUL = (
    "{% set ns = namespace(last=0) %}"
    '{% for m in messages %}{% if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}'
    "{% for m in messages %}{{ m.role[0] }}"
    "{% if loop.index0 > ns.last and m.reasoning_content %}{{ m.reasoning_content }}b{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def test_turns_of_a_template_that_drops_reasoning_are_rollouts(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has read what the template writes before it; the answer is the last one's."""
    forgetful = tmp_path / "student"
    shutil.copytree(student, forgetful)
    (forgetful / "chat_template.jinja").write_text(FORGETFUL)

    def thought(content: str, thoughts: str, parent: int) -> dict[str, Any]:
        made = turn(content, parent)
        return made | {"message": made["message"] | {"reasoning_content": thoughts}}

    nodes = [node("user", "e", None), thought("f", "gh", 0), node("tool", "i", 1), thought("j", "k", 2)]
    nodes += [node("user", "l", 3), thought("", "m", 4), node("user", "n", 5), thought("o", "p", 6)]
    counts = zip((1, 3, 5, 7), ((4, 5), (13, 4), (16, 3), (21, 4)), strict=True)
    calls = [called(at, usage={"prompt_tokens": read, "completion_tokens": own}) for at, (read, own) in counts]
    chat = episode(*nodes, trace={"calls": calls, "task": {"data": {"answer": "o"}}})
    short = episode(node("user", "q", None), thought("r", "s", 0))
    found = imported([chat, short], forgetful, tmp_path)
    assert [(prompt, pairs) for prompt, pairs, _, _ in found] == [
        (letters("ue.a"), marked("GHBF!")),
        (letters("ue.aghbf.ti.a"), marked("KBJ!")),
        (letters("ue.af.ti.aj.ul.a.un.a"), marked("PBO!")),
        (letters("uq.a"), marked("SBR!")),
    ]
    records = cs.open(str(tmp_path / "c")).round().prompts
    assert [record.get("answer") for record in records] == [None, None, "o", None]
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "1 conversations are imported turn by turn" in said and "left out: empty turns, without token ids: 1" in said
    )
    assert "another number of tokens" not in said


@pytest.mark.parametrize(("reply", "answers"), [(None, [None, "k"]), (" f\n", ["k", None]), ("i", [None, None])])
def test_the_answer_is_that_of_the_branch_that_answers(
    reply: str | None, answers: list[str | None], student: Path, tmp_path: Path
) -> None:
    nodes = [node("user", "e", None), turn("f", 0), node("user", "g", None), turn("h", 2)]
    imported([episode(*nodes, trace={"task": {"data": {"answer": "k"}}, "root_reply": reply})], student, tmp_path)
    records = cs.open(str(tmp_path / "c")).round().prompts
    assert [record.get("answer") for record in records] == answers


LEFT_OUT = {
    "an error": ({"ok": False}, {}, "traces with an error"),
    "another agent": ({"agent": {"trainable": False}}, {}, "traces of agents that are not to be trained"),
    "rewritten": (
        {"response_rewrites": [{"handler": "h"}]},
        {},
        "traces with responses that were rewritten after the model wrote them",
    ),
    "cut": ({"calls": [called(1, finish_reason="length")]}, {}, "branches that max_tokens cut, without token ids"),
    "a stop string": (
        {"calls": [called(1, sampling={"temperature": 1, "stop": ["x"]})]},
        {},
        "branches with stop strings, without token ids",
    ),
    "empty": ({}, {"message": {"role": "assistant"}}, "branches that end with an empty turn, without token ids"),
    "not sampled": ({"calls": []}, {"sampled": False}, "branches without a turn of the model"),
    "a custom tool": (
        {},
        {"message": {"role": "assistant", "tool_calls": [{"type": "custom", "name": "f", "arguments": "x"}]}},
        "branches with other things than text and calls of functions",
    ),
    "a summary": (
        {},
        {"semantic_parents": [{"node": 0, "type": "compaction_attempt"}]},
        "branches with a summary that the harness did not use",
    ),
    "some ids": (
        {"calls": []},
        {"second": turn("h", 1, token_ids=[1], mask=[True])},
        "branches with token ids of some turns only",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_counted(
    name: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, changes, reason = LEFT_OUT[name]
    second = [changes["second"]] if "second" in changes else []
    bad = episode(node("user", "e", None), turn("f", 0) | changes, *second, trace=trace)
    good = episode(node("user", "g", None), turn("h", 0))
    assert [pairs for _, pairs, _, _ in imported([bad, good, bad], student, tmp_path)] == [marked("H!")]
    assert f"left out: {reason}: 2" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "alone").mkdir()
    assert refused([bad], student, tmp_path / "alone").endswith(
        f"expected at least one rollout, the file holds none (left out: {reason}: 1)"
    )


def test_a_summary_that_was_used_is_a_rollout(student: Path, tmp_path: Path) -> None:
    nodes = [node("user", "e", None), turn("f", 0, semantic_parents=[{"node": 0, "type": "compaction_attempt"}])]
    nodes += [node("user", "f", None), turn("g", 2, semantic_parents=[{"node": 1, "type": "compaction"}])]
    found = imported([episode(*nodes)], student, tmp_path)
    assert [(prompt, pairs) for prompt, pairs, _, _ in found] == [
        (letters("ue.a"), marked("F!")),
        (letters("uf.a"), marked("G!")),
    ]


def test_a_turn_that_was_cut_has_its_ids(student: Path, tmp_path: Path) -> None:
    nodes = with_ids(node("user", "e", None), turn("fgh", 0))
    for name in ("token_ids", "mask", "logprobs"):
        nodes[1][name] = nodes[1][name][:-1]
    cut = episode(*nodes, trace={"calls": [called(1, finish_reason="length")]})
    [(prompt, pairs, logprobs, reason)] = imported([cut], student, tmp_path)
    assert prompt == letters("ue.a") and pairs == marked("FGH") and reason == cs.FINISH_LENGTH
    assert logprobs == [-0.5] * 3


@pytest.mark.parametrize("setting", [{"temperature": 0.5}, {"temperature": 1, "top_k": 5}])
def test_log_probs_of_another_distribution_are_left_out(
    setting: dict[str, float], student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [called(1, sampling=setting)]
    chat = episode(*with_ids(node("user", "e", None), turn("f", 0)), trace={"calls": calls})
    [found] = imported([chat], student, tmp_path, f"rollouts.temperature={setting['temperature']}")
    assert found[1] == marked("F!") and found[2] == [None, None]
    said = " ".join(capsys.readouterr().err.split())
    assert "left out: log-probs of branches that were not sampled at temperature 1 from all tokens: 1" in said


def test_what_is_not_known_is_said(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage = {"prompt_tokens": 1, "cached_input_tokens": 3, "completion_tokens": 7}
    calls = [called(1, sampling=None, usage=usage)]
    imported([episode(node("user", "e", None), turn("f", 0), trace={"calls": calls})], student, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 1 rollouts record no temperature" in said
    assert "1 turns have another number of tokens than the server counted" in said


CALLS_OF_TWO = {"calls": [called(1), called(3, model="t")]}
COUNTED = {"calls": [called(1, usage={"prompt_tokens": 9, "completion_tokens": 2})]}
AT = "1: traces[0]: "

REFUSED = {
    "other temperature": (
        episode(node("user", "e", None), turn("f", 0), trace={"calls": [called(1, sampling={"temperature": 0.5})]}),
        f"{AT}branch at nodes[1]: temperature: expected 1, as rollouts.temperature, got 0.5; set rollouts.",
    ),
    "two models": (
        episode(node("user", "e", None), turn("f", 0), node("user", "g", 1), turn("h", 2), trace=CALLS_OF_TWO),
        f'{AT}calls[1].model: expected "s", as in the traces before, got "t"; remove the traces',
    ),
    "other prompt": (
        episode(node("user", "e", None), turn("f", 0), trace=COUNTED),
        f"{AT}branch at nodes[1]: messages[1]: expected 9 tokens before it, as the server counted, got 4 by the chat",
    ),
    "other version": (
        episode(node("user", "e", None), turn("f", 0), trace={"version": 2}),
        "1: traces.0.version: input should be 1, found 2",
    ),
    "too many": (
        episode(*[node("user", "e", None)] * 10_001),
        "1: traces.0.nodes: list should have at most 10000 items after validation, not 10001",
    ),
    "circle": (
        episode(node("user", "e", 1), turn("f", 0)),
        f"{AT}nodes[0].parent: expected the number of a node before it, got 1; remove the line, or run the",
    ),
    "short mask": (
        episode(node("user", "e", None), turn("f", 0, token_ids=[1, 2], mask=[True])),
        f"{AT}nodes[1].mask: expected 2 values, one for each token id, got 1",
    ),
    "short log-probs": (
        episode(node("user", "e", None), turn("f", 0, token_ids=[1, 2], mask=[True, True], logprobs=[-1.0])),
        f"{AT}nodes[1].logprobs: expected 2 values, one for each sampled token, got 1",
    ),
    "a user's ids": (
        episode(node("user", "e", None, token_ids=[1], mask=[True])),
        f"{AT}nodes[0].mask: expected no sampled token, as its message was not sampled, got 1",
    ),
    "a sampled user": (
        episode(node("user", "e", None, sampled=True)),
        f"{AT}nodes[0].message.role: expected assistant, as it was sampled, got user",
    ),
    "a call of nothing": (
        episode(node("user", "e", None), turn("f", 0), trace={"calls": [called(0)]}),
        f"{AT}calls[0].node: expected the number of a node that was sampled, got 0",
    ),
    "no prompt": (
        episode(node("assistant", "f", None, sampled=True)),
        f"{AT}branch at nodes[0]: messages[0]: expected a prompt before the assistant's first turn, got none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name: str, student: Path, tmp_path: Path) -> None:
    bad, message = REFUSED[name]
    assert refused([bad], student, tmp_path).startswith(message)


# ------------------------------------------------------------------------------------------------------- hostile

VALUES = (None, -1, 2**70, "x", [], {}, True, 0.5, "\ud800", [[]])
#: Fields of a trace that are not read, of which a change changes nothing.
NOT_READ = {"id", "verifiers", "tools", "rewards", "metrics", "info", "extra_usage", "timing", "is_completed", "type"}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            if key not in NOT_READ:
                yield from paths(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    made = copy.deepcopy(value)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return made


@pytest.mark.parametrize("name", ["with ids", "without"])
def test_a_changed_line_is_refused_in_one_line_or_trains_nothing_more(
    name: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episode, settings = WITH_IDS if name == "with ids" else WITHOUT, recipe(student)
    model, file = resolve(settings.student), tmp_path / "x.jsonl"
    reader = importing.RolloutReader(file, settings, model, model.stop_token_ids(settings.rollouts))
    written(file, [episode])
    n_trained = reader.survey().n_trained
    outcomes = Counter[str]()
    for number, path in enumerate(path for path in paths(episode) if "traces" in path and path != ("traces",)):
        for new in (VALUES[number % len(VALUES)], VALUES[(number + 3) % len(VALUES)]):
            written(file, [changed(episode, path, new)])
            try:
                assert reader.survey().n_trained <= n_trained, (path, new)
                outcomes["imported"] += 1
            except RedpenError as error:
                assert "\n" not in str(error) and str(file) in str(error), (path, new)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20 and len(outcomes) == 2, outcomes
