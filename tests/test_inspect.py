"""Looking at a cache: right numbers, marked tokens, and no way for a rollout to steer the terminal."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

import cache_schema as cs
from helpers import cache_factory as factory
from pipeline import cli, console
from pipeline.errors import RedpenError
from pipeline.report import inspect, terminal
from pipeline.rounds import metrics
from pipeline.text.detokenize import pieces as pieces_of
from pipeline.toy import asset_path


class Letters:
    """Token 33 as a terminal escape, every other as a letter."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join("\x1b]0;gotcha\x07\n" if token == 33 else chr(97 + token % 26) for token in token_ids)


def shown(what: dict[str, Any], *, colour: bool) -> str:
    out = Console(file=io.StringIO(), width=200, force_terminal=colour, color_system="truecolor" if colour else None)
    if "tokens" in what:
        terminal.show_rollout([what], out)
    else:
        terminal.show_summary(what, out)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.fixture
def cache(tmp_path: Path) -> cs.Cache:
    return factory.filled(tmp_path / "c.zarr", n_prompts=10, topk=3)


# ----------------------------------------------------------------------------------------------------------- metrics


def test_reverse_kl_is_exact_where_the_candidates_cover_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(6), 50) for _ in range(2))
    nothing = np.full(50, -np.inf)
    expected = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(metrics.reverse_kl(np.log(p), nothing, np.log(q), nothing), expected, rtol=1e-12)
    coarse = metrics.reverse_kl(np.log(p[:, :2]), np.log(p[:, 2:].sum(1)), np.log(q[:, :2]), np.log(q[:, 2:].sum(1)))
    assert (coarse <= expected + 1e-12).all() and (coarse >= 0).all()


def test_reverse_kl_counts_a_repeated_candidate_once() -> None:
    p, q = np.log([[0.5, 0.3, 0.5]]), np.log([[0.2, 0.6, 0.2]])
    rest = np.log([0.2])
    once = metrics.reverse_kl(p[:, :2], rest, q[:, :2], rest)
    np.testing.assert_allclose(metrics.reverse_kl(p, rest, q, rest, np.array([[7, 2, 7]])), once)


def test_reverse_kl_is_infinite_where_the_teacher_excludes_a_token_of_the_student() -> None:
    half, none = np.log([[0.5]]), np.array([[-np.inf]])
    assert metrics.reverse_kl(half, np.log([0.5]), none, np.log([1.0]))[0] == np.inf
    assert metrics.reverse_kl(none, np.log([1.0]), none, np.log([1.0]))[0] == 0


# ----------------------------------------------------------------------------------------------------------- summary


def test_scores_of_other_rollouts_are_said(cache: cs.Cache, capsys: pytest.CaptureFixture[str]) -> None:
    path = cache.path
    assert path is not None
    commits = path / "rounds/00000/scores/teacher/commit/c"
    shutil.copyfile(commits / "1/0", commits / "0/0")
    terminal.run(str(path), None, None, None, False)
    assert "teacher scored 1 blocks whose rollouts or candidates are others now" in capsys.readouterr().err


def test_summary_counts_what_is_there(cache: cs.Cache) -> None:
    round_ = cache.round()
    round_.scores("teacher").uncommit(1)
    blocks = [round_.rollouts.read(block) for block in range(3)]
    found = inspect.summary(cache)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (summary,) = found["rounds"]
    assert summary["rollouts"] == 30 and summary["tokens"] == sum(block.n_tokens for block in blocks)
    assert summary["blocks"] == {"committed": 3, "total": 3} and sum(summary["finish"].values()) == 30
    assert summary["finish"]["length"] == sum((block.finish_reason == cs.FINISH_LENGTH).sum() for block in blocks)
    student, teacher = summary["scores"]
    assert student["name"] == "student" and "reverse_kl" not in student
    assert teacher["blocks"] == {"committed": 2, "stale": 0, "total": 3} and teacher["topk"] == 3
    kls = []
    for block in (0, 2):
        mine, theirs = round_.scores("student").read(block), round_.scores("teacher").read(block)
        kls.append(
            metrics.reverse_kl(
                mine.candidate_logprobs, mine.rest_logprob, theirs.candidate_logprobs, theirs.rest_logprob
            )
        )
    assert teacher["reverse_kl"] == pytest.approx(np.concatenate(kls).mean(), rel=1e-12)
    assert teacher["reverse_kl_tokens"] == blocks[0].n_tokens + blocks[2].n_tokens
    text = shown(found, colour=False)
    assert "3 of 3 blocks committed: 30 rollouts" in text and f"{teacher['reverse_kl']:.4f}" in text and "2/3" in text


