"""The cache: round trips, commits and links, provenance, damage, locks, full and read-only disks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore, MemoryStore

import cache_schema as cs
from helpers import cache_factory as factory

SETTINGS = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


def assert_same_record(a: object, b: object) -> None:
    for field in dataclasses.fields(a):  # type: ignore[arg-type]
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


@SETTINGS
@given(
    seed=st.integers(0, 2**32 - 1),
    n_prompts=st.integers(1, 9),
    prompts_per_block=st.integers(1, 5),
    rollouts_per_prompt=st.integers(1, 4),
    topk=st.integers(0, 5),
)
def test_round_trip(seed: int, n_prompts: int, prompts_per_block: int, rollouts_per_prompt: int, topk: int) -> None:
    rng = np.random.default_rng(seed)
    store = MemoryStore()
    cache = cs.create(store)
    records = factory.prompts(n_prompts)
    manifest = factory.round_manifest(
        records, prompts_per_block=prompts_per_block, rollouts_per_prompt=rollouts_per_prompt
    )
    round_ = cache.start_round(manifest, records)
    student = round_.start_scores("student", factory.scores_manifest("student"))
    teacher = round_.start_scores("teacher", factory.scores_manifest("teacher", topk=topk))
    written = []
    for block in rng.permutation(round_.n_blocks):
        rollouts = factory.rollout_block(manifest, int(block), rng)
        round_.rollouts.write(int(block), rollouts)
        student_scores = factory.score_block(student.manifest, rollouts, rng)
        student.write(int(block), student_scores)
        teacher_scores = factory.score_block(teacher.manifest, rollouts, rng, student_scores.candidate_ids)
        teacher.write(int(block), teacher_scores)
        written.append((int(block), rollouts, student_scores, teacher_scores))

    again = cs.open(store).round()
    assert again.manifest == manifest
    assert [again.prompts[i] for i in range(len(again.prompts))] == records
    for block, rollouts, student_scores, teacher_scores in written:
        assert_same_record(again.rollouts.read(block), rollouts)
        assert_same_record(again.scores("student").read(block), student_scores)
        assert_same_record(again.scores("teacher").read(block), teacher_scores)
    assert again.scores("teacher").committed().all()
    assert list(cs.verify(cs.open(store))) == []


@pytest.mark.parametrize("tokens", [1, 8_192, 8_193, 65_536, 65_537, 300_000])
def test_slots_are_divided_by_their_inner_chunks(tokens: int) -> None:
    from cache_schema.arrays import INNER_CHUNK, WIDE_INNER_CHUNK, slot_size

    slot = slot_size(tokens)
    assert slot >= tokens
    assert slot % min(slot, INNER_CHUNK) == 0 and slot % min(slot, WIDE_INNER_CHUNK) == 0


def test_opens_in_xarray_with_named_dimensions(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    cache = factory.filled(tmp_path / "c")
    data = xarray.open_zarr(tmp_path / "c", group="rounds/00000/scores/teacher", consolidated=False)
    assert data.candidate_logprobs.dims == ("block", "token", "candidate")
    assert data.logprobs.attrs["unit"] == "nat"
    used = cache.round().rollouts.read(0).n_tokens
    assert bool(np.isfinite(data.logprobs[0, :used]).all()) and bool(np.isnan(data.logprobs[0, used:]).all())


def test_any_zarr_reader_sees_the_documented_layout(tmp_path: Path) -> None:
    factory.filled(tmp_path / "c", topk=2)
    root = zarr.open_group(tmp_path / "c", mode="r")
    assert root.attrs["redpen"]["version"] == cs.VERSION  # type: ignore[index]
    for path, specs in (
        ("rollouts", cs.ROLLOUT_ARRAYS),
        ("scores/student", cs.STUDENT_ARRAYS),
        ("scores/teacher", cs.teacher_arrays(topk=True)),
    ):
        group = root[f"rounds/00000/{path}"]
        assert isinstance(group, zarr.Group)
        assert set(group.array_keys()) == {spec.name for spec in specs} | {"commit"}
        for spec in specs:
            array = group[spec.name]
            assert isinstance(array, zarr.Array)
            assert array.dtype == np.dtype(spec.dtype) and array.metadata.dimension_names == spec.dimension_names
            np.testing.assert_equal(np.asarray(array.fill_value), np.asarray(spec.fill, spec.dtype))


def test_commits_are_as_specified(tmp_path: Path) -> None:
    """Every field of every block, from the stored numbers alone; digests are XXH3 with 128 bits in two numbers."""
    round_ = factory.filled(tmp_path / "c", topk=2).round()
    root = zarr.open_group(tmp_path / "c", mode="r")
    for name, group in (("rollouts", round_.rollouts), ("scores/teacher", round_.scores("teacher"))):
        stored: Any = root[f"rounds/00000/{name}/commit"]
        names = [field.removesuffix(":high") for field in stored.attrs["fields"]]
        for block in range(round_.n_blocks):
            halves: dict[str, list[int]] = {}
            for field, number in zip(names, stored[block].tolist(), strict=True):
                halves.setdefault(field, []).append(number)
            values = {field: sum(half << (64 * i) for i, half in enumerate(each)) for field, each in halves.items()}
            record = group.read(block)
            digests = [xxhash.xxh3_128_intdigest(getattr(record, spec.name).tobytes()) for spec in group.specs]
            assert [values[f"digest.{spec.name}"] for spec in group.specs] == digests
            counts = [values[field] for field in ("rows", "prompts", "tokens", "prompt_tokens")]
            data = np.array(counts, "<u8").tobytes() + b"".join(number.to_bytes(16, "little") for number in digests)
            assert values["digest"] == xxhash.xxh3_128_intdigest(data) == group.digests()[block] > 2**64
            assert values["rollouts_digest"] == (0 if name == "rollouts" else round_.rollouts.digests()[block])


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_than_that_of_the_commits_is_damage(tmp_path: Path, version: int) -> None:
    factory.filled(tmp_path / "c")
    header = tmp_path / "c/zarr.json"
    header.write_text(header.read_text().replace('"version": 2', f'"version": {version}'))
    with pytest.raises(cs.CacheError, match=r"version|commit"):
        cs.open(tmp_path / "c").round().rollouts.commits()


def test_reading_ahead_keeps_the_order(tmp_path: Path) -> None:
    groups = [factory.filled(tmp_path / "c").round().rollouts]
    running, most, ended = [0], [0], []
    lock = threading.Lock()

    def read(block: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002 * (block % 3))
        with lock:
            running[0] -= 1
            ended.append(block)
        if block == 50:
            raise cs.CacheError("fifty")
        return block

    assert list(cs.read_ahead(read, range(40), groups, at_once=4)) == list(range(40))
    assert 1 < most[0] <= 4 and groups[0].is_near
    assert list(cs.read_ahead(read, range(5), groups)) == list(range(5)) and ended[-5:] == list(range(5))
    ended.clear()
    with pytest.raises(cs.CacheError, match="fifty"):
        list(cs.read_ahead(read, range(45, 1000), groups, at_once=4))
    assert max(ended) < 60 and not running[0]
    ended.clear()
    for block in cs.read_ahead(read, range(1000, 2000), groups, at_once=4):
        if block == 1003:
            break
    assert max(ended) < 1012


def test_uncommitted_blocks_are_not_readable(tmp_path: Path) -> None:
    records = factory.prompts(10)
    round_ = cs.create(tmp_path / "c").start_round(factory.round_manifest(records), records)
    round_.rollouts.write(1, factory.rollout_block(round_.manifest, 1, np.random.default_rng(0)))
    assert round_.rollouts.committed().tolist() == [False, True, False]
    with pytest.raises(cs.UncommittedError, match=r"block 0: not written yet"):
        round_.rollouts.read(0)


def test_resampled_rollouts_unscore_the_block(tmp_path: Path) -> None:
    round_ = factory.filled(tmp_path / "c").round()
    original = round_.rollouts.read(1)
    round_.rollouts.write(1, factory.rollout_block(round_.manifest, 1, np.random.default_rng(99)))
    for name in ("student", "teacher"):
        assert round_.scores(name).committed().tolist() == [True, False, True]
        with pytest.raises(cs.UncommittedError, match=r"rollouts have changed|student's scores"):
            round_.scores(name).read(1)
    round_.rollouts.write(1, original)  # the same rollouts again: their scores hold again
    assert round_.scores("teacher").committed().all()


def test_new_candidates_unscore_the_teacher(tmp_path: Path) -> None:
    round_ = factory.filled(tmp_path / "c").round()
    student = round_.scores("student")
    student.write(2, factory.score_block(student.manifest, round_.rollouts.read(2), np.random.default_rng(5)))
    assert student.committed().all()
    assert round_.scores("teacher").committed().tolist() == [True, True, False]
    with pytest.raises(cs.UncommittedError, match="candidates have changed"):
        round_.scores("teacher").read(2)


def shard(cache: cs.Cache, array: str, block: int) -> Path:
    assert cache.path is not None
    directory = cache.path / "rounds/00000" / array / "c" / str(block)
    return next(path for path in directory.rglob("*") if path.is_file())


def test_missing_shard_is_noticed(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c")
    shard(cache, "scores/teacher/logprobs", 1).unlink()
    with pytest.raises(cs.CorruptBlockError, match=r"block 1, array logprobs: its shard is missing"):
        cache.round().scores("teacher").read(1)
    assert [(f.group, f.block, f.array) for f in cs.verify(cache)] == [("scores/teacher", 1, "logprobs")]


def test_two_writers_of_one_block_are_noticed(tmp_path: Path) -> None:
    ours, theirs = factory.filled(tmp_path / "a", seed=1), factory.filled(tmp_path / "b", seed=2)
    # Both finish block 0; their renames interleave, so one's array ends under the other's commit.
    shutil.copy(shard(theirs, "rollouts/rollout_logprobs", 0), shard(ours, "rollouts/rollout_logprobs", 0))
    with pytest.raises(cs.CorruptBlockError, match="block 0, array rollout_logprobs"):
        ours.round().rollouts.read(0)


def chunk_files(cache: cs.Cache) -> list[tuple[str, str, int, Path]]:
    """(group, array, block, file) of every chunk of the block arrays."""
    assert cache.path is not None
    base = cache.path / "rounds/00000"
    found = []
    for path in sorted(base.rglob("*")):
        parts = path.relative_to(base).parts
        if path.is_file() and "c" in parts and "prompts" not in parts:
            at = parts.index("c")
            found.append(("/".join(parts[: at - 1]), parts[at - 1], int(parts[at + 1]), path))
    return found


def test_every_flipped_byte_is_reported(tmp_path: Path) -> None:
    """A random byte of each chunk: the reader and `verify` name its block and array, and no other block."""
    rng = np.random.default_rng(0)
    cache = factory.filled(tmp_path / "c", n_prompts=5, topk=3)
    damage: dict[str, list[tuple[str, int, Path, bytes, bytes]]] = {}
    for group, array, block, path in chunk_files(cache):
        data = path.read_bytes()
        at = int(rng.integers(len(data)))
        bad = data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]
        damage.setdefault(array, []).append((group, block, path, data, bad))
        path.write_bytes(bad)
        round_ = cs.open(tmp_path / "c").round()
        owner = round_.rollouts if group == "rollouts" else round_.scores(group.removeprefix("scores/"))
        with pytest.raises(cs.CorruptBlockError) as caught:
            owner.read(block)
        assert (caught.value.block, caught.value.array) == (block, array)
        path.write_bytes(data)
    for array, chunks in damage.items():  # of every group and block that has the array
        for _, _, path, _, bad in chunks:
            path.write_bytes(bad)
        findings = [(f.group, f.block, f.array) for f in cs.verify(cs.open(tmp_path / "c"))]
        expected = {(group, block) for group, block, *_ in chunks}
        assert {(group, block, array) for group, block in expected} <= set(findings)
        assert {(group, block) for group, block, _ in findings} == expected
        for _, _, path, data, _ in chunks:
            path.write_bytes(data)
    assert list(cs.verify(cs.open(tmp_path / "c"))) == []


@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_truncated_shard_is_reported_and_repaired(tmp_path: Path, keep: float) -> None:
    cache = factory.filled(tmp_path / "c")
    path = shard(cache, "scores/student/candidate_logprobs", 2)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    findings = list(cs.verify(cache))
    assert {(f.group, f.block, f.array) for f in findings} == {("scores/student", 2, "candidate_logprobs")}
    good = factory.score_block(
        cache.round().scores("student").manifest, cache.round().rollouts.read(2), np.random.default_rng(3)
    )
    assert cs.repair(cache, findings) == 1
    assert cache.round().scores("student").committed().tolist() == [True, True, False]
    assert list(cs.verify(cache)) == []
    cache.round().scores("student").write(2, good)  # over what is left of the bad shard
    assert_same_record(cache.round().scores("student").read(2), good)


def test_truncated_commit_is_reported_and_repaired(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c")
    path = shard(cache, "rollouts/commit", 1)
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(cs.CorruptBlockError, match="block 1, array commit"):
        cache.round().rollouts.committed()
    findings = list(cs.verify(cache))
    assert {(f.group, f.block, f.array) for f in findings} == {("rollouts", 1, "commit")}
    cs.repair(cache, findings)
    assert cache.round().rollouts.committed().tolist() == [True, False, True]


@pytest.mark.parametrize("manifest", [factory.round_manifest(factory.prompts(2)), factory.scores_manifest()])
def test_a_manifest_says_which_field_is_of_another_type(manifest: Any) -> None:
    written = json.loads(json.dumps(manifest.to_json()))
    assert type(manifest).from_json(written, "here") == manifest
    for name, value in written.items():
        for wrong in [["x"], *(["1"] if isinstance(value, int | float) else [])]:
            with pytest.raises(cs.CacheError, match=rf"^here: attribute redpen\.{name}.*expected"):
                type(manifest).from_json(written | {name: wrong}, "here")
    with pytest.raises(cs.CacheError, match=r"attribute redpen\.tokenizer\.vocab_size: expected int, found big"):
        type(manifest).from_json(written | {"tokenizer": written["tokenizer"] | {"vocab_size": "big"}}, "here")


@pytest.mark.parametrize(
    "damaged",
    [
        "zarr.json",
        "rollouts/zarr.json",
        "rollouts/commit/zarr.json",
        "rollouts/token_ids/zarr.json",
        "scores/zarr.json",
        "scores/teacher/zarr.json",
        "scores/teacher/logprobs/zarr.json",
    ],
)
@pytest.mark.parametrize("keep", [0, 20])
def test_damaged_metadata_is_one_line_and_no_block_is_taken_back(tmp_path: Path, damaged: str, keep: int) -> None:
    cache = factory.filled(tmp_path / "c")
    path = tmp_path / "c/rounds/00000" / damaged
    path.write_text(path.read_text()[:keep])

    def everything() -> None:
        again = cs.open(tmp_path / "c")
        again.round().rollouts.read(0)
        again.round().scores("teacher").read(0)

    with pytest.raises(cs.CacheError, match="metadata") as caught:
        everything()
    assert "\n" not in str(caught.value) and "restore the cache" in str(caught.value)
    try:
        findings = list(cs.verify(cs.open(tmp_path / "c")))
    except cs.CacheError:
        return  # so damaged that there is nothing to walk through
    assert findings and all(finding.block is None for finding in findings)
    assert cs.repair(cache, findings) == 0


def test_a_round_whose_metadata_is_gone_is_not_sampled_over(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c")
    (tmp_path / "c/rounds/00000/zarr.json").unlink()
    assert ["metadata is missing" in finding.problem for finding in cs.verify(cache)] == [True]
    records = factory.prompts(10)
    with pytest.raises(cs.CacheError, match=r"rounds/00000/zarr\.json.*metadata is missing"):
        cache.start_round(factory.round_manifest(records), records)


def test_what_lost_its_metadata_is_not_left_out(tmp_path: Path) -> None:
    """Readers that list rounds or scorers would go on with fewer, without a word."""
    cache = factory.filled(tmp_path / "c", n_prompts=4)
    (tmp_path / "c/rounds/00000/scores/teacher/zarr.json").unlink()
    with pytest.raises(cs.CacheError, match=r"scores/teacher/zarr\.json.*metadata is missing"):
        cache.round().teacher_names()
    (tmp_path / "c/rounds/00000/zarr.json").unlink()
    with pytest.raises(cs.CacheError, match=r"rounds/00000/zarr\.json.*metadata is missing"):
        cache.round_indices()


BAD_ROLLOUTS = {
    "token_ids": (lambda b: {"token_ids": b.token_ids + factory.VOCAB}, "token ids must be in"),
    "rollout_logprobs": (lambda b: {"rollout_logprobs": -b.rollout_logprobs}, "at most 0"),
    "response_length": (lambda b: {"response_length": b.response_length + 1}, "add up"),
    "finish_reason": (lambda b: {"finish_reason": b.finish_reason * 0, "token_ids": b.token_ids * 0}, "stop token"),
    "sample_index": (lambda b: {"sample_index": b.sample_index * 0}, "none twice"),
    "prompt_index": (lambda b: {"prompt_index": b.prompt_index + 1}, "must hold the prompts"),
    "trained": (lambda b: {"trained": b.trained + 1}, "0 or 1"),
    "row_prompt": (lambda b: {"row_prompt": b.row_prompt.astype(np.int64)}, "int32 array"),
}


@pytest.mark.parametrize("array", BAD_ROLLOUTS)
def test_writer_refuses_rollouts_that_mean_nothing(tmp_path: Path, array: str) -> None:
    change, problem = BAD_ROLLOUTS[array]
    round_ = factory.filled(tmp_path / "c").round()
    good = round_.rollouts.read(0)
    with pytest.raises(cs.CacheError, match=f"array {array}: .*{problem}"):
        round_.rollouts.write(0, dataclasses.replace(good, **change(good)))
    assert round_.rollouts.committed().all()


BAD_SCORES = {
    "logprobs": (lambda s: {"logprobs": s.logprobs * np.nan}, "finite"),
    "entropy": (lambda s: {"entropy": s.entropy - 100}, "at least 0"),
    "candidate_ids": (lambda s: {"candidate_ids": s.candidate_ids[:, ::-1].copy()}, "first candidate"),
    "rest_logprob": (lambda s: {"rest_logprob": s.rest_logprob * 0}, "probability 1"),
    "sampling_logprobs": (lambda s: {"sampling_logprobs": None}, "is missing"),
    "topk_ids": (lambda s: {"topk_ids": s.candidate_ids}, "does not belong"),
    "candidate_logprobs": (lambda s: {"candidate_logprobs": s.candidate_logprobs[1:]}, "shape"),
}


@pytest.mark.parametrize("array", BAD_SCORES)
def test_writer_refuses_scores_that_mean_nothing(tmp_path: Path, array: str) -> None:
    change, problem = BAD_SCORES[array]
    student = factory.filled(tmp_path / "c").round().scores("student")
    good = student.read(0)
    with pytest.raises(cs.CacheError, match=f"array {array}: .*{problem}"):
        student.write(0, dataclasses.replace(good, **change(good)))


def test_verify_checks_meaning_beyond_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = factory.filled(tmp_path / "c")
    round_ = cache.round()
    bad = dataclasses.replace(round_.rollouts.read(0), token_ids=round_.rollouts.read(0).token_ids + factory.VOCAB)
    monkeypatch.setattr(cs.RolloutBlock, "validate", lambda *_: None)  # a writer of another language, say
    round_.rollouts.write(0, bad)
    monkeypatch.undo()
    assert [(f.group, f.block, f.array) for f in cs.verify(cache)] == [("rollouts", 0, "token_ids")]


def test_provenance_differences_are_listed(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c")
    records = factory.prompts(10)
    same = factory.round_manifest(records, created_by="another release")
    assert cache.start_round(same, records).index == 0
    other = factory.round_manifest(
        records, temperature=0.3, student=cs.ModelIdentity("other", None, "x" * 16, adapter_digest="y")
    )
    with pytest.raises(cs.ProvenanceError) as caught:
        cache.start_round(other, records)
    for part in ("student.digest", "student.adapter_digest", "temperature: cached 1.0, now 0.3", "--round 1"):
        assert part in str(caught.value)
    assert cache.start_round(other, records, index=1).index == 1
    assert cache.round_indices() == [0, 1]
    with pytest.raises(cs.ProvenanceError, match="dtype: cached float32, now bfloat16"):
        cache.round(0).start_scores("teacher", factory.scores_manifest("teacher", dtype="bfloat16"))
    with pytest.raises(cs.ProvenanceError, match=r"expected candidates 4.*got 5"):
        cache.round(0).start_scores("second", factory.scores_manifest("teacher", candidates=5))


def test_a_round_or_scores_without_a_block_are_made_anew(tmp_path: Path) -> None:
    """A wrong setting that was stopped before its first block does not stand in the way of the right one."""
    cache, records = cs.create(tmp_path / "c"), factory.prompts(10)
    cache.start_round(factory.round_manifest(records, temperature=0.3), records)
    round_ = cache.start_round(factory.round_manifest(records, prompts_per_block=2), records)
    assert (round_.index, round_.manifest.temperature, round_.n_blocks) == (0, 1.0, 5)
    round_.start_scores("student", factory.scores_manifest("student", candidates=9))
    assert round_.start_scores("student", factory.scores_manifest("student")).manifest == factory.scores_manifest()


def test_scores_keep_a_round_without_rollouts_from_being_made_anew(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c", n_prompts=4)
    cache.round().rollouts.uncommit(0)
    records = factory.prompts(4)
    with pytest.raises(cs.ProvenanceError, match="temperature"):
        cache.start_round(factory.round_manifest(records, temperature=0.3), records)
    (tmp_path / "c/rounds/00000/scores/teacher/zarr.json").unlink()
    with pytest.raises(cs.CacheError, match=r"scores/teacher/zarr\.json.*metadata is missing"):
        cache.round().start_scores("teacher", factory.scores_manifest("teacher"))


def test_one_lock_however_the_path_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = factory.filled(tmp_path / "c", n_prompts=4)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    monkeypatch.chdir(tmp_path / "c")
    with cache.lock("redpen score"):
        for other in (tmp_path / "link", Path(".")):
            with pytest.raises(cs.CacheLockedError), cs.open(other, writable=True).lock("redpen score"):
                pass


def test_half_created_round_is_created_again(tmp_path: Path) -> None:
    """A kill between the first array of a round and its attributes leaves no round behind."""
    cache = cs.create(tmp_path / "c")
    zarr.open_group(tmp_path / "c", mode="r+").create_group("rounds/00000/rollouts")
    assert cache.round_indices() == []
    records = factory.prompts(3)
    assert cache.start_round(factory.round_manifest(records), records).index == 0


def test_a_directory_may_be_called_like_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cs.create("s3").path == Path("s3")


def test_location_errors(tmp_path: Path) -> None:
    with pytest.raises(cs.NotACacheError, match="nothing is there"):
        cs.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(cs.NotACacheError, match="expected a directory, found a file"):
        cs.create(tmp_path / "file")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/notes.txt").write_text("x")
    with pytest.raises(cs.NotACacheError, match="not a redpen cache"):
        cs.create(tmp_path / "dir")
    zarr.create_group(LocalStore(tmp_path / "other"))
    with pytest.raises(cs.NotACacheError, match="not a redpen cache"):
        cs.open(tmp_path / "other")
    cs.create(tmp_path / "c")
    with pytest.raises(cs.CacheError, match="holds no rollouts yet"):
        cs.open(tmp_path / "c").round()
    metadata = json.loads((tmp_path / "c/zarr.json").read_text())
    metadata["attributes"]["redpen"]["version"] = 3
    (tmp_path / "c/zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(cs.FormatVersionError, match=r"version 2 at most, found 3"):
        cs.open(tmp_path / "c")
    (tmp_path / "c/zarr.json").write_text("{")
    with pytest.raises(cs.NotACacheError, match="unreadable metadata"):
        cs.open(tmp_path / "c")
    with pytest.raises(cs.StorageError, match="gopher:// is not supported"):
        cs.open("gopher://host/c")


def test_lock_names_its_holder_and_ends_with_its_process(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c")
    code = (
        "import cache_schema as cs, sys, time\n"
        f"with cs.open({str(tmp_path / 'c')!r}, writable=True).lock('redpen score toy'):\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(cs.CacheLockedError, match=f"redpen score toy.*process {other.pid}"),
            cache.lock("redpen rollouts toy"),
        ):
            pass
        partial = tmp_path / "c/rounds/left-by-a-killed-writer.partial"
        partial.write_bytes(b"x")
        other.kill()
    with cache.lock("redpen rollouts toy"):
        assert not partial.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of 1 MB, where the machine lets us mount one."""
    target = tmp_path / "disk"
    target.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", target], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield target
    subprocess.run(["umount", target], check=True)


