"""The data of a report against the cache itself, what is chosen of a large round, and pages of unfinished things."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cache_schema as cs
from helpers import cache_factory as factory
from helpers.caches import make_cache, overwrite_with_zeros, small_recipe
from pipeline import cli
from pipeline.errors import ConfigError, RedpenError
from pipeline.report import read, stage
from pipeline.report.document import RolloutSet, SetRequest, rollout_set
from pipeline.report.string_table import StringTable, encode_nats
from pipeline.rounds import metrics
from pipeline.rounds.identity import cache_identity
from pipeline.runs.files import read_record, write_record
from pipeline.text.answers import Checker
from pipeline.text.detokenize import load_decoder
from pipeline.text.detokenize import pieces as text_pieces
from pipeline.toy.world import Problem, add_without_carry

MISSING = 65535


class Letters:
    """Every token a letter."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)


def unpacked(text: str, dtype: str = "<u2") -> Any:
    return np.frombuffer(base64.b64decode(text), dtype)


def in_nats(text: str) -> Any:
    values = unpacked(text).astype(float)
    return np.where(values == MISSING, np.nan, values / 1000)


def collected(cache: cs.Cache, rollouts: int = 2000, page_bytes: int = 10**7, **more: Any) -> RolloutSet:
    found = rollout_set(cache.round(), SetRequest("round", "cache", rollouts, page_bytes, **more), Letters())
    assert found is not None and json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def tokens_of(found: RolloutSet) -> dict[int, slice]:
    """Where a rollout's tokens are, by its number."""
    return {row["number"]: slice(row["start"], row["start"] + row["length"]) for row in found["rows"]}


def every_token(cache: cs.Cache, teacher: str = "teacher") -> list[dict[str, Any]]:
    """The round token by token in float64, without any code of the report."""
    round_, found = cache.round(), []
    for block in np.flatnonzero(round_.scores(teacher).committed()).tolist():
        rollouts = round_.rollouts.read(block)
        student, other = (round_.scores(name).read(block) for name in ("student", teacher))
        kl = metrics.scores_reverse_kl(student, other)
        for row in range(rollouts.n_rows):
            prompt = int(rollouts.prompt_index[rollouts.row_prompt[row]])
            number = prompt * round_.manifest.rollouts_per_prompt + int(rollouts.sample_index[row])
            span = rollouts.response_slice(row)
            for position, t in enumerate(range(span.start, span.stop)):
                recorded = dict(
                    zip(student.candidate_ids[t].tolist(), other.candidate_logprobs[t].tolist(), strict=True)
                )
                rest = other.rest_logprob if other.topk_ids is None else other.topk_rest_logprob
                if other.topk_ids is not None:
                    recorded |= zip(other.topk_ids[t].tolist(), other.topk_logprobs[t].tolist(), strict=True)
                own = zip(student.candidate_ids[t].tolist(), student.candidate_logprobs[t].tolist(), strict=True)
                found.append(
                    {
                        "number": number,
                        "position": position,
                        "token": int(rollouts.token_ids[t]),
                        "trained": bool(rollouts.trained[t]),
                        "kl": float(kl[t]),
                        "student": float(student.logprobs[t]),
                        "teacher": float(other.logprobs[t]),
                        "own": dict(own),
                        "scored": recorded,
                        "rest": float(rest[t]),
                    }
                )
    return found


@pytest.fixture
def cache(tmp_path: Path) -> cs.Cache:
    return factory.filled(tmp_path / "c.zarr", n_prompts=10, topk=3)


# ------------------------------------------------------------------------------------------------------------ numbers


