"""Rollouts of several turns: what is sampled, what the environment may do, and what a round records of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cache_schema as cs
import pipeline.evaluate.stage
import pipeline.report.stage
import pipeline.score.stage
import pipeline.train.stage
from helpers import preloaded
from helpers.caches import assert_same_cache, wait_for_commits
from helpers.turns import END, ENVIRONMENT, STOP, chat_recipe, replayed, tokenizer
from pipeline.cli import main
from pipeline.config import load_recipe
from pipeline.engines.episodes import Episodes
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import ConfigError, Interrupted, RedpenError
from pipeline.files import file_digest
from pipeline.models.resolve import resolve
from pipeline.rollouts import stage
from pipeline.rounds.scored_block import scored_blocks
from pipeline.text.detokenize import response_texts
from pipeline.text.environments import Environment, EnvironmentFailedError
from pipeline.text.prompts import load_prompts
from pipeline.text.rendering import render_all

USER = {"role": "user", "content": "2+2?"}
SAID = {"role": "assistant", "content": "5"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, where environments are imported from."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- the environment in its process --------------------------------------------------------------------------


def ask(environment: Environment, *turns: dict[str, Any], rollout: tuple[int, int] = (0, 0)) -> Any:
    """The reply after each of the student's turns so far: the chat is a prompt, then what was said."""
    messages = [USER, *turns]
    ends = [n + 1 for n, message in enumerate(messages) if message["role"] == "assistant"]
    return environment.submit(rollout, {"prompt": "2+2?", "answer": "4"}, messages, ends).result(timeout=30)


@pytest.fixture
def made(here: Path) -> Any:
    """`made(code)`: an environment of this body of `env_response`, which may take 2 s."""
    opened: list[Environment] = []

    def make(body: str, seconds: float = 2.0) -> Environment:
        (here / "mine.py").write_text(
            "import json, os, sys, time, multiprocessing, signal\n"
            "class Mine:\n"
            "    def __init__(self, row): self.row, self.calls = row, []\n"
            "    def env_response(self, messages):\n"
            "        self.calls.append(len(messages))\n"
            f"        {body}\n"
        )
        opened.append(Environment("mine:Mine", seconds, 2))
        return opened[-1]

    yield make
    for environment in opened:
        environment.close()


def test_an_object_serves_one_rollout_and_outlives_its_process(made: Any, here: Path) -> None:
    reply = "json.dumps([self.row['answer'], self.calls, os.getpid()])"
    body = f"print('noise'); return [{{'role': 'tool', 'content': {reply}}}]"
    environment = made(body)
    assert environment.source_digest == file_digest(here / "mine.py")
    (first,) = ask(environment, SAID)
    answer, calls, process = json.loads(first["content"])
    assert answer == "4" and calls == [2] and first["role"] == "tool"
    (second,) = ask(environment, SAID, first, SAID)
    assert json.loads(second["content"]) == ["4", [2, 4], process]
    assert json.loads(ask(environment, SAID, rollout=(2, 0))[0]["content"])[1] == [2]  # another object
    os.kill(process, 9)
    with contextlib.suppress(EnvironmentFailedError):  # unless the process has ended before it is asked
        ask(environment, SAID, first, SAID, second, SAID)
    (third,) = ask(environment, SAID, first, SAID, second, SAID)  # made anew, and called for the earlier turns
    assert json.loads(third["content"])[1] == [2, 4, 6] and json.loads(third["content"])[2] != process


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {}['x']", r"KeyError: 'x' \(mine\.py:6\)"),
        ("sys.exit(3)", r"SystemExit: 3 \(mine\.py:6\)"),
        ("os._exit(3)", r"ended its process \(exit code 3\)"),
        ("time.sleep(60)", r"took longer than rollouts\.environment_timeout = 0\.5 s"),
        ("signal.alarm(0); 9 ** 9 ** 9", r"took longer than rollouts\.environment_timeout"),
        ("multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)).start(); time.sleep(60)",
         "took longer than"),
        ("return 'text'", 'expected a list of messages, or None, got "text"'),
        ("return [{'role': 'tool'}]", r'expected messages with role and content, both text, got {"role": "tool"}'),
        ("return [{'role': 'tool', 'content': [1]}]", "both text"),
        ("return [{'role': 'assistant', 'content': 'a'}]", r'got "assistant", whose turns are the student\'s'),
        ("return [{'role': 'tool', 'content': 'a', 'x': {1, 2}}]", "TypeError: Object of type set"),
    ],
)  # fmt: skip
def test_what_an_environment_may_do_is_a_failure_of_one_line(made: Any, body: str, message: str) -> None:
    environment = made(body, 0.5)
    started = time.monotonic()
    with pytest.raises(EnvironmentFailedError, match=message) as error:
        ask(environment, SAID)
    assert time.monotonic() - started < 5 and "\n" not in str(error.value)


