"""Rollouts in the `traces.jsonl` that `vf-eval` of the library verifiers (0.4) writes, an episode on each line.

An episode holds traces, one for each agent that ran in it. A trace is a graph of messages: each has a parent, and a
path from a root to a leaf, a branch, is a chat. A harness that changes what came before, to shorten it or to leave
out the reasoning of earlier turns, starts a new branch. Each branch is a rollout: the messages before the first turn
that the model wrote are its prompt. A turn on several branches is trained on the first, and only read on the others.
The task's answer is that of the branch on which the trace ends.

Traces of `--client.type train` have the token ids, a mask and log-probs, which are taken as they are. Others have
messages only, and their branches are finished conversations (`pipeline.interchange.conversations`) of which only the
turns that the model wrote are trained; how many tokens the server counted is kept to compare them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config.messages import show_value
from pipeline.errors import RedpenError
from pipeline.files import parse_model
from pipeline.text.records import FIELDS, TEACHER_FIELDS

#: Fields that are of the branch, or would have to be: the task's data are of all its branches.
_OF_BRANCH = {"prompt", "messages", "conversations", "tools", *TEACHER_FIELDS}
#: Settings with which log-probs, which a server has at temperature 1 and of all tokens, are of the distribution that
#: was sampled from. With any other setting they may be of another.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"temperature": (1,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,)}
_NEUTRAL |= {"presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,)}
_NEUTRAL |= {"tool_choice": ("auto", "none"), "n": (1,)}
_UNRELATED = {"max_tokens", "seed", "stop", "logprobs", "top_logprobs", "parallel_tool_calls", "service_tier"}

_OTHER_THINGS = "branches with other things than text and calls of functions"
#: Messages of a trace: every branch is walked from its end.
_MOST_NODES = 10_000


class _TraceModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Call(_TraceModel):
    id: str = ""
    type: str = "function"
    name: str
    namespace: str | None = None
    arguments: str


class _Message(_TraceModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class _Link(_TraceModel):
    node: int
    type: str


class _Node(_TraceModel):
    message: _Message
    parent: int | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)  # of a root
    semantic_parents: list[_Link] = Field(default_factory=list)
    sampled: bool = False
    token_ids: list[int] = Field(default_factory=list)  # that the message adds to its parents'
    mask: list[bool] = Field(default_factory=list)  # of each id: whether the model sampled it
    logprobs: list[float] = Field(default_factory=list)  # of the sampled ids


class _Usage(_TraceModel):
    prompt_tokens: int  # without those that came from the server's cache
    completion_tokens: int
    cached_input_tokens: int | None = None


class _ModelCall(_TraceModel):
    node: int | None = None  # that it made
    model: str | None = None
    sampling: dict[str, Any] | None = None
    finish_reason: str | None = None
    usage: _Usage | None = None


class _Agent(_TraceModel):
    trainable: bool = True


class _Reference(_TraceModel):
    data: dict[str, Any] = Field(default_factory=dict)


class _Trace(_TraceModel):
    version: Literal[1]
    task: _Reference
    agent: _Agent
    nodes: list[_Node] = Field(max_length=_MOST_NODES)
    calls: list[_ModelCall] = Field(default_factory=list)
    response_rewrites: list[Any] = Field(default_factory=list)
    root_reply: str | None = None  # of the agent that answers, if there are several in the trace
    ok: bool


class _Episode(_TraceModel):
    traces: list[_Trace]
    ok: bool


@dataclass(frozen=True)
class SampledTurns:
    """What a trace records of how a row was sampled.

    Attributes:
        counts: of each message that the model wrote, the tokens before it and its own, as the server counted them, or
            None if it did not. Empty if the row has token ids.
        settings: pairs of the name and the value of a sampling setting, of all calls.
    """

    counts: dict[int, tuple[int, int] | None]
    settings: frozenset[tuple[str, float]]


@dataclass
class TraceReader:
    """Reads the episodes of one file.

    Attributes:
        columns: fields of a task's data that rows have besides those of a prompts file.
        left_out: what became no row, or no part of one, and how often.
    """

    columns: Sequence[str]
    left_out: Counter[str]
    _model: str | None = None

    def rows(self, place: str, value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], SampledTurns]]:
        """Of each branch of an episode: its place for messages, the fields of a rollout, and how it was sampled.

        Raises `RedpenError` naming `place`.
        """
        episode = parse_model(value, _Episode, place)
        for number, trace in enumerate(episode.traces):
            where = f"{place}: traces[{number}]"
            if not (episode.ok and trace.ok):
                self.left_out["traces with an error"] += 1
            elif not trace.agent.trainable:
                self.left_out["traces of agents that are not to be trained"] += 1
            elif trace.response_rewrites:
                self.left_out["traces with responses that were rewritten after the model wrote them"] += 1
            else:
                self._check(trace, where)
                yield from self._branches(trace, where)

    def _check(self, trace: _Trace, place: str) -> None:
        """The graph is one, its lists have the same lengths, and its model is that of the traces before."""
        for number, node in enumerate(trace.nodes):
            label, n_ids, n_sampled = f"{place}: nodes[{number}]", len(node.token_ids), sum(node.mask)
            if node.parent is not None and not 0 <= node.parent < number:
                raise _fault(f"{label}.parent", "the number of a node before it", node.parent)
            if len(node.mask) != n_ids:
                raise _fault(f"{label}.mask", f"{n_ids} values, one for each token id", len(node.mask))
            if n_sampled and not node.sampled:
                raise _fault(f"{label}.mask", "no sampled token, as its message was not sampled", n_sampled)
            if node.sampled and node.message.role != "assistant":
                raise _fault(f"{label}.message.role", "assistant, as it was sampled", node.message.role)
            if len(node.logprobs) not in (0, n_sampled):
                expected = f"{n_sampled} values, one for each sampled token"
                raise _fault(f"{label}.logprobs", expected, len(node.logprobs))
        for number, call in enumerate(trace.calls):
            label = f"{place}: calls[{number}]"
            if call.node is None:
                continue
            if not (0 <= call.node < len(trace.nodes) and trace.nodes[call.node].sampled):
                raise _fault(f"{label}.node", "the number of a node that was sampled", call.node)
            self._model = self._model or call.model
            if call.model not in (None, self._model):
                raise RedpenError(
                    f"{label}.model: expected {show_value(self._model)}, as in the traces before, got "
                    f"{show_value(call.model)}; remove the traces that the student did not write"
                )

    def _branches(self, trace: _Trace, place: str) -> Iterator[tuple[str, dict[str, Any], SampledTurns]]:
        calls = {call.node: call for call in trace.calls if call.node is not None}
        parents = {node.parent for node in trace.nodes}
        links = [link for node in trace.nodes for link in node.semantic_parents]
        compacted = {link.node for link in links if link.type == "compaction"}
        leaves = [number for number in range(len(trace.nodes)) if number not in parents]
        chat = [_chat_message(node.message) for node in trace.nodes]
        answering, trained = _answering(trace, leaves), set[int]()
        for leaf in leaves:
            kinds = {link.type for link in trace.nodes[leaf].semantic_parents}
            if "compaction_attempt" in kinds and leaf not in compacted:
                self.left_out["branches with a summary that the harness did not use"] += 1
                continue
            path = [leaf]
            while (parent := trace.nodes[path[-1]].parent) is not None:
                path.append(parent)
            path.reverse()
            new = [number for number, node in enumerate(path) if trace.nodes[node].sampled and node not in trained]
            if not new:
                if not trained:
                    self.left_out["branches without a turn of the model"] += 1
                continue
            path = path[: new[-1] + 1]
            messages = [message for node in path if (message := chat[node]) is not None]
            if len(messages) < len(path):
                self.left_out[_OTHER_THINGS] += 1
                continue
            row = self._row(trace, path, messages, new, calls)
            if isinstance(row, str):
                self.left_out[row] += 1
                continue
            trained.update(path)
            if leaf != answering:
                row[0].pop("answer", None)
            yield f"{place}: branch at nodes[{leaf}]", *row

    def _row(
        self,
        trace: _Trace,
        path: list[int],
        messages: list[dict[str, Any]],
        new: list[int],
        calls: Mapping[int, _ModelCall],
    ) -> tuple[dict[str, Any], SampledTurns] | str:
        """The rollout of a branch, in which `new` are the places of turns to train, or why it is none."""
        nodes = [trace.nodes[node] for node in path]
        tools = [_tool(tool) for tool in nodes[0].tools]
        if None in tools:
            return _OTHER_THINGS
        data = trace.task.data
        row = {name: data[name] for name in {*FIELDS, *self.columns} - _OF_BRANCH if name in data}
        if not _is_answer(row.get("answer")):
            row.pop("answer", None)
        row |= {"tools": tools} if tools else {}
        of_new = {number: calls.get(path[number], _ModelCall()) for number in new}
        settings = [(name, value) for call in of_new.values() for name, value in (call.sampling or {}).items()]
        with_ids = [number for number, node in enumerate(nodes) if node.sampled and any(node.mask)]
        if not with_ids:
            counts = {number: _counts(call) for number, call in of_new.items()}
            last = nodes[-1].message
            if any(call.finish_reason == "length" for call in of_new.values()):
                return "branches that max_tokens cut, without token ids"
            if any(name == "stop" and value for name, value in settings):
                return "branches with stop strings, without token ids"
            if not (last.tool_calls or (isinstance(last.content, str) and last.content.strip())):
                return "branches that end with an empty turn, without token ids"
            return row | {"messages": messages}, _sampled(counts, settings)
        if len(with_ids) < sum(node.sampled for node in nodes):
            return "branches with token ids of some turns only"
        ids, mask, logprobs = [], [], []
        for number, node in enumerate(nodes):
            ids += node.token_ids
            mask += node.mask if number in of_new else [False] * len(node.mask)
            known = iter(node.logprobs)
            logprobs += [next(known, None) if flag else None for flag in node.mask]
        start = mask.index(True)
        row |= {"messages": messages[: new[0]], "prompt_tokens": ids[:start], "response_tokens": ids[start:]}
        row |= {"loss_mask": [int(flag) for flag in mask[start:]]}
        if all(name in _UNRELATED or value is None or value in _NEUTRAL.get(name, ()) for name, value in settings):
            row["rollout_logprobs"] = logprobs[start:]
        else:
            self.left_out["log-probs of branches that were not sampled at temperature 1 from all tokens"] += 1
        reason = of_new[new[-1]].finish_reason
        if reason is not None:
            row["finish_reason"] = "stop" if reason == "tool_calls" else reason
        return row, _sampled({}, settings)


def _fault(label: str, expected: str, got: int | str) -> RedpenError:
    return RedpenError(f"{label}: expected {expected}, got {got}; remove the line, or run the evaluation again")


def is_episode(value: Mapping[str, Any]) -> bool:
    """Whether a line is an episode, not a rollout."""
    return isinstance(value.get("traces"), list) and "task" in value and "messages" not in value


def _answering(trace: _Trace, leaves: Sequence[int]) -> int | None:
    """The leaf of the branch with the answer to the task; None if it is not known."""
    if trace.root_reply is None or len(leaves) == 1:
        return leaves[-1] if leaves else None
    reply = trace.root_reply.strip()
    texts = {leaf: trace.nodes[leaf].message.content for leaf in leaves}
    return next((leaf for leaf, text in texts.items() if isinstance(text, str) and text.strip() == reply), None)


def _is_answer(value: Any) -> bool:
    """Whether a task's answer is one that a prompts file may have; it may be anything, for the task's own rewards."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str | int | float) and not isinstance(text, bool) for text in texts)