def test_summary_of_a_large_round_reads_some_blocks(cache: cs.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "SUMMARY_TOKENS", 1)
    teacher = inspect.summary(cache)["rounds"][0]["scores"][1]
    assert teacher["reverse_kl_tokens"] == cache.round().rollouts.read(0).n_tokens


def test_summary_leaves_untrained_tokens_out(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c.zarr", n_prompts=2)
    round_ = cache.round()
    block = round_.rollouts.read(0)
    rng = np.random.default_rng(1)
    trained = rng.integers(0, 2, block.n_tokens).astype(np.uint8)
    round_.rollouts.write(0, cs.RolloutBlock(**{**vars(block), "trained": trained}))
    for name in ("student", "teacher"):
        group = round_.scores(name)
        ids = round_.scores("student").read(0).candidate_ids if name == "teacher" else None
        group.write(0, factory.score_block(group.manifest, block, rng, ids))
    assert inspect.summary(cache)["rounds"][0]["scores"][1]["reverse_kl_tokens"] == trained.sum()


def test_summary_of_caches_without_scores_or_rounds(tmp_path: Path) -> None:
    cache = cs.create(tmp_path / "c.zarr")
    assert "no rounds yet" in shown(inspect.summary(cache), colour=False)
    records = factory.prompts(3)
    cache.start_round(factory.round_manifest(records), records)
    found = inspect.summary(cache)
    assert found["rounds"][0]["rollouts"] == 0 and found["rounds"][0]["mean_response_tokens"] is None
    assert "0 of 1 block committed" in shown(found, colour=False)


# ---------------------------------------------------------------------------------------------------------- rollouts


def test_rollout_number_is_prompt_and_sample(cache: cs.Cache) -> None:
    cache.round().rollouts.uncommit(0)  # numbers do not depend on what else is there
    found = inspect.rollout(cache.round(), 17, None, Letters)
    assert (found["prompt_index"], found["sample_index"], found["block"]) == (5, 2, 1)
    block = cache.round().rollouts.read(1)
    row = 1 * 3 + 2
    assert [token["id"] for token in found["tokens"]] == block.response(row).tolist()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    student, teacher = (cache.round().scores(name).read(1) for name in ("student", "teacher"))
    span = block.response_slice(row)
    for position, token in enumerate(found["tokens"]):
        assert token["teacher_logprob"] == pytest.approx(float(teacher.logprobs[span][position]))
        assert token["candidates"][0]["id"] == token["id"], "the sampled token comes first"
        assert token["candidates"][0]["student_logprob"] == pytest.approx(token["student_logprob"], abs=1e-6)
        assert len({candidate["id"] for candidate in token["candidates"]}) == len(token["candidates"])
        assert {c["id"] for c in token["candidates"]} >= set(teacher.topk_ids[span][position].tolist())
    kl = metrics.reverse_kl(
        student.candidate_logprobs, student.rest_logprob, teacher.candidate_logprobs, teacher.rest_logprob
    )
    assert found["mean_reverse_kl"] == pytest.approx(kl[span].mean())
    with pytest.raises(cs.UncommittedError):
        inspect.rollout(cache.round(), 0, None, Letters)


def test_rollout_is_marked_with_and_without_colour(cache: cs.Cache) -> None:
    found = inspect.rollout(cache.round(), 4, "teacher", Letters)
    worst = max(found["tokens"], key=lambda token: token["reverse_kl"])
    assert worst["reverse_kl"] > 1
    coloured, plain = shown(found, colour=True), shown(found, colour=False)
    assert terminal.LEVELS[0][2] in plain and "\x1b[" not in plain
    assert "\x1b[1;37;48;5;160m" in coloured or "\x1b[1;37;48;2;215;0;0m" in coloured
    assert f"{worst['reverse_kl']:.3f}" in plain and "teacher prefers" in plain


def test_rollout_without_scores_is_shown_unmarked(cache: cs.Cache) -> None:
    cache.round().scores("teacher").uncommit(0)
    found = inspect.rollout(cache.round(), 0, None, Letters)
    assert not found["scored"] and found["tokens"][0]["reverse_kl"] is None
    assert found["tokens"][0]["student_logprob"] is not None
    assert "not marked: student or teacher has not scored this block" in shown(found, colour=False)


def test_one_rollout_is_in_the_singular(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c.zarr", n_prompts=1, rollouts_per_prompt=1)
    text = shown(inspect.summary(cache), colour=False)
    assert "1 rollout of each of 1 prompt by" in text and "1 of 1 block committed: 1 rollout, " in text


def test_one_of_several_teachers_is_chosen(cache: cs.Cache) -> None:
    round_ = cache.round()
    round_.start_scores("other", factory.scores_manifest("teacher"))
    with pytest.raises(RedpenError, match="choose one of other, teacher"):
        inspect.rollout(round_, 0, None, Letters)
    assert inspect.rollout(round_, 0, "teacher", Letters)["scored"]
    assert not inspect.rollout(round_, 0, "other", Letters)["scored"]


def test_no_rollout_steers_the_terminal(cache: cs.Cache) -> None:
    """A rollout's text, a prompt's and its answer's may hold anything; only our own colours reach the terminal."""
    attack = "\x1b]0;gotcha\x07\x1b[2J\r\u202e\x9b31m"
    found = inspect.rollout(cache.round(), 4, None, Letters)
    found |= {"prompt": attack, "answer": attack, "source": attack}
    found["tokens"][0]["text"] = attack
    found["tokens"][0]["candidates"][0]["text"] = attack
    for colour in (True, False):
        text = shown(found, colour=colour)
        assert not set("\x07\r\u202e\x9b") & set(text) and "\x1b]" not in text and "\x1b[2J" not in text
        assert "\\x1b]0;gotcha\\x07" in text
    summary = inspect.summary(cache)
    summary["rounds"][0]["student"]["name"] = summary["cache"] = attack
    assert "\x1b" not in shown(summary, colour=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é😀", "plain é😀"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[31m\x00\x7f\x9b", "\\x1b[31m\\x00\\x7f\\x9b"),
        ("\u202e\u2066\ufeff\ud800", "\\u202e\\u2066\\ufeff\\ud800"),
    ],
)
def test_escape_control(text: str, expected: str) -> None:
    assert console.escape_control(text) == expected