def test_earlier_turns_that_are_called_again_have_their_own_time(made: Any) -> None:
    """After another rollout has ended the process, replaying three turns takes longer than one call may."""
    environment = made(
        "time.sleep(0.4 if self.row['prompt'] else 60); return [{'role': 'tool', 'content': 'x'}]", 0.7
    )
    turns = [SAID]
    for _ in range(2):
        turns += [*ask(environment, *turns), SAID]
    with pytest.raises(EnvironmentFailedError, match="took longer"):
        environment.submit((2, 0), {"prompt": ""}, [USER, SAID], [2]).result(timeout=30)
    assert ask(environment, *turns) == [{"role": "tool", "content": "x"}]


def test_a_module_that_is_edited_meanwhile_is_not_used(made: Any, here: Path) -> None:
    environment = made("os._exit(1) if len(self.calls) > 1 else None")
    assert environment.source_digest and ask(environment, SAID) == []
    (here / "mine.py").write_text((here / "mine.py").read_text() + "# other\n")
    with pytest.raises(EnvironmentFailedError, match="ended its process"):
        ask(environment, SAID, USER, SAID)
    for _ in range(2):  # not the second time either
        with pytest.raises(ConfigError, match=r'"mine:Mine": \S+mine\.py is not the module that'):
            ask(environment, SAID)


def test_nothing_to_say_ends_a_rollout(made: Any) -> None:
    assert ask(made("return None"), SAID) == ask(made("return []"), SAID) == []


# -- what is sampled -----------------------------------------------------------------------------------------


class Chats:
    """A sampler with an environment, and the block that it samples."""

    def __init__(self, here: Path, *overrides: str):
        self.recipe = chat_recipe(here, *overrides)
        self.student, self.records = resolve(self.recipe.student), load_prompts(self.recipe.prompts)
        self.model = AutoModelForCausalLM.from_pretrained(here / "student", attn_implementation="sdpa").eval()
        ids = render_all(self.records, self.student.tokenizer, self.recipe.prompts, 64)
        self.block = PromptBlock(0, list(enumerate(ids)), self.records)
        self.double = AutoModelForCausalLM.from_pretrained(here / "student", dtype=torch.float64).eval()
        self.sampling = Sampling(1.0, 1.0, (END, STOP), 4, self.recipe.rollouts.max_response_tokens, seed=3)
        self.episodes = Episodes(self.recipe, self.student, self.records[0])

    @torch.inference_mode()
    def logprobs(self, prompt: np.ndarray, response: list[int]) -> np.ndarray:
        """float64 [T + 1, V]: of the distributions of every token of a response, and of one more."""
        ids = torch.tensor([[*prompt.tolist(), *response]])
        return self.double(ids).logits[0, len(prompt) - 1 :].log_softmax(-1).numpy()

    def sample(self, batch_size: int = 256, on_step: Callable[[int, int], None] = lambda *_: None) -> cs.RolloutBlock:
        sampler = TransformersSampler(
            self.model, self.sampling, batch_size=batch_size, on_step=on_step, episodes=self.episodes
        )
        return sampler.sample_block(self.block)


