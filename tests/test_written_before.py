"""A cache and a run that an earlier version wrote: they are read, continued, and made again with the same numbers."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.torch import load_file

import cache_schema as cs
from helpers.caches import ROOT, assert_same_cache
from helpers.training import curve
from pipeline.cli import main

CACHE, RUN = "out/small.zarr", "out/small"
SETTINGS = {
    "prompts.limit": 12,
    "rollouts.rollouts_per_prompt": 2,
    "rollouts.prompts_per_block": 4,
    "train.steps": 6,
    "train.lora_rank": 2,
    "train.prompts_per_step": 4,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 1,
}


def redpen(command: str, *args: str, **changes: int) -> int:
    settings = SETTINGS | {f"train.{name}": value for name, value in changes.items()}
    given = [args[0], "toy", *args[1:]] if command == "import" else ["toy", *args]
    return main([command, *given, *(part for name in settings for part in ("--set", f"{name}={settings[name]}"))])


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of then: the run has recorded its cache by a relative path."""
    with tarfile.open(ROOT / "tests/fixtures/before.tar.gz") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of the cache and the run, but the lock that a command leaves."""
    files = [path for name in (CACHE, RUN) for path in sorted((directory / name).rglob("*")) if path.is_file()]
    return {str(path): path.read_bytes() for path in files if path.name != ".lock"}


def test_nothing_is_left_to_do(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    was = contents(before)
    assert main(["verify", CACHE]) == 0
    assert main(["verify", RUN]) == 0
    assert main(["inspect", CACHE]) == 0
    assert redpen("rollouts", "--cache", CACHE) == 0
    assert redpen("score", "--cache", CACHE) == 0
    assert redpen("train", "--cache", CACHE, "--run", RUN) == 0
    assert "6 done" in capsys.readouterr().out
    assert main(["report", RUN, CACHE, "-o", "page.html"]) == 0
    assert "0.17123" in (before / "page.html").read_text()
    assert contents(before) == was


def test_its_cache_of_version_1_goes_on(before: Path) -> None:
    """With the digests of then, whether blocks, scores or a round are added."""
    cache = cs.open(CACHE, writable=True)
    round_ = cache.round()
    assert cache.version == 1 < cs.VERSION
    kept = {name: group_of(round_, name).commits() for name in ("rollouts", "student", "teacher")}
    round_.rollouts.uncommit(1)
    round_.scores("teacher").uncommit(2)
    assert redpen("rollouts", "--cache", CACHE) == 0 and redpen("score", "--cache", CACHE) == 0
    for name, commits in kept.items():
        for field in set(commits.dtype.names or ()) - set(cs.TIME_FIELDS):
            np.testing.assert_array_equal(group_of(round_, name).commits()[field], commits[field], err_msg=field)
    teacher = round_.scores("teacher")
    again = round_.start_scores("again", teacher.manifest)
    for block in range(round_.n_blocks):
        again.write(block, teacher.read(block))
    assert again.digests() == teacher.digests() and all(0 < digest < 2**64 for digest in again.digests())
    logprobs = teacher.read(0).logprobs
    expected = hashlib.blake2b(logprobs.tobytes(), digest_size=8).digest()
    assert again.commits()["digest.logprobs"][0].tobytes() == expected
    manifest = replace(round_.manifest, seed=1)
    cache.start_round(manifest, [round_.prompts[i] for i in range(round_.n_prompts)], 1)
    cs.open(CACHE, writable=True).round(1).rollouts.write(0, round_.rollouts.read(0))
    assert not list(cs.verify(cs.open(CACHE))) and cs.open(CACHE).version == 1
    which = ("--round", "0", "--set", "train.teacher=teacher")
    assert redpen("train", "--cache", CACHE, "--run", "new", *which, steps=2) == 0


def test_damage_of_version_1_is_still_found(before: Path) -> None:
    shards = before / CACHE / "rounds/00000/scores/teacher/logprobs/c"
    (shards / "0/0").replace(shards / "1/0")  # whole, but of another block: only the digest differs
    found = [(finding.block, finding.array) for finding in cs.verify(cs.open(CACHE))]
    assert found == [(0, "logprobs"), (1, "logprobs")]
    with pytest.raises(cs.CorruptBlockError, match="block 1, array logprobs: does not match the digest"):
        cs.open(CACHE).round().scores("teacher").read(1)


def test_an_export_of_version_1_is_restored(before: Path) -> None:
    """Into a new cache, so with other digests of the same values; exports of then did not say their version."""
    assert main(["export-cache", CACHE, "-o", "small.parquet"]) == 0
    table = parquet.read_table("small.parquet")
    about = json.loads(table.schema.metadata[b"redpen"])
    assert about.pop("format_version") == 1
    table = table.replace_schema_metadata({b"redpen": json.dumps(about).encode()})
    parquet.write_table(table, "then.parquet", row_group_size=8)
    assert redpen("import", "then.parquet", "--cache", "restored.zarr") == 0
    assert cs.open("restored.zarr").version == cs.VERSION
    assert_same_cache(before / "restored.zarr", before / CACHE, ["rollouts", "student", "teacher"])


def group_of(round_: cs.Round, name: str) -> cs.BlockGroup[Any]:
    return round_.rollouts if name == "rollouts" else round_.scores(name)


def test_its_figures_are_those_recorded(before: Path) -> None:
    def values() -> dict[str, object]:
        """The figures without seconds, the limit, and intervals of reverse KL, which were normal ones then."""
        found = json.loads((before / RUN / "eval.json").read_text())
        for student in ("before", "after"):
            found[student]["reverse_kl"] = found[student]["reverse_kl"]["value"]
        return {key: value for key, value in found.items() if key not in ("seconds", "max_response_tokens")}

    recorded = values()
    assert main(["eval", RUN, "--set", "eval.limit=8"]) == 0
    assert values() == recorded


def test_training_goes_on(before: Path) -> None:
    first = curve(before / RUN)
    assert redpen("train", "--cache", CACHE, "--run", RUN, steps=9) == 0
    longer = curve(before / RUN)
    assert longer[:6] == first and [line["step"] for line in longer[6:]] == [7, 8, 9]


def test_the_same_recipe_gives_the_same_numbers(before: Path) -> None:
    assert redpen("rollouts", "--cache", "again.zarr") == 0
    assert redpen("score", "--cache", "again.zarr") == 0
    assert redpen("train", "--cache", "again.zarr", "--run", "again") == 0
    assert_same_cache(before / "again.zarr", before / CACHE, ["rollouts", "student", "teacher"])
    assert curve(before / "again") == curve(before / RUN)
    then, now = (load_file(before / run / "adapter" / "adapter_model.safetensors") for run in (RUN, "again"))
    assert then.keys() == now.keys()
    for name, tensor in then.items():
        np.testing.assert_array_equal(now[name].numpy(), tensor.numpy(), err_msg=name)
