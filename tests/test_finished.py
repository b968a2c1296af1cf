"""A finished stage says so without torch, and only of a cache that its recipe and files would make again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cache_schema as cs
import pipeline.rollouts.stage
import pipeline.score.stage
from helpers.caches import ROOT, SMALL, flip_a_bit, make_cache, small_recipe
from pipeline.cli import main
from pipeline.config import Recipe
from pipeline.models.paths import find_directory
from pipeline.rollouts import finished as rollouts
from pipeline.rounds import known_manifests
from pipeline.runs.files import digest_of
from pipeline.score import finished as score
from pipeline.toy import asset_path

HEAVY = ("torch", "transformers", "tokenizers", "peft", "pyarrow", "safetensors", "tensorboard", "jinja2")


def in_a_process(stage: str, cache: Path) -> str:
    """The output of a command, after which nothing heavy may be loaded."""
    settings = [part for setting in SMALL for part in ("--set", setting)]
    code = (
        "import sys; from pipeline.cli import main; "
        f"code = main([{stage!r}, 'toy', '--cache', {str(cache)!r}, *{settings!r}]); "
        f"print(*sorted(set({HEAVY!r}) & sys.modules.keys())); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(("stage", "lines"), [("rollouts", 1), ("score", 2)])
def test_a_finished_stage_loads_no_torch(toy_cache: Path, stage: str, lines: int) -> None:
    *said, loaded = in_a_process(stage, toy_cache).split("\n")[:-1]
    assert loaded == "" and len(said) == lines and all(line.endswith("; nothing to do") for line in said)


def test_the_same_is_said_with_torch(toy_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, url = small_recipe(), str(toy_cache)
    assert rollouts.report_finished(recipe, url) and score.report_finished(recipe, url)
    without = capsys.readouterr()
    assert pipeline.rollouts.stage.run(recipe, url) == 0 and pipeline.score.stage.run(recipe, url) == 0
    assert capsys.readouterr() == without


def test_check_and_only(toy_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    for module in (pipeline.rollouts.stage, pipeline.score.stage):
        monkeypatch.setattr(module, "run", lambda *_, name=module.__name__, **__: calls.append(name))
    where = ["toy", "--cache", str(toy_cache), *(part for setting in SMALL for part in ("--set", setting))]
    for stage in ("rollouts", "score"):
        assert main([stage, *where]) == 0 and not calls
        assert main([stage, *where, "--check"]) == 0
        assert calls.pop() == f"pipeline.{stage}.stage"
    capsys.readouterr()
    assert main(["score", *where, "--only", "teacher"]) == 0
    assert capsys.readouterr().out.startswith("teacher: ") and not calls
    assert main(["score", *where, "--only", "nobody"]) == 0 and calls  # which refuses it


class Files:
    """A finished cache of a student, a teacher and prompts in files, and its recipe."""

    def __init__(self, root: Path):
        self.root, self.cache = root, root / "toy.zarr"
        for name in ("student", "teacher"):
            if not (root / name).exists():
                shutil.copytree(asset_path(name), root / name)
        if not (root / "prompts.jsonl").exists():
            lines = asset_path("prompts/train.jsonl").read_bytes().splitlines(keepends=True)
            (root / "prompts.jsonl").write_bytes(b"".join(lines[:8]))

    def recipe(self, *overrides: str) -> Recipe:
        root = self.root
        paths = (
            f"student.model={root}/student",
            f"teacher.model={root}/teacher",
            f"prompts.path={root}/prompts.jsonl",
        )
        return small_recipe(*paths, *overrides)

    def settle(self) -> None:
        """Wait until another change of a file would be seen by its times."""
        find_directory.cache_clear()
        changed = max(path.stat().st_ctime for path in (*self.root.glob("*/*"), *self.root.glob("*.jsonl")))
        time.sleep(max(0.0, changed + known_manifests.RACY_SECONDS + 0.1 - time.time()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("files"))
    files.settle()
    make_cache(files.cache, files.recipe())
    return files


@pytest.fixture
def files(finished: Files) -> Files:
    """The same, checked to be known as finished, with whatever a test changes taken back after it."""
    assert rollouts.report_finished(finished.recipe(), str(finished.cache))
    assert score.report_finished(finished.recipe(), str(finished.cache))
    return finished


def flip_unseen(path: Path) -> None:
    """Flip a bit, with the size and time of modification that were there before."""
    before = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("file", "field", "stages"),
    [
        ("student/model.safetensors", r"student\.digest", "rollouts score"),
        ("student/tokenizer.json", r"tokenizer\.digest", "rollouts score"),
        ("teacher/model.safetensors", r"model\.digest", "score"),
        ("prompts.jsonl", r"prompts_sha256", "rollouts"),
    ],
)
def test_a_changed_file_is_refused(files: Files, file: str, field: str, stages: str) -> None:
    path, url, recipe = files.root / file, str(files.cache), files.recipe()
    kept = path.read_bytes()
    if path.suffix == ".safetensors":
        flip_unseen(path)
    else:
        path.write_bytes(_other(path.name, kept))
    try:
        find_directory.cache_clear()
        for name, light, stage in (
            ("rollouts", rollouts.report_finished, pipeline.rollouts.stage.run),
            ("score", score.report_finished, pipeline.score.stage.run),
        ):
            if name in stages:
                assert not light(recipe, url)
                with pytest.raises(cs.ProvenanceError, match=field):
                    stage(recipe, url)
    finally:
        path.write_bytes(kept)
        files.settle()
        # with the old content, but other times, the stages work it out once more
        pipeline.rollouts.stage.run(recipe, url)
        pipeline.score.stage.run(recipe, url)


def _other(name: str, content: bytes) -> bytes:
    """Another file of the same size that is as valid."""
    if name == "tokenizer.json":
        value = json.loads(content)
        vocab = value["model"]["vocab"]
        first, second = sorted(vocab, key=vocab.get)[65:67]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        return json.dumps(value, ensure_ascii=False).encode()
    return content.replace(b"+", b"-", 1)  # in the first prompt


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("rollouts.temperature=0.5", "rollouts"),
        ("rollouts.seed=7", "rollouts"),
        ("student.dtype=bfloat16", "rollouts score"),
        ("score.candidates=5", "score"),
        ("score.tile_tokens=4096", "score"),
        ("teacher.dtype=bfloat16", "score"),
    ],
)
def test_a_changed_setting_is_refused(files: Files, override: str, stages: str) -> None:
    recipe, url = files.recipe(override), str(files.cache)
    for name, light, stage in (
        ("rollouts", rollouts.report_finished, pipeline.rollouts.stage.run),
        ("score", score.report_finished, pipeline.score.stage.run),
    ):
        for _ in range(2 if name in stages else 0):  # the second time its manifest is remembered
            assert not light(recipe, url)
            with pytest.raises(cs.ProvenanceError, match=override.partition("=")[0].rpartition(".")[2]):
                stage(recipe, url)


def test_settings_of_other_stages_do_not_matter(files: Files) -> None:
    recipe = files.recipe("train.lora_rank=2", "eval.limit=3", "track.name=again")
    assert rollouts.report_finished(recipe, str(files.cache)) and score.report_finished(recipe, str(files.cache))


def test_what_is_missing_is_left_to_the_stage(files: Files, tmp_path: Path) -> None:
    recipe, url = files.recipe(), str(tmp_path / "copy.zarr")
    assert not rollouts.report_finished(recipe, url) and not Path(url).exists()
    shutil.copytree(files.cache, url)
    assert rollouts.report_finished(recipe, url) and not rollouts.report_finished(recipe, url, 1)
    round_ = cs.open(url, writable=True).round()
    round_.scores(cs.STUDENT).uncommit(0)  # the teacher's scores of its candidates no longer count
    assert not score.report_finished(recipe, url) and not score.report_finished(recipe, url, "teacher")
    assert rollouts.report_finished(recipe, url)
    round_.rollouts.uncommit(1)
    assert not rollouts.report_finished(recipe, url)


def test_another_writer_is_named(files: Files) -> None:
    program = (
        "import sys, cache_schema as cs\n"
        f"with cs.open({str(files.cache)!r}, writable=True).lock('redpen diagnose'):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", program]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        for light in (rollouts.report_finished, score.report_finished):
            with pytest.raises(cs.CacheLockedError, match="redpen diagnose"):
                light(files.recipe(), str(files.cache))
        other.communicate()


def test_nothing_is_kept_of_files_that_have_just_changed(tmp_path: Path, toy_cache: Path) -> None:
    """Another change within the clock's granularity would leave the same times."""
    files, manifest = Files(tmp_path), cs.open(toy_cache).round().manifest
    sources = known_manifests.of_round(files.recipe())
    assert sources is not None and not sources.settled
    known_manifests.remember(sources, sources, manifest)
    assert known_manifests.recall(sources, cs.RoundManifest) is None
    (tmp_path / "student/later").touch()
    in_the_future = time.time_ns() + 10**12
    os.utime(tmp_path / "student/later", ns=(in_the_future, in_the_future))
    time.sleep(known_manifests.RACY_SECONDS + 0.1)
    later = known_manifests.of_round(files.recipe())
    assert later is not None and not later.settled
    (tmp_path / "student/later").unlink()
    settled = known_manifests.of_round(files.recipe())
    assert settled is not None and settled.settled and settled.key == sources.key
    known_manifests.remember(later, settled, manifest)  # a file changed while others were read
    assert known_manifests.recall(settled, cs.RoundManifest) is None
    known_manifests.remember(settled, settled, manifest)
    assert known_manifests.recall(settled, cs.RoundManifest) == manifest