def test_a_rollout_is_what_the_oracle_samples_turn_by_turn(here: Path) -> None:
    """Every token of the student's is drawn by its position's number, and every other is the environment's."""
    chats = Chats(here, "rollouts.max_response_tokens=16")
    rollouts = chats.sample()
    assert rollouts.n_rows == 24
    texts, ends, n_turns = response_texts(rollouts, tokenizer()), set(), set()
    for row in range(rollouts.n_rows):
        prompt, ids, span = int(rollouts.row_prompt[row]), rollouts.response(row), rollouts.response_slice(row)
        trained, end = replayed(chats.records[prompt], ids.tolist(), 3, 16)
        own = np.array(trained) == 1
        assert rollouts.trained[span].tolist() == trained
        assert rollouts.finish_reason[row] == (cs.FINISH_STOP if end == "stop" else cs.FINISH_LENGTH)

        logprobs_TV = chats.logprobs(rollouts.prompt(row), ids.tolist())[:-1]
        found, expected = rollouts.rollout_logprobs[span], logprobs_TV[np.arange(len(ids)), ids]
        np.testing.assert_allclose(found[own], expected[own], atol=1e-4)
        assert np.isnan(found[~own]).all()
        cumulative_TV = np.exp(logprobs_TV).cumsum(1)
        uniforms = chats.sampling.uniforms(prompt, int(rollouts.sample_index[row]))[: len(ids)]
        drawn = (cumulative_TV <= uniforms[:, None] * cumulative_TV[:, -1:]).sum(1)
        np.testing.assert_array_equal(drawn[own], ids[own])

        last = ids[len(ids) - int(np.argmin(trained[::-1])) if not own.all() else 0 :]
        assert texts[row] == tokenizer().decode(last, skip_special_tokens=True)
        ends.add((end, int(ids[-1]) if end == "stop" else None))
        n_turns.add(1 + int((np.diff(trained) == -1).sum()))
    assert n_turns == {1, 2, 3} and {("stop", END), ("stop", STOP), ("length", None), ("reply", None)} == ends
    for batch_size in (1, 5):
        again = chats.sample(batch_size)
        np.testing.assert_array_equal(again.token_ids, rollouts.token_ids)
        np.testing.assert_array_equal(again.trained, rollouts.trained)
    chats.episodes.close()


def test_progress_counts_rollouts_once_and_can_stop_a_waiting_sampler(here: Path) -> None:
    chats, counted = Chats(here), np.zeros(2, np.int64)

    def count(rollouts: int, tokens: int) -> None:
        counted[:] += rollouts, tokens

    rollouts = chats.sample(on_step=count)
    assert counted.tolist() == [rollouts.n_rows, int(rollouts.trained.sum())]
    chats.episodes.close()
    (here / "counting.py").write_text("import time\n" + ENVIRONMENT.replace("self.calls += 1", "time.sleep(60)"))
    waits = Chats(here)

    def stop(rollouts: int, tokens: int) -> None:
        if tokens == 0:  # nothing is decoded: the environment is being waited for
            raise Interrupted(15)

    started = time.monotonic()
    with pytest.raises(Interrupted):
        waits.sample(on_step=stop)
    waits.episodes.close()
    assert time.monotonic() - started < 20


# -- the stage -----------------------------------------------------------------------------------------------


def sampled(cache: str | Path) -> cs.Round:
    return cs.open(cache).round()


def test_the_stage_records_the_environment_and_refuses_an_edited_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(here)
    assert stage.run(recipe, "c.zarr") == 0
    out = capsys.readouterr().out
    assert "6 prompts x 4" in out and "of the tokens by the environment" in out and "nan" not in out
    settings = sampled("c.zarr").manifest.sampler_settings
    assert settings["environment"].keys() == {"name", "max_turns", "source_digest"}
    assert settings["environment"]["name"] == "counting:Counting" and settings["environment"]["max_turns"] == 3
    assert stage.run(chat_recipe(here, "rollouts.environment_timeout=5"), "c.zarr") == 0
    assert capsys.readouterr().out.strip().endswith("nothing to do")
    with pytest.raises(cs.ProvenanceError, match=r"sampler_settings\.environment\.max_turns: cached 3, now 2"):
        stage.run(chat_recipe(here, "rollouts.max_turns=2"), "c.zarr")
    (here / "counting.py").write_text(ENVIRONMENT + "Other = Counting\n")
    with pytest.raises(cs.ProvenanceError, match=r"sampler_settings\.environment\.source_digest: cached"):
        stage.run(recipe, "c.zarr")
    with pytest.raises(cs.ProvenanceError, match=r"environment\.name: cached counting:Counting, now counting:Other"):
        stage.run(chat_recipe(here, "rollouts.environment=counting:Other"), "c.zarr")
    assert stage.run(chat_recipe(here, "rollouts.environment="), "plain.zarr") == 0
    assert sampled("plain.zarr").manifest.sampler_settings == {}  # as ever


