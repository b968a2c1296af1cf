"""`redpen sample` and `redpen chat`: what both students say, and what a conversation remembers."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import numpy as np
import pytest

import pipeline.train.stage
from helpers.caches import small_recipe
from pipeline import chat, cli
from pipeline.engines.heldout import greedy_sampling
from pipeline.engines.sampling import PromptBlock
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import Interrupted, RedpenError
from pipeline.models import load as models
from pipeline.models.resolve import resolve

PROMPT = "642+9*7="
GREEDY = ("--set", "rollouts.temperature=0")


@pytest.fixture(scope="module")
def run_dir(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "run"
    recipe = small_recipe("train.lora_rank=8", "train.prompts_per_step=24", "train.learning_rate=0.005")
    assert pipeline.train.stage.run(recipe, str(toy_cache), path) == 0
    return path


def greedy(run: Path, label: str) -> str:
    """The response of `redpen eval`'s sampler."""
    recipe = small_recipe(*([f"student.adapter={run / 'adapter'}"] if label == "after" else []))
    student = resolve(recipe.student)
    sampler = TransformersSampler(
        models.load_model(student, attention="sampling"), greedy_sampling(recipe, student), batch_size=1
    )
    ids = np.array(student.tokenizer(PROMPT)["input_ids"], np.int32)
    rollouts = sampler.sample_block(PromptBlock(0, [(0, ids)]))
    text: str = student.tokenizer.decode(rollouts.response(0), skip_special_tokens=True)
    return text


def test_a_sample_is_what_both_students_say(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [greedy(run_dir, label) for label in ("before", "after")]
    assert len(set(expected)) == 2, "training has changed the response"
    capsys.readouterr()
    assert cli.main(["sample", str(run_dir), PROMPT, *GREEDY]) == 0
    assert capsys.readouterr().out.splitlines() == ["before:", expected[0], "", "after:", expected[1], ""]


def replies(lines: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The replies of both students, in turn."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chatting = ("--set", "prompts.template=chat", "--set", "rollouts.max_response_tokens=8")
    assert cli.main(["chat", str(run), *chatting]) == 0
    parts = capsys.readouterr().out.split("before:\n")[1:]
    return [reply for part in parts for reply in part.split("\nafter:\n")]


def test_a_conversation_is_remembered_until_a_new_one_begins(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, list[str]]] = []
    render = chat.render

    def recorded(record: dict[str, object], *args: object) -> list[int]:
        seen.append([message["role"] for message in record["messages"]])  # type: ignore[attr-defined, arg-type]
        return render(record, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(chat, "render", recorded)
    said = replies(f"{PROMPT}\n\n{PROMPT}\n/new\n{PROMPT}\n/quit\nnever read\n", run_dir, monkeypatch, capsys)
    one, two = ["user"], ["user", "assistant", "user"]
    assert seen == [one, one, two, two, one, one]
    assert len(said) == 6 and said[:2] == said[4:], "the same beginning and random numbers"


def test_a_long_conversation_is_one_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1" * 4000 + "\n" + PROMPT + "\n"))
    assert cli.main(["chat", str(run_dir), *GREEDY]) == 0
    said = capsys.readouterr()
    assert "context of" in said.err and said.out.startswith("before:\n") and said.out.count("after:") == 1


def test_a_line_that_is_no_text_costs_no_other(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = io.BytesIO(b"a\xff\n" + PROMPT.encode() + b"\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, "utf-8", "strict"))
    assert cli.main(["chat", str(run_dir), *GREEDY, "--set", "rollouts.max_response_tokens=2"]) == 0
    said = capsys.readouterr()
    assert "the message: expected UTF-8, got byte 0xff" in said.err and said.out.count("after:") == 1


def test_ctrl_c_stops_a_response_and_then_the_conversation(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise Interrupted(signal.SIGINT)

    lines = iter([PROMPT])
    monkeypatch.setattr(chat, "_reply", interrupt)
    monkeypatch.setattr(chat, "_read_line", lambda: next(lines, None) or interrupt())
    assert chat.chat(str(run_dir)) == 130
    assert "stopped" in capsys.readouterr().err


def test_a_response_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = chat._Terminal(resolve(small_recipe().student).tokenizer)
    streamer.on_finalized_text("a\x1b[2J\nb\u202e", stream_end=True)
    assert capsys.readouterr().out == "a\\x1b[2J\nb\\u202e\n"


def test_what_cannot_be_talked_to(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RedpenError, match=r"recipe\.toml"):
        chat.chat(str(tmp_path))
    with pytest.raises(RedpenError, match="PROMPT: expected text"):
        chat.sample(str(run_dir), " ")