def test_an_adapter_and_the_record_of_its_run_count(tmp_path: Path) -> None:
    files, adapter = Files(tmp_path), tmp_path / "run/adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    keys = set()
    for path in (tmp_path / "run/other", adapter / "adapter_model.safetensors", tmp_path / "run/run.json"):
        path.touch()
        sources = known_manifests.of_round(files.recipe(f"student.adapter={adapter}"))
        keys.add(sources and sources.key)
    without = known_manifests.of_round(files.recipe())
    assert len(keys) == 3 and None not in keys and without is not None and without.key not in keys


def test_a_damaged_entry_is_no_entry(cache_home: Path, toy_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, directory = cs.open(toy_cache).round().manifest, cache_home / "manifests"
    sources = known_manifests.Sources("made-up", settled=True)
    entry = directory / "made-up.json"
    known_manifests.remember(sources, sources, manifest)
    assert known_manifests.recall(sources, cs.RoundManifest) == manifest
    kept = entry.read_bytes()
    other = {"manifest": {**json.loads(kept)["manifest"], "seed": "none"}}
    for content in (kept[:-9], kept.replace(b'"seed": 0', b'"seed": 1'), b"[]", b"{}"):
        assert content != kept
        entry.write_bytes(content)
        assert known_manifests.recall(sources, cs.RoundManifest) is None
    entry.write_text(json.dumps(other | {"digest": digest_of(other)}))
    assert known_manifests.recall(sources, cs.RoundManifest) is None
    entry.write_bytes(kept)
    directory.chmod(0o777)  # somebody else may have written it
    assert known_manifests.recall(sources, cs.RoundManifest) is None
    directory.chmod(0o700)
    monkeypatch.setattr(known_manifests, "_MOST_ENTRIES", 1)
    other_sources = known_manifests.Sources("another", settled=True)
    known_manifests.remember(other_sources, other_sources, manifest)
    assert [path.name for path in directory.iterdir()] == ["another.json"]


def test_what_cannot_be_identified_is_not_remembered(tmp_path: Path) -> None:
    files = Files(tmp_path)
    assert known_manifests.of_round(files.recipe()) is not None
    assert known_manifests.of_round(files.recipe("student.trust_remote_code=true")) is None
    assert known_manifests.of_round(files.recipe("prompts.path=org/data")) is None
    assert known_manifests.of_round(files.recipe("student.model=/nowhere")) is None
    os.mkfifo(tmp_path / "student/pipe")
    assert known_manifests.of_round(files.recipe()) is None
    (tmp_path / "student/pipe").unlink()
    (tmp_path / "student/linked").symlink_to(tmp_path / "teacher")
    assert known_manifests.of_round(files.recipe()) is None