def test_rollouts_whose_environment_fails_are_left_out_and_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(here)
    stage.run(recipe, "whole.zarr")
    fails = ENVIRONMENT.replace("self.calls += 1", "self.calls += 1; 1 / (self.row['prompt'] != 'h')")
    (here / "counting.py").write_text(fails)
    capsys.readouterr()
    assert stage.run(recipe, "c.zarr") == 0
    out, err = capsys.readouterr()
    whole, fewer = sampled("whole.zarr"), sampled("c.zarr")
    n_left_out = 0
    for block in range(3):
        ours, all_of_it = fewer.rollouts.read(block), whole.rollouts.read(block)
        kept = {(int(p), int(s)) for p, s in zip(ours.row_prompt, ours.sample_index, strict=True)}
        for row in range(all_of_it.n_rows):
            key = int(all_of_it.row_prompt[row]), int(all_of_it.sample_index[row])
            of_h = whole.prompts[int(all_of_it.prompt_index[key[0]])]["prompt"] == "h"
            # asked after a turn that ends with <end>
            first_end = np.flatnonzero(np.isin(all_of_it.response(row), (END, STOP)))[:1]
            asked = len(first_end) and all_of_it.response(row)[first_end[0]] == END
            assert (key in kept) == (not (of_h and asked))
            n_left_out += key not in kept
    assert n_left_out and f"{n_left_out} rollouts left out" in out
    line = next(line for line in err.splitlines() if "are left out" in line)
    assert f"{n_left_out} rollouts are left out, the first: ZeroDivisionError" in line and "counting.py:" in line
    assert not list(cs.verify(cs.open("c.zarr")))
    assert stage.run(recipe, "c.zarr") == 0
    assert f"{n_left_out} rollouts left out; nothing to do" in capsys.readouterr().out