def _chat_message(message: _Message) -> dict[str, Any] | None:
    """A message as chat templates read it; None if it has something that they do not."""
    made = message.model_dump(exclude={"tool_calls"}, exclude_none=True)
    if isinstance(message.content, list) and any(part.get("type") != "text" for part in message.content):
        return None
    if message.tool_calls:
        if any(call.type != "function" or call.namespace for call in message.tool_calls):
            return None
        made["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return {"content": ""} | made if not message.tool_calls else made


def _tool(tool: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema of a function, as OpenAI's API has it; None for another tool."""
    if tool.get("type", "function") != "function" or tool.get("namespace") or not isinstance(tool.get("name"), str):
        return None
    function = {key: value for key, value in tool.items() if key != "type" and value != ""}
    return {"type": "function", "function": function}


def _counts(call: _ModelCall) -> tuple[int, int] | None:
    if call.usage is None:
        return None
    return call.usage.prompt_tokens + (call.usage.cached_input_tokens or 0), call.usage.completion_tokens


def _sampled(counts: dict[int, tuple[int, int] | None], settings: list[tuple[str, Any]]) -> SampledTurns:
    numbers = ((name, value) for name, value in settings if name in ("temperature", "top_p"))
    return SampledTurns(counts, frozenset((name, value) for name, value in numbers if isinstance(value, int | float)))