def test_full_disk_loses_no_committed_block(small_disk: Path) -> None:
    records = factory.prompts(400)
    manifest = factory.round_manifest(
        records, prompts_per_block=40, rollouts_per_prompt=8, max_response_tokens=60, max_prompt_tokens=60
    )
    round_ = cs.create(small_disk / "c").start_round(manifest, records)
    rng = np.random.default_rng(0)
    with pytest.raises(cs.StorageError, match=r"rollouts: cannot write block \d+.*disk is full; free some space"):
        for block in range(round_.n_blocks):
            round_.rollouts.write(block, factory.rollout_block(manifest, block, rng))
    again = cs.open(small_disk / "c").round().rollouts
    done = np.flatnonzero(again.committed())
    assert 1 <= len(done) < round_.n_blocks
    for block in done:
        again.read(int(block))
    assert list(cs.verify(cs.open(small_disk / "c"))) == []


def test_read_only_disk_is_one_clear_line(small_disk: Path) -> None:
    round_ = factory.filled(small_disk / "c", n_prompts=4).round()
    record = round_.rollouts.read(0)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(cs.StorageError, match="file system is read-only") as caught:
        round_.rollouts.write(0, record)
    assert "\n" not in str(caught.value)
    with pytest.raises(cs.StorageError, match="read-only"), round_.cache.lock("redpen score"):
        pass
    assert cs.open(small_disk / "c").round().rollouts.committed().all()