def test_what_cannot_work_is_refused_before_anything_is_written(here: Path) -> None:
    chat_recipe(here)
    (here / "broken.py").write_text("import no_such_module\nmake = 1\n")
    (here / "plain.py").write_text("make = 1\n")
    for override, message in {
        "rollouts.environment=missing:make": "cannot|can be imported.*No module named 'missing'",
        "rollouts.environment=broken:make": r"no_such_module.*\(broken\.py:1\)",
        "rollouts.environment=plain:other": "has no attribute 'other'",
        "rollouts.environment=plain:make": "make is not callable, but int",
        "prompts.template=none": r"rollouts\.environment needs a chat template",
        "rollouts.stop_token_ids=[5]": r'rollouts\.environment: .*expected the stop token "<stop>"',
        "score.alignment=spans": r'rollouts\.environment needs score\.alignment = "tokens"',
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            stage.run(chat_recipe(here, override), "c.zarr")
        assert "rollouts.environment" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^rollouts\.stop_token_ids: expected ids below 24, got 99"):
        stage.run(chat_recipe(here, "rollouts.stop_token_ids=[99]"), "c.zarr")
    assert not Path("c.zarr").exists()
    with pytest.raises(ConfigError, match=r"rollouts\.stop_token_ids must be a non-empty list of integers"):
        chat_recipe(here, "rollouts.stop_token_ids=[]")
    with pytest.raises(ConfigError, match=r"rollouts\.environment must be module:factory"):
        load_recipe("toy", ["rollouts.environment=calculator"])


def test_an_environment_that_always_fails_stops_the_first_block(here: Path) -> None:
    recipe = chat_recipe(here, "rollouts.stop_token_ids=[3]", "rollouts.prompts_per_block=6")
    (here / "counting.py").write_text("class Counting:\n    def __init__(self, row): raise RuntimeError('down')\n")
    with pytest.raises(
        RedpenError, match=r"failed in all of the \d+ rollouts .*, the first: RuntimeError: down \(counting\.py:2\)"
    ):
        stage.run(recipe, "c.zarr")
    assert not sampled("c.zarr").rollouts.committed().any()
    (here / "counting.py").write_text(ENVIRONMENT)


def test_a_block_of_one_prompt_that_always_fails_does_not_end_the_round(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rollouts end where the environment failed, also if a killed command begins again with just this block."""
    recipe = chat_recipe(
        here, "rollouts.stop_token_ids=[3]", "rollouts.prompts_per_block=5", "rollouts.max_response_tokens=80"
    )
    (here / "counting.py").write_text(
        ENVIRONMENT.replace("self.calls += 1", "self.calls += 1; 1 / (self.row['prompt'] != 'v')")
    )
    assert stage.run(recipe, "c.zarr") == 0
    assert re.search(r"failed, and 4 rollouts ended there, the first: ZeroDivisionError", capsys.readouterr().err)
    block = sampled("c.zarr").rollouts.read(1)
    assert block.finish_reason.tolist() == [cs.FINISH_OTHER] * 4
    shutil.copytree("c.zarr", "again.zarr")
    cs.open("again.zarr", writable=True).round().rollouts.uncommit(1)
    assert stage.run(recipe, "again.zarr") == 0
    assert_same_cache(Path("c.zarr"), Path("again.zarr"), ["rollouts"])


def test_what_is_imported_for_the_checks_is_not_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The module is imported once to be checked, and once by each process that replies; failures while answers are
    checked are not rollouts."""
    fails = ENVIRONMENT.replace("self.calls += 1", "self.calls += 1; 1 / ('held' not in self.row)")
    (here / "held.jsonl").write_text('{"prompt": "ab", "answer": "c"}\n{"prompt": "v", "answer": "c", "held": 1}\n')
    recipe = chat_recipe(
        here, f"eval.path={here / 'held.jsonl'}", "prompts.columns=['held']", "rollouts.stop_token_ids=[3]"
    )
    (here / "prompts.jsonl").write_text('{"prompt": "efg"}\n{"prompt": "h"}\n')
    (here / "counting.py").write_text(
        "open('imports', 'a').write('.')\n" + fails.replace('self.row["answer"]', "self.row['prompt']")
    )
    assert stage.run(recipe, "c.zarr") == 0
    err = capsys.readouterr().err
    assert "failed, and 1 responses of the checks are left out" in err and "rollouts are left out" not in err
    assert (here / "imports").read_text() == "..."


def test_failures_of_one_block_are_not_those_of_all(here: Path) -> None:
    recipe = chat_recipe(here, "rollouts.stop_token_ids=[3]", "rollouts.max_response_tokens=80")
    fails = "self.calls += 1; 1 / (self.row['prompt'] in ('efg', 'h', 'klmnop') and self.calls < 3)"
    (here / "counting.py").write_text(ENVIRONMENT.replace("self.calls += 1", fails))
    with pytest.raises(RedpenError, match="failed in all of the 8 rollouts of a block"):
        stage.run(recipe, "c.zarr")


def test_assertions_of_the_environment_hold(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs are equal, and the environment found what it asserts: its calls in order, the row of its prompt."""
    recipe = chat_recipe(here)
    stage.run(recipe, "a.zarr")
    stage.run(recipe, "b.zarr")
    assert "left out" not in capsys.readouterr().err
    assert_same_cache(Path("a.zarr"), Path("b.zarr"), ["rollouts"])


def test_a_round_with_an_environment_goes_through_every_stage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One prompt has no rollout left, since its environment always fails."""
    broken = ENVIRONMENT.replace("self.calls += 1", "self.calls += 1; 1 / (self.row['prompt'] != 'h')")
    held_out = [f"eval.path={here / 'prompts.jsonl'}", "eval.samples=2", "train.heldout_metric=accuracy"]
    settings = ["rollouts.stop_token_ids=[3]", "rollouts.max_response_tokens=80", *held_out]
    recipe = chat_recipe(here, *settings)
    (here / "counting.py").write_text(broken)
    assert stage.run(recipe, "c.zarr") == 0 and pipeline.score.stage.run(recipe, "c.zarr") == 0
    round_ = sampled("c.zarr")
    blocks = [round_.rollouts.read(block) for block in range(3)]
    indices = {int(block.prompt_index[prompt]) for block in blocks for prompt in block.row_prompt}
    assert indices == {0, 2, 3, 4, 5} and round_.prompts[1]["prompt"] == "h"
    capsys.readouterr()

    for command in (["inspect", "c.zarr"], ["diagnose", "c.zarr"], ["inspect", "c.zarr", "--rollout", "0"]):
        assert main(command) == (command[0] == "diagnose")  # which finds that random models do not fit
        out = capsys.readouterr().out
        assert out and "nan" not in out.lower()
    alone = ["train.prompts_per_step=1", "train.steps=6"]
    with pytest.raises(ConfigError, match=r"train\.prompts_per_step = 1: 1 of 6 prompts of round 0 have no rollout"):
        pipeline.train.stage.run(chat_recipe(here, *settings, *alone), "c.zarr", here / "alone")
    assert not (here / "alone").exists()
    assert pipeline.train.stage.run(recipe, "c.zarr", here / "run") == 0
    n_own = sum(int((block.trained == 1).sum()) for block in blocks)
    metrics = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
    assert 0 < sum(line["tokens"] for line in metrics) <= n_own < sum(block.n_tokens for block in blocks)

    assert pipeline.evaluate.stage.run(str(here / "run")) == 0
    captured = capsys.readouterr()
    assert "rollouts ended there, the first: ZeroDivisionError" in captured.err
    figures = json.loads((here / "run/eval.json").read_text())
    fresh = cs.open(here / "run/eval.zarr").round(1)
    assert fresh.manifest.sampler_settings == round_.manifest.sampler_settings
    found = list(scored_blocks(fresh))
    reverse_kl = np.concatenate([block.reverse_kl["teacher"][block.mask("teacher")] for block in found])
    assert len(reverse_kl) < sum(block.rollouts.n_tokens for block in found)
    assert figures["after"]["reverse_kl"]["value"] == pytest.approx(reverse_kl.mean(), rel=1e-6)
    assert cs.FINISH_OTHER in found[0].rollouts.finish_reason  # of the prompt whose environment fails
    assert pipeline.report.stage.run([str(here / "run")], here / "page.html") == 0
    assert (here / "page.html").stat().st_size > 10_000


def test_two_kills_change_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, rng = chat_recipe(here, "rollouts.prompts_per_block=1"), random.Random()
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert stage.run(recipe, "calm.zarr") == 0
    (here / "recipe.toml").write_text(recipe.to_toml())
    killed = here / "killed.zarr"
    for _ in range(2):
        process = start(here, killed)
        wait_for_commits(process, killed / "rounds/00000/rollouts", rng.randint(1, 2))
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert not list(cs.verify(cs.open(killed)))
    out, err = start(here, killed).communicate(timeout=120)
    assert "next: redpen score" in err or "nothing to do" in out, err  # the last block may be there before the kill
    assert_same_cache(killed, Path("calm.zarr"), ["rollouts"])


def start(here: Path, cache: Path) -> preloaded.Process:
    return preloaded.python("-m", "pipeline", "rollouts", str(here / "recipe.toml"), "--cache", str(cache))


def test_the_calculator_of_the_documentation_calculates(here: Path) -> None:
    page = (Path(__file__).parent.parent / "docs/stage-one.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# calculator\.py.*?)^```", page, re.M | re.S)
    (here / "calculator.py").write_text(code)
    environment = Environment("calculator:Calculator", 10.0, 1)
    asks = {"role": "assistant", "content": "I ask: <calc>12 * 7</calc>"}
    assert ask(environment, asks) == [{"role": "tool", "content": "84"}]
    assert ask(environment, SAID, rollout=(1, 0)) == []
    environment.close()