def test_every_number_comes_from_the_cache(cache: cs.Cache) -> None:
    found, known = collected(cache), every_token(cache)
    assert found["n_total"] == found["n_shown"] == len(found["rows"]) == 30 and found["left_out"] is None
    where, (reader,) = tokens_of(found), found["teachers"]
    at = [where[token["number"]].start + token["position"] for token in known]
    for text, key, sign in (
        (found["student"]["logprob"], "student", -1),
        (reader["logprob"], "teacher", -1),
        (reader["kl"], "kl", 1),
    ):
        expected = [max(0.0, sign * token[key]) for token in known]
        np.testing.assert_allclose(in_nats(text)[at], expected, atol=0.0005001)
    strings, tokens = found["strings"], unpacked(found["tokens"], "<u4")
    assert [strings[tokens[i]] for i in at] == [[t["token"], chr(97 + t["token"] % 26)] for t in known]
    for row in found["rows"]:
        kl = [token["kl"] for token in known if token["number"] == row["number"]]
        assert row["kl"]["teacher"] == pytest.approx(np.mean(kl), rel=1e-12)
        assert row["worst"]["teacher"] == pytest.approx(max(kl), rel=1e-12)
        assert (row["answer"], row["source"]) == (str(row["prompt_index"]), "test")
    assert found["totals"]["teacher"]["kl"] == pytest.approx(np.mean([token["kl"] for token in known]), rel=1e-12)
    worst = [row["worst"]["teacher"] for row in found["rows"]]
    assert worst == sorted(worst, reverse=True)


def test_mean_by_position_and_most_corrected_tokens(cache: cs.Cache) -> None:
    found, known = collected(cache), every_token(cache)
    bins = found["by_position"]["teacher"]
    assert bins["start"] == [0, 1, 2, 3, 4, 5, 6, 7, 8] and sum(bins["tokens"]) == len(known)
    for start, mean, count in zip(bins["start"], bins["kl"], bins["tokens"], strict=True):
        here = [token["kl"] for token in known if token["position"] == start]
        assert count == len(here) and mean == pytest.approx(np.mean(here), rel=1e-12)
    table = found["most_corrected"]["teacher"]
    assert [row["kl_sum"] for row in table] == sorted((row["kl_sum"] for row in table), reverse=True)
    for row in table:
        here = [token for token in known if token["token"] == row["id"]]
        assert row["count"] == len(here) and row["kl_sum"] == pytest.approx(sum(t["kl"] for t in here), rel=1e-12)
        assert row["share"] == pytest.approx(row["kl_sum"] / sum(t["kl"] for t in known))
        assert row["example"] == max(here, key=lambda t: t["kl"])["number"]
        by_preference: dict[int, float] = {}
        for token in here:
            best = max(token["scored"], key=token["scored"].get)
            if token["scored"][best] < token["rest"]:
                continue  # a token without a score may be likelier
            by_preference[best] = by_preference.get(best, 0.0) + token["kl"]
        best = max(by_preference, key=lambda wanted: by_preference[wanted], default=None)
        assert row["prefers"] == (None if best is None else Letters().decode([best]))


def test_bins_widen_with_the_position() -> None:
    assert read.bin_starts(33).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]


def test_candidates_are_what_the_models_scored(cache: cs.Cache) -> None:
    found, where = collected(cache), {}
    candidates, starts = found["candidates"], tokens_of(found)
    arrays = {name: unpacked(candidates[name], "<u4") for name in ("at", "start", "label")}
    student, (teacher,) = in_nats(candidates["student"]), map(in_nats, candidates["teachers"])
    for i, at in enumerate(arrays["at"].tolist()):
        where[at] = slice(arrays["start"][i], arrays["start"][i + 1])
    assert len(where) == len(unpacked(found["tokens"], "<u4")), "there is room for all"
    for token in every_token(cache):
        span = where[starts[token["number"]].start + token["position"]]
        ids = [token["token"], *(i for i in {**token["own"], **token["scored"]} if i != token["token"])]
        likely = [
            i
            for i in ids
            if i == ids[0] or max(token["own"].get(i, -99), token["scored"].get(i, -99)) >= np.log(0.001)
        ]
        shown = [found["labels"][label] for label in arrays["label"][span]]
        assert sorted(shown) == sorted(Letters().decode([i]) for i in likely)
        assert shown[0] == Letters().decode([token["token"]])
        for recorded, by in ((student[span], token["own"]), (teacher[span], token["scored"])):
            np.testing.assert_allclose(
                np.sort(recorded), np.sort([-by.get(i, np.nan) for i in likely]), atol=0.0005001
            )