def test_pieces_are_the_whole_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    text = "4*1=4;é😀 end<|endoftext|>"
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(ids, tokenizer)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert pieces[ids.index(256)] == "<|endoftext|>" and pieces.count("") == 4, "é has two bytes, the emoji four"
    broken = pieces_of([0x34, 0xF0, 0x9F], tokenizer)
    assert len(broken) == 3 and broken[0] == "4" and "\ufffd" in "".join(broken)
    assert pieces_of([], tokenizer) == []


# ----------------------------------------------------------------------------------------------------------- command


def toy_cache(path: Path) -> cs.Cache:
    """A cache whose tokenizer is the toy's."""
    from pipeline.models.identity import tokenizer_digest

    digest = tokenizer_digest(AutoTokenizer.from_pretrained(asset_path("student")))
    return factory.filled(path, tokenizer=cs.TokenizerIdentity("toy:student", digest, 259))


def test_inspect_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_cache(tmp_path / "c.zarr")
    location = str(tmp_path / "c.zarr")
    assert cli.main(["inspect", location]) == 0
    assert "round 0: student student" in capsys.readouterr().out
    assert cli.main(["inspect", location, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"][0]["prompts"] == 10
    assert cli.main(["inspect", location, "--rollout", "4", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["response"] == bytes(token["id"] for token in found["tokens"]).decode() and captured.err == ""
    assert cli.main(["inspect", location, "--rollout", "4"]) == 0
    out = capsys.readouterr().out
    assert "marked by teacher" in out and not {c for c in out if ord(c) < 32} - {"\n"}


def test_inspect_shows_each_teacher_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    location = str(tmp_path / "c.zarr")
    round_ = toy_cache(tmp_path / "c.zarr").round()
    round_.start_scores("other", factory.scores_manifest("teacher"))
    assert cli.main(["inspect", location, "--rollout", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("prompt  ") == 1 and out.count("response  ") == 2
    assert "not marked: student or other has not scored" in out and "marked by teacher" in out
    assert cli.main(["inspect", location, "--rollout", "4", "--teacher", "teacher"]) == 0
    assert capsys.readouterr().out.count("response  ") == 1
    assert cli.main(["inspect", location, "--rollout", "4", "--json"]) == 1
    assert "choose one of other, teacher" in capsys.readouterr().err

    assert cli.main(["inspect", location]) == 0
    assert f"next: redpen score RECIPE --cache {location}\n" in capsys.readouterr().err
    round_.rollouts.uncommit(0)
    assert cli.main(["inspect", location]) == 0
    assert f"next: redpen rollouts RECIPE --cache {location}\n" in capsys.readouterr().err
    toy_cache(tmp_path / "scored.zarr")
    assert cli.main(["inspect", str(tmp_path / "scored.zarr")]) == 0
    assert "--rollout 0, redpen train RECIPE" in capsys.readouterr().err


def test_colours_follow_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    location = str(toy_cache(tmp_path / "c.zarr").path)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    cli.main(["inspect", location, "--rollout", "4"])
    assert "\x1b[" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    cli.main(["inspect", location, "--rollout", "4"])
    coloured = capsys.readouterr().out
    assert "\x1b[1;37;" in coloured and "^^^" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["inspect", location, "--rollout", "4"])
    plain = capsys.readouterr().out
    assert "\x1b[1;37;" not in plain and "^^^" in plain


def test_inspect_without_the_tokenizer_shows_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = factory.filled(tmp_path / "c.zarr", tokenizer=cs.TokenizerIdentity("no/where", "t" * 16, 40))
    assert cli.main(["inspect", str(tmp_path / "c.zarr"), "--rollout", "0", "--json"]) == 0
    captured = capsys.readouterr()
    assert "tokenizer no/where is not on this machine" in captured.err
    first = int(cache.round().rollouts.read(0).response(0)[0])
    assert json.loads(captured.out)["tokens"][0]["text"] == f"<{first}>"


def test_inspect_says_when_the_tokenizer_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory.filled(tmp_path / "c.zarr", tokenizer=cs.TokenizerIdentity("toy:student", "t" * 16, 259))
    assert cli.main(["inspect", str(tmp_path / "c.zarr"), "--rollout", "0"]) == 0
    assert "differs from the one that the cache was made with" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["prompts/bytes/c/0", "scores/teacher/logprobs/zarr.json", "rollouts/zarr.json"])
@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--rollout", "0"], ["verify"], ["export-cache"]])
def test_a_damaged_cache_is_one_line(
    damage: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_cache(tmp_path / "c.zarr")
    (tmp_path / "c.zarr/rounds/00000" / damage).unlink()
    if command == ["inspect"] and "prompts" in damage:
        return  # a summary shows none
    options = ["-o", str(tmp_path / "x.parquet")] if command == ["export-cache"] else []
    assert cli.main([command[0], str(tmp_path / "c.zarr"), *command[1:], *options]) == 1
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if damage.partition("/c/")[0] in line]
    assert len(lines) == 1 and not (tmp_path / "x.parquet").exists()