# ------------------------------------------------------------------------------------------------ hostile and damaged


def findings_of(path: Path) -> set[tuple[int | None, str, int | None]]:
    found = list(cs.verify(cs.open(path)))
    assert all("\n" not in str(finding) and len(str(finding)) < 1000 for finding in found)
    return {(finding.round, finding.group, finding.block) for finding in found}


NODES = {
    "rounds": (None, "rounds"),
    "rounds/00000": (0, "round"),
    "rounds/00000/prompts": (0, "prompts"),
    "rounds/00000/prompts/bytes": (0, "prompts"),
    "rounds/00000/prompts/offsets": (0, "prompts"),
    "rounds/00000/rollouts": (0, "round"),
    "rounds/00000/rollouts/commit": (0, "rollouts"),
    "rounds/00000/rollouts/trained": (0, "rollouts"),
    "rounds/00000/scores": (0, "scores"),
    "rounds/00000/scores/student": (0, "scores/student"),
    "rounds/00000/scores/teacher": (0, "scores/teacher"),
    "rounds/00000/scores/teacher/commit": (0, "scores/teacher"),
    "rounds/00000/scores/teacher/logprobs": (0, "scores/teacher"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache to copy, damage and put back."""
    path = tmp_path_factory.mktemp("small") / "c"
    factory.filled(path, n_prompts=2, topk=2)
    return path


@pytest.mark.parametrize("node", NODES)
def test_whatever_node_is_gone_is_a_finding(small: Path, node: str, tmp_path: Path) -> None:
    path = small / node / "zarr.json"
    kept = path.read_bytes()
    try:
        path.unlink()
        assert (*NODES[node], None) in findings_of(small)
    finally:
        path.write_bytes(kept)


def test_a_cache_whose_own_metadata_are_gone_is_named_as_one(tmp_path: Path) -> None:
    factory.filled(tmp_path / "c", n_prompts=1)
    (tmp_path / "c/zarr.json").unlink()
    with pytest.raises(cs.NotACacheError, match=r"zarr\.json.*missing"):
        cs.create(tmp_path / "c")


def test_a_round_that_is_gone_among_others_is_a_finding(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c", n_prompts=1)
    records = factory.prompts(2)
    cache.start_round(factory.round_manifest(records), records, index=1)
    shutil.rmtree(tmp_path / "c/rounds/00000")
    assert findings_of(tmp_path / "c") == {(0, "round", None)}


@pytest.mark.parametrize("array", ["commit", "token_ids"])
def test_one_repair_takes_back_all_that_is_bad_in_a_block(tmp_path: Path, array: str) -> None:
    cache = factory.filled(tmp_path / "c")
    original = cache.round().rollouts.read(1)
    for name in (f"rollouts/{array}", "scores/student/candidate_ids", "scores/teacher/entropy"):
        path = shard(cache, name, 1)
        path.write_bytes(path.read_bytes()[:-1] + b"\0\1")
    findings = list(cs.verify(cache))
    assert {(f.group, f.block) for f in findings} == {
        (g, 1) for g in ("rollouts", "scores/student", "scores/teacher")
    }
    assert cs.repair(cache, findings) == 3
    cache.round().rollouts.write(1, original)  # the same tokens: what of their scores is left would count again
    assert list(cs.verify(cache)) == []
    assert not cache.round().scores("teacher").committed()[1]


WRONG = {
    "rounds/00000": {
        "attributes.redpen.prompts_per_block": [True, "4", 0, 1, 10**18, None, 4.0],
        "attributes.redpen.temperature": [float("nan"), 10**400, -1, "1", [1]],
        "attributes.redpen.n_prompts": [10**15, 6, -1],
        "attributes.redpen.vocab_size": [10**15, 0],
        "attributes.redpen.slots": [{}, None],
        "attributes.redpen.student.digest": [5, "x" * 10**6],
        "attributes.redpen": [None, [], {}],
        "attributes": [[], "x"],
        "node_type": ["array", 3],
        "zarr_format": [True, 2, "3"],
    },
    "rounds/00000/rollouts/commit": {
        "shape": [[1, 10**12], [10**12, 21], [2], "x", [True, 21]],
        "chunk_grid.configuration.chunk_shape": [[1, 10**12], [0, 0]],
        "codecs": [[], None, [{"name": "bytes", "configuration": {"endian": "little"}}]],
        "attributes.fields": [[], None],
        "data_type": ["uint32", {"name": "struct"}],
        "fill_value": [1, "NaN"],
    },
    "rounds/00000/scores/teacher": {
        "attributes.redpen.candidates": [5, 10**9, -1],
        "attributes.redpen.role": ["student", "x"],
        "attributes.redpen.candidate_kind": ["sampled"],
        "attributes.redpen.sampling_temperature": [1.0],
    },
    "rounds/00000/scores/student": {
        "attributes.redpen.sampling_temperature": [1.5, None],
        "attributes.redpen.vocab_size": [10**6],
        "attributes.redpen.topk": [1],
    },
    "rounds/00000/prompts/bytes": {"shape": [[10**15], [1]], "codecs": [[{"name": "crc32c"}]]},
}


def replaced(document: Any, field: str, value: Any) -> Any:
    first, _, rest = field.partition(".")
    return document | {first: replaced(document[first], rest, value) if rest else value}


@pytest.mark.parametrize("node", WRONG)
def test_wrong_metadata_are_a_finding_that_names_node_and_field(small: Path, node: str) -> None:
    path = small / node / "zarr.json"
    kept = path.read_bytes()
    try:
        for field, values in WRONG[node].items():
            for value in values:
                path.write_text(json.dumps(replaced(json.loads(kept), field, value)))
                found = [str(finding) for finding in cs.verify(cs.open(small))]
                assert found and all("\n" not in line and len(line) < 1000 for line in found), (field, value)
                if value != 1 or field.endswith("temperature"):  # a size that is possible contradicts another file
                    name = field.rpartition(".")[2]
                    assert any(name in line for line in found) or "redpen" in field, (field, value, found)
    finally:
        path.write_bytes(kept)


def read_all(path: Path) -> list[Any]:
    """Everything that a reader looks at."""
    cache = cs.open(path)
    found: list[Any] = []
    for index in cache.round_indices():
        round_ = cache.round(index)
        found += [round_.prompts[i] for i in range(len(round_.prompts))]
        for group in (round_.rollouts, *(round_.scores(name) for name in round_.scorer_names())):
            found += [group.read(block) for block in np.flatnonzero(group.committed()).tolist()]
    return found


read_once = functools.cache(read_all)

SCALARS = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 10**12, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x", "x" * 10**5]
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.just({}), st.dictionaries(st.sampled_from("ab"), SCALARS, max_size=2)
)


@settings(
    max_examples=60,
    deadline=10_000,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(data=st.data())
def test_mutated_metadata_never_pass_for_other_data(small: Path, data: st.DataObject) -> None:
    """Any value of any metadata file replaced, removed or nested: the same data, or one line."""
    read_once(small)
    files = sorted(small.rglob("zarr.json"))
    path = data.draw(st.sampled_from(files))
    kept = path.read_bytes()
    document = json.loads(kept)
    places: list[tuple[Any, Any]] = []
    pending: list[Any] = [document]
    while pending:
        inner = pending.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        places += [(inner, key) for key in keys]
        pending += [inner[key] for key in keys]
    inner, key = data.draw(st.sampled_from(places))
    kind = data.draw(st.sampled_from(["replace", "remove", "nest", "deep"]))
    if kind == "replace":
        inner[key] = data.draw(VALUES)
    elif kind == "remove":
        del inner[key]
    else:
        inner[key] = [inner[key]] if kind == "nest" else "DEEP"
    text = json.dumps(document).replace('"DEEP"', "[" * 5000 + "]" * 5000)
    expected = read_once(small)
    try:
        path.write_text(text)
        try:
            found = read_all(small)
        except cs.CacheError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            assert len(found) == len(expected) or findings_of(small)  # scores without a manifest are not scored
            for ours, theirs in zip(found, expected, strict=False):
                assert_same_record(ours, theirs) if dataclasses.is_dataclass(ours) else None
        with contextlib.suppress(cs.CacheError):
            findings_of(small)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("name", ["zarr.json", "rounds/00000/zarr.json", "rounds/00000/rollouts/token_ids/c/0/0"])
def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path, name: str) -> None:
    cache = factory.filled(tmp_path / "c", n_prompts=1)
    path = tmp_path / "c" / name

    def sparse() -> None:
        with path.open("wb") as file:
            file.truncate(2**40)

    for make in (
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to("lost"),
        sparse,
    ):
        path.unlink()
        make()
        with pytest.raises(cs.CacheError) as caught:
            cs.open(tmp_path / "c").round().rollouts.read(0)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    if name.endswith("0"):
        assert cs.repair(cache, list(cs.verify(cache))) == 1


def test_scores_behind_a_link_to_nothing_are_lost_and_not_absent(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c", n_prompts=1)
    name = cache.round().scorer_names()[-1]
    (tmp_path / "c/rounds/00000/scores" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "c/rounds/00000/scores" / name).symlink_to(tmp_path / "lost")
    with pytest.raises(cs.CacheError, match="symbolic link to nothing"):
        cs.open(tmp_path / "c").round().scorer_names()


def zstd_frame_without_size(content: bytes) -> bytes:
    """A zstd frame of one raw block (RFC 8878), whose header has a window size but no content size."""
    return b"\x28\xb5\x2f\xfd\x00\x58" + (1 | len(content) << 3).to_bytes(3, "little") + content


def test_a_chunk_that_would_decompress_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    from numcodecs import CRC32C, Zstd

    factory.filled(tmp_path / "c", n_prompts=1)
    path = tmp_path / "c/rounds/00000/prompts/bytes/c/0"
    for bomb in (bytes(Zstd(level=1).encode(bytes(2**26))), zstd_frame_without_size(bytes(100_000))):
        path.write_bytes(bytes(CRC32C(location="end").encode(bomb)))
        with pytest.raises(cs.CacheError, match="prompts/bytes"):
            cs.open(tmp_path / "c").round().prompts[0]


def test_a_zstd_frame_without_its_size_is_read(tmp_path: Path) -> None:
    """Streaming compressors, which other Zarr implementations use, do not know the size in advance."""
    from numcodecs import CRC32C, Zstd

    factory.filled(tmp_path / "c", n_prompts=1)
    expected = cs.open(tmp_path / "c").round().prompts[0]
    path = tmp_path / "c/rounds/00000/prompts/bytes/c/0"
    plain = bytes(Zstd().decode(CRC32C(location="end").decode(path.read_bytes())))
    path.write_bytes(bytes(CRC32C(location="end").encode(zstd_frame_without_size(plain))))
    assert cs.open(tmp_path / "c").round().prompts[0] == expected


def test_a_shard_whose_chunks_overlap_is_refused(tmp_path: Path) -> None:
    """Else a small file could have as many copies read into memory as its index has chunks."""
    from numcodecs import CRC32C

    factory.filled(tmp_path / "c", n_prompts=1, max_response_tokens=20_000)
    round_ = cs.open(tmp_path / "c").round()
    array = zarr.open_array(tmp_path / "c/rounds/00000/rollouts/token_ids")
    n_chunks = array.shards[1] // array.chunks[1]
    assert n_chunks > 1
    path = tmp_path / "c/rounds/00000/rollouts/token_ids/c/0/0"
    index = np.array([[0, 600_000]] * n_chunks, "<u8").tobytes()
    path.write_bytes(bytes(600_000) + bytes(CRC32C(location="end").encode(index)))
    with pytest.raises(cs.CorruptBlockError, match=r"token_ids.*index"):
        round_.rollouts.read(0)


@pytest.mark.parametrize("name", ["bytes", "offsets"])
def test_prompts_whose_chunks_are_gone_are_one_line(tmp_path: Path, name: str) -> None:
    factory.filled(tmp_path / "c", n_prompts=3)
    (tmp_path / f"c/rounds/00000/prompts/{name}/c/0").unlink()
    with pytest.raises(cs.CacheError, match=f"prompts/{name}"):
        cs.open(tmp_path / "c").round().prompts[0]
    assert findings_of(tmp_path / "c") == {(0, "prompts", None)}


def test_no_write_leaves_the_cache_through_a_link(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c", n_prompts=1)
    outside, inside = tmp_path / "outside", tmp_path / "c/rounds/00000/rollouts/commit/c"
    inside.rename(outside)
    inside.symlink_to(outside)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    with pytest.raises(cs.StorageError, match="symbolic link"):
        cache.round().rollouts.uncommit(0)
    assert before == {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["link", "pipe", "second name"])
def test_a_lock_that_is_not_ours_is_refused(tmp_path: Path, kind: str) -> None:
    cache = factory.filled(tmp_path / "c", n_prompts=1)
    lock, other = tmp_path / ".c.lock", tmp_path / "other"
    other.write_text("mine")
    make = {"link": lambda: lock.symlink_to(other), "pipe": lambda: os.mkfifo(lock)}
    make.get(kind, lambda: os.link(other, lock))()
    with pytest.raises(cs.StorageError, match=r"\.c\.lock"), cache.lock("redpen score"):
        pass
    assert other.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["a\0b", "n" * 300, "p/" * 50_000 + "c", "file://host/c", "s3://bucket/" + "n" * 300]
)
def test_an_invalid_name_is_one_short_line(tmp_path: Path, name: str) -> None:
    for do in (cs.open, cs.create):
        with pytest.raises(cs.StorageError) as caught:
            do(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_clock_before_1970_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: -(10**15))
    cache = factory.filled(tmp_path / "c", n_prompts=1)
    with cache.lock("redpen score"):
        assert cache.round().scores("teacher").committed().all()