def test_candidates_of_the_worst_tokens_where_room_is_short(cache: cs.Cache) -> None:
    everything = collected(cache)
    found = collected(cache, page_bytes=10_000)
    assert found["n_shown"] == 30 and "Candidates are there for the" in found["left_out"]
    at, kl = unpacked(found["candidates"]["at"], "<u4"), in_nats(found["teachers"][0]["kl"])
    assert 0 < len(at) < len(kl) and kl[at].min() >= np.delete(kl, at).max() - 0.001
    of_set = ("teachers", "student", "candidates", "tokens", "trained")
    assert sum(len(json.dumps(found[key])) for key in of_set) < 10_000
    assert found["teachers"] == everything["teachers"]


def test_untrained_and_unscored_tokens_count_nowhere(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c.zarr", n_prompts=8)
    round_, rng = cache.round(), np.random.default_rng(0)
    recorded: list[float] = []
    partial = round_.start_scores(
        "other", factory.scores_manifest("teacher", candidates=0, entropy=False, partial=True)
    )
    for block in range(2):
        rollouts = round_.rollouts.read(block)
        trained = rng.integers(0, 2, rollouts.n_tokens).astype(np.uint8)
        round_.rollouts.write(block, cs.RolloutBlock(**{**vars(rollouts), "trained": trained}))
        student = round_.scores("student").manifest
        scored = factory.score_block(student, rollouts, rng)
        round_.scores("student").write(block, scored)
        logprobs = np.where(rng.random(rollouts.n_tokens) < 0.5, np.nan, -1.0).astype(np.float32)
        partial.write(block, cs.ScoreBlock(logprobs))
        kl = metrics.scores_reverse_kl(scored, cs.ScoreBlock(logprobs))
        recorded += kl[(trained == 1) & ~np.isnan(logprobs)].tolist()
    found = collected(cache)
    other, teacher = found["teachers"]
    assert found["totals"] == {"other": {"kl": pytest.approx(np.mean(recorded)), "tokens": len(recorded)}}
    assert other["entropy"] is None and 0 < np.isnan(in_nats(other["kl"])).sum() < len(in_nats(other["kl"]))
    assert np.isnan(in_nats(teacher["kl"])).all(), "the teacher's candidates are no longer the student's"
    assert "teacher has not scored 2 of 2 blocks" in found["left_out"].lower()
    assert any(row["worst"]["teacher"] is None for row in found["rows"])


def test_the_most_that_a_page_can_hold() -> None:
    values = encode_nats([0.0, -1e-7, 1.2344, 65.6, np.inf, np.nan])
    assert values.tolist() == [0, 0, 1234, 65534, 65534, MISSING]


# ------------------------------------------------------------------------------------------------------------- choice


def made_up_scan(n: int, length: int = 10) -> read.RoundScan:
    """Rollouts with rising KL; every third is wrong; sources of very different size."""
    number = np.arange(n)
    kl = number / n
    right = np.where(number % 3 == 0, read.WRONG, read.RIGHT).astype(np.int8)
    source = np.where(number % 50 == 0, 1, 0)
    return read.RoundScan(
        reader=None,  # type: ignore[arg-type]
        blocks=number,
        total=n,
        number=number,
        length=np.full(n, length),
        worst={"teacher": kl},
        mean={"teacher": kl},
        right=right,
        source=source,
        sources=["big", "small"],
        sums={},
    )


def test_the_chosen_rollouts_are_not_only_the_worst() -> None:
    found, none = made_up_scan(1000), np.array([], np.int64)
    chosen = read.choose(found, 100, 10**9, none)
    assert len(chosen.rows) == len(set(chosen.rows.tolist())) == 100
    assert set(range(950, 1000)) <= set(chosen.rows.tolist())
    rest = chosen.rows[chosen.rows < 950]
    wrong = found.right[rest] == read.WRONG
    assert 25 <= wrong.sum() <= 40 and (~wrong).sum() >= 10
    assert 10 <= (found.source[rest] == 1).sum() <= 20, "a source of 20 among 1,000 is seen"
    assert all(((rest >= low) & (rest < low + 190)).sum() >= 5 for low in range(0, 950, 190)), "spread over the round"
    assert chosen.left_out == (
        "100 of 1,000 rollouts are shown: 50 with the highest reverse KL at a token, 25 more wrong answers, "
        "25 others spread evenly over the round and its 2 sources"
    )


def test_choice_keeps_to_the_tokens_and_takes_examples() -> None:
    found = made_up_scan(1000)
    chosen = read.choose(found, 500, 1000, np.array([3, 5]))
    assert 90 <= len(chosen.rows) <= 100 and {3, 5} <= set(chosen.rows.tolist())
    assert read.choose(found, 5000, 10**9, np.array([3])).left_out is None


def test_a_large_round_is_looked_at_in_evenly_spaced_blocks(cache: cs.Cache) -> None:
    found = read.scan_round(cache.round(), None, "test", at_most_tokens=1)
    assert len(found.blocks) == 1 and len(found.number) == 12


# -------------------------------------------------------------------------------------------------- unfinished things


def test_pages_of_unfinished_caches(tmp_path: Path, cache: cs.Cache, capsys: pytest.CaptureFixture[str]) -> None:
    cache.round().scores("teacher").uncommit(1)
    cache.round().rollouts.uncommit(2)
    found = collected(cache)
    assert found["n_total"] == 24 and "Teacher has not scored 1 of 2 blocks" in found["left_out"]
    assert "teacher has not scored 1 of 2 blocks" in capsys.readouterr().err
    assert sum(row["worst"]["teacher"] is None for row in found["rows"]) == 12
    assert found["totals"]["teacher"]["tokens"] == len(every_token(cache))

    empty = cs.create(tmp_path / "empty.zarr")
    assert stage.assemble([empty.url])["notes"] == [f"cache {empty.url} holds no rollouts yet"]
    records = factory.prompts(3)
    round_ = empty.start_round(factory.round_manifest(records), records)
    document = stage.assemble([empty.url])
    assert document["sets"] == [] and "no rollouts have been sampled" in document["notes"][0]
    round_.rollouts.write(0, factory.rollout_block(round_.manifest, 0, np.random.default_rng(0)))
    (unscored,) = stage.assemble([empty.url])["sets"]
    assert unscored["teachers"] == [] and unscored["n_shown"] == 9
    assert "The student has not scored its rollouts, so no token is marked" in unscored["left_out"]
    assert np.isnan(in_nats(unscored["student"]["logprob"])).all()
    assert [text[0] for _, text in unscored["strings"]] == ["<"] * len(unscored["strings"]), "ids without a tokenizer"


def test_a_teacher_scored_before_the_student(tmp_path: Path) -> None:
    cache, records = cs.create(tmp_path / "c.zarr"), factory.prompts(3)
    round_ = cache.start_round(factory.round_manifest(records), records)
    rollouts = factory.rollout_block(round_.manifest, 0, np.random.default_rng(0))
    round_.rollouts.write(0, rollouts)
    manifest = factory.scores_manifest("teacher", candidates=0, entropy=False, partial=True)
    round_.start_scores("teacher", manifest).write(0, cs.ScoreBlock(np.full(rollouts.n_tokens, -0.5, np.float32)))
    found = collected(cache)
    assert "no token is marked" in found["left_out"] and found["totals"] == {} and found["labels"] == []
    (reader,) = found["teachers"]
    assert (unpacked(reader["logprob"]) == 500).all() and (unpacked(reader["kl"]) == MISSING).all()
    assert unpacked(found["candidates"]["start"], "<u4").tolist() == [0]


def test_pieces_of_letters_made_of_several_tokens(toy_cache: Path) -> None:
    tokenizer = load_decoder(cs.open(toy_cache).round().manifest)
    found = StringTable(tokenizer)
    for text in ("12+3=", "\u00e9\U0001f600=1"):
        ids = list(text.encode())
        shown = [found.rows()[number] for number in found.add(ids).tolist()]
        assert shown == [list(pair) for pair in zip(ids, text_pieces(ids, tokenizer), strict=True)]
    assert [found.rows()[number] for number in found.add([255, 51]).tolist()] == [[255, "\ufffd"], [51, "3"]]


def test_rollouts_that_repeat_another_say_so(toy_cache: Path) -> None:
    found = collected(cs.open(toy_cache))
    texts = {
        row["number"]: unpacked(found["tokens"], "<u4")[tokens_of(found)[row["number"]]] for row in found["rows"]
    }
    first: dict[tuple[int, bytes], int] = {}
    for row in found["rows"]:
        earlier = first.setdefault((row["prompt_index"], texts[row["number"]].tobytes()), row["number"])
        assert row["same_as"] == (None if earlier == row["number"] else earlier)
    assert len(first) < len(found["rows"])


def test_right_and_wrong_by_the_recipe(toy_cache: Path) -> None:
    round_ = cs.open(toy_cache).round()
    compare = read.answer_check(round_.manifest, Checker.of(small_recipe().eval))
    found = rollout_set(round_, SetRequest("r", "cache", 20, 10**6, compare), load_decoder(round_.manifest))
    assert found is not None and found["answers"]["known"] == 96 and len(found["rows"]) == 20
    tokens = unpacked(found["tokens"], "<u4")
    for row in found["rows"]:
        said = "".join(found["strings"][i][1] for i in tokens[tokens_of(found)[row["number"]]])
        assert row["right"] == (said.removesuffix("<|endoftext|>").rpartition("=")[2] == row["answer"])
        assert row["prompt"] == json.loads(json.dumps(round_.prompts[row["prompt_index"]]["prompt"]))
    assert collected(cs.open(toy_cache))["answers"] is None


# --------------------------------------------------------------------------------------------------------------- runs


def make_run(path: Path, cache: Path | None) -> Path:
    path.mkdir()
    (path / "recipe.toml").write_text(small_recipe().to_toml())
    ended = {"step": 5, "sentence": "done", "exit_code": 0}
    recorded = {"cache": {"url": str(cache), "round": 0, "teacher": "teacher"} if cache else {}, "result": ended}
    (path / "run.json").write_text(json.dumps(recorded))
    return path


def write_reread(run: Path, round_: cs.Round, numbers: Sequence[int], **changes: str) -> dict[int, Any]:
    """Scores of some rollouts by a trained student, by rollout."""
    rng, rollouts = np.random.default_rng(5), round_.rollouts.read(0)
    own = round_.scores("student").read(0)
    scores = factory.score_block(round_.scores("student").manifest, rollouts, rng, own.candidate_ids)
    spans = [rollouts.response_slice(number) for number in numbers]
    tokens = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    length = np.array([span.stop - span.start for span in spans])
    arrays = {name: getattr(scores, name)[tokens] for name in ("logprobs", "entropy", "rest_logprob")}
    arrays["candidate_logprobs"] = scores.candidate_logprobs[tokens]
    arrays |= {"numbers": np.array(numbers), "length": length, "start": np.cumsum(length) - length}
    identity = {key: str(value) for key, value in cache_identity("elsewhere", round_, ["teacher"]).items()}
    save_file(arrays, run / "reread.safetensors", identity | changes)
    kl = metrics.scores_reverse_kl(cs.ScoreBlock(**vars(scores)), round_.scores("teacher").read(0))
    return {number: kl[span] for number, span in zip(numbers, spans, strict=True)}


def test_the_same_rollout_after_training(tmp_path: Path, cache: cs.Cache, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", cache.path)
    kl_of = write_reread(run, cache.round(), [2, 7])
    stale = make_run(tmp_path / "b", cache.path)
    write_reread(stale, cache.round(), [1], **{"student digest": "another"})
    for name in "cd":
        write_reread(make_run(tmp_path / name, cache.path), cache.round(), [1])
    arrays = load_file(tmp_path / "c/reread.safetensors")
    save_file(arrays | {"length": arrays["length"] + 1000}, tmp_path / "c/reread.safetensors")
    record = read_record(tmp_path / "d")
    assert record is not None
    write_record(tmp_path / "d", record.model_copy(update={"files": {"reread.safetensors": "0" * 32}}))
    document = stage.assemble([str(run), str(stale), *(str(tmp_path / name) for name in "cd")])
    (found,) = document["sets"]
    (after,) = found["after"]
    assert after["run"] == str(run) and len(document["runs"]) == 4
    kl, expected = in_nats(after["kl"]["teacher"]), np.full(len(in_nats(after["logprob"])), np.nan)
    for number, span in tokens_of(found).items():
        if number in kl_of:
            expected[span] = kl_of[number]
    np.testing.assert_allclose(kl, expected, atol=0.0005001)
    note, beyond, damaged, unknown = document["notes"]
    assert "beyond its tokens" in beyond and "digest" in damaged
    assert "tokenizer student was not on the machine" in unknown
    assert "reread.safetensors is left out" in note and "student digest" in note and str(stale) in note


def test_held_out_sets_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a", tmp_path / "gone.zarr")
    kept = factory.filled(run / "eval.zarr", n_prompts=10)
    records, rng = factory.prompts(10), np.random.default_rng(9)
    after = kept.start_round(factory.round_manifest(records, seed=1), records, 1)
    for block in range(3):
        after.rollouts.write(block, factory.rollout_block(after.manifest, block, rng))
    document = stage.assemble([str(run)])
    assert len(document["notes"]) == 2 and "gone.zarr" in document["notes"][0]
    assert [(s["kind"], s["pair"], s["phase"], s["n_shown"]) for s in document["sets"]] == [
        ("heldout", str(run), "before", 30),
        ("heldout", str(run), "after", 30),
    ]
    before, after_set = stage.assemble([str(run)], rollouts=8)["sets"]
    numbers = [{row["number"] for row in found["rows"]} for found in (before, after_set)]
    assert numbers[0] == numbers[1] and 3 <= len(numbers[0]) <= 8
    assert "chosen before or after training" in before["left_out"]
    overwrite_with_zeros(run / "eval.zarr/rounds/00001/rollouts/token_ids/c")
    document = stage.assemble([str(run)])
    assert document["sets"] == [] and f"held-out rollouts of {run} are not shown" in document["notes"][-1]


def test_what_cannot_be_written_or_shown_is_refused_first(
    tmp_path: Path, cache: cs.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"-o .*cannot be written"):
        stage.run([cache.url], tmp_path / "page.html")
    run = make_run(tmp_path / "a", None)
    with pytest.raises(ConfigError, match="--round 0: there is no cache"):
        stage.assemble([str(run)], round_index=0)


def test_targets(tmp_path: Path, cache: cs.Cache) -> None:
    other = factory.filled(tmp_path / "d.zarr", n_prompts=2)
    with pytest.raises(ConfigError, match=r"expected one cache at most, got .*c\.zarr and .*d\.zarr"):
        stage.assemble([cache.url, other.url])
    with pytest.raises(RedpenError, match="expected a run of `redpen train` or a cache"):
        stage.assemble([cache.url, str(tmp_path / "nothing")])
    with pytest.raises(cs.CacheError, match="there is no round 4"):
        stage.assemble([cache.url], round_index=4)
    run, elsewhere = make_run(tmp_path / "a", cache.path), make_run(tmp_path / "b", other.path)
    document = stage.assemble([str(run), str(elsewhere)])
    assert document["cache"]["cache"] == cache.url
    assert f"{elsewhere} learned from {other.path}, round 0, which is not shown" in document["notes"]
    document = stage.assemble([str(run), other.url])
    assert document["cache"]["cache"] == other.url and document["sets"][0]["n_total"] == 6
    assert document["title"] == f"d.zarr, {run}"
    (run / "recipe.toml").write_text("[student]\nmodel = 3\n")
    notes = stage.assemble([str(run), other.url])["notes"]
    assert any(note.startswith("answers are not checked: ") for note in notes)
    facts = dict(document["sets"][0]["provenance"])
    assert facts["student"] == f"student, digest {'s' * 16}" and facts["teacher: blocks"] == "1 of 1"


def test_command(tmp_path: Path, cache: cs.Cache, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / name, cache.path)) for name in "ab"]
    page = tmp_path / "page.html"
    assert cli.main(["report", *runs, "-o", str(page), "--rollouts", "5"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"{page}: {page.stat().st_size / 1e6:.1f} MB; open it in a browser"
    assert runs[0] in said and runs[1] in said, "the table"
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c.zarr", "page.html"]
    assert cli.main(["report", runs[0], "-o", str(tmp_path / "no" / "page.html")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    for kept in (tmp_path / "a" / "run.json", tmp_path / "c.zarr" / "zarr.json"):
        before = kept.read_bytes()
        assert cli.main(["report", runs[0], "-o", str(kept)]) == 1
        assert f"{kept}: exists and is not a page" in capsys.readouterr().err and kept.read_bytes() == before
    assert cli.main(["report", runs[0], "-o", str(page), "--rollouts", "5"]) == 0, "a page is replaced by the next"


# ---------------------------------------------------------------------------------------------------------------- toy


def test_the_most_corrected_position_is_the_dropped_carry(tmp_path: Path) -> None:
    """A carry is dropped where a digit of the final sum is what it would be without the carry into its column.

    One sum may drop several, each a reason for the red pen; where the sum is too short as well, the place is its
    first digit that differs. A top position counts from 1 nat on, in wrong and right answers alike. In a right answer
    it is taken for a dropped carry if it lies in the sum and the teacher wants another token than the one that is
    there: a student that would have dropped the carry, but was lucky, is marked without being wrong.
    """
    cache = make_cache(tmp_path / "toy.zarr", small_recipe("prompts.limit=128", "rollouts.prompts_per_block=64"))
    (found,) = stage.assemble([str(cache)], recipe="toy")["sets"]
    kl, tokens = in_nats(found["teachers"][0]["kl"]), unpacked(found["tokens"], "<u4")
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for row in found["rows"]:
        span = tokens_of(found)[row["number"]]
        texts = [found["strings"][i][1] for i in tokens[span]]
        top = int(kl[span].argmax())
        equals = len(texts) - 1 - texts[::-1].index("=")
        said = "".join(texts[equals + 1 :]).removesuffix("<|endoftext|>")
        strong, place = kl[span][top] >= 1, top - equals - 1
        if row["right"]:
            wanted = 0 <= place < len(said) and preferred_at(found, span.start + top) != texts[top]
            hits[True].append(strong and wanted)
        else:
            hits[False].append(strong and place in dropped_carries(row["prompt"], said, row["answer"]))
    assert len(hits[False]) > 150 and len(hits[True]) > 150
    assert np.mean(hits[False]) >= 0.9
    assert np.mean(hits[True]) < 0.05


def preferred_at(found: RolloutSet, at: int) -> str:
    """What the teacher prefers at a token, by the page's candidates."""
    candidates = found["candidates"]
    place = unpacked(candidates["at"], "<u4").tolist().index(at)
    first, end = unpacked(candidates["start"], "<u4")[place : place + 2]
    best = first + int(np.nanargmin(in_nats(candidates["teachers"][0])[first:end]))
    return str(found["labels"][unpacked(candidates["label"], "<u4")[best]])


def dropped_carries(prompt: str, said: str, right: str) -> set[int]:
    """Places in `said`, the sum that a response gives, at which a carry was dropped."""
    problem = Problem.parse(prompt)
    without = str(add_without_carry(problem.addend, problem.left * problem.right)).zfill(len(right))
    differing = [place for place, (a, b) in enumerate(zip(said, right, strict=False)) if a != b]
    if len(said) != len(right):
        return set(differing[:1])
    return {place for place in differing if said[place] == without[place]}
