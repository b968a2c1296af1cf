"""`redpen push`, to a Hub of the test's own on loopback."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

import cache_schema as cs
from cache_schema.hub import open_hub
from helpers.caches import small_recipe
from helpers.hub import TOKEN, Hub
from helpers.training import assert_same_run
from pipeline.cli import main
from pipeline.train import stage


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    open_hub.cache_clear()
    with contextlib.closing(Hub()) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture(scope="module")
def trained(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("push") / "run"
    assert stage.run(small_recipe(), str(toy_cache), run) == 0
    return run


def test_a_run_is_one_commit_that_can_be_loaded_from_the_hub(
    trained: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(trained), "me/mine", "--base", "me/toy-student"]) == 0
    out, err = capsys.readouterr()
    assert hub.private == {"me/mine": True} and f"{hub.url}/me/mine" in out and "revision" in out
    assert "vllm serve me/toy-student" in err and "trained=me/mine" in err
    (files,) = hub.commits["me/mine"]
    weights = "adapter_model.safetensors"
    assert files[weights] == (trained / "adapter" / weights).read_bytes()
    assert {"recipe.toml", "metrics.jsonl", "README.md", "adapter_config.json"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "me/toy-student" and 'from_pretrained(base, "me/mine")' in card.text
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/toy-student"
    assert not any(b"toy/assets" in files[name] for name in ("README.md", "adapter_config.json"))


def test_a_merged_model_is_published_as_it_is(trained: Path, hub: Hub, tmp_path: Path) -> None:
    assert main(["merge", str(trained), "-o", str(tmp_path / "merged")]) == 0
    assert main(["push", str(tmp_path / "merged"), "me/mine", "--base", "me/toy", "--public"]) == 0
    assert hub.private == {"me/mine": False}
    kept = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir() if path.name != "README.md"}
    assert {name: content for name, content in hub.commits["me/mine"][0].items() if name != "README.md"} == kept


def test_what_is_wrong_is_one_line_and_nothing_is_published(
    trained: Path,
    toy_cache: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["push", *arguments]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("redpen: ")]
        assert len(lines) == 1 and TOKEN not in lines[0]
        return lines[0]

    named = (str(trained), "me/mine", "--base", "me/toy")
    assert "expected OWNER/NAME" in refused(str(trained), "not a name", "--base", "me/toy")
    assert "give --base" in refused(str(trained), "me/mine")
    assert "expected a run" in refused(str(tmp_path), "me/mine")
    assert "found a cache; publish it as hf://datasets/OWNER/NAME" in refused(str(toy_cache), "me/mine")
    assert "is a run, whose model is published as OWNER/NAME" in refused(str(trained), URL)
    damaged = Path(shutil.copytree(trained, tmp_path / "run"))
    (damaged / "adapter/adapter_model.safetensors").write_bytes(b"other")
    assert "digest" in refused(str(damaged), *named[1:])
    assert not hub.private
    hub.refuses = 403
    assert "may write there" in refused(*named)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    assert "401" in refused(*named)
    hub.close()
    assert "HUB_ID" in refused(*named)
    assert not hub.commits


# -- caches ---------------------------------------------------------------------------------------------------

URL = "hf://datasets/me/sums"


def test_a_published_cache_trains_the_same_adapter_and_only_what_training_reads_is_fetched(
    toy_cache: Path, trained: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(toy_cache), URL]) == 0
    assert hub.private == {"me/sums": True} and "hf://datasets/me/sums@" in capsys.readouterr().err
    files = hub.commits["me/sums"][0]
    card = files.pop("README.md").decode()
    local = {path.relative_to(toy_cache).as_posix(): path for path in toy_cache.rglob("*") if path.is_file()}
    assert files == {name: path.read_bytes() for name, path in local.items()}
    assert "| 0 | `toy:student` | 24 |" in card and f"redpen train RECIPE --cache {URL}" in card

    assert stage.run(small_recipe(), URL, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", trained)
    assert len(hub.served) == len(set(hub.served)) and set(hub.served) < files.keys()
    fetched, of_all = sum(len(files[name]) for name in hub.served), sum(map(len, files.values()))
    assert not any("scores/teacher/entropy/c" in name for name in hub.served)
    said = f"{fetched / 2**20:.1f} of {(of_all + len(card.encode())) / 2**20:.1f} MiB were fetched"
    assert said in capsys.readouterr().err

    n_served = len(hub.served)
    open_hub.cache_clear()
    assert stage.run(small_recipe(), URL, tmp_path / "again") == 0
    assert len(hub.served) == n_served, "kept on this machine"
    for command in ("verify", "inspect", "diagnose", "report"):
        assert main([command, URL, *(["-o", str(tmp_path / "page.html")] if command == "report" else [])]) == 0, (
            command
        )
    assert {files[name] for name in hub.served} == set(files.values())  # one fetch for files that are alike


def test_an_earlier_revision_is_read_and_a_later_commit_does_not_change_an_open_cache(
    toy_cache: Path, hub: Hub
) -> None:
    assert main(["push", str(toy_cache), URL]) == 0
    opened = cs.open(URL)
    hub.commits["me/sums"].append({"zarr.json": b"{}"})
    assert opened.round().rollouts.committed().all() and cs.open(URL).round_indices() == [0]
    open_hub.cache_clear()
    with pytest.raises(cs.NotACacheError):
        cs.open(URL)
    assert cs.open(f"{URL}@{hub.revision('me/sums', 1)}").round_indices() == [0]


def test_what_an_earlier_cache_had_there_is_not_part_of_the_next(
    toy_cache: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A commit of the Hub only adds: rounds and blocks of the earlier one would be read as those of the new one."""
    earlier = Path(shutil.copytree(toy_cache, tmp_path / "c.zarr"))
    shutil.copytree(earlier / "rounds/00000", earlier / "rounds/00001")
    assert main(["push", str(earlier), URL]) == 0
    hub.commits["me/sums"][0]["LICENSE"] = b"mine"
    cache = Path(shutil.copytree(toy_cache, tmp_path / "d.zarr"))
    cs.open(cache, writable=True).round().scores("teacher").uncommit(2)
    assert main(["push", str(cache), URL]) == 0
    assert "of an earlier one deleted" in capsys.readouterr().out
    open_hub.cache_clear()
    published = cs.open(URL)
    assert published.round_indices() == [0] and hub.commits["me/sums"][1]["LICENSE"] == b"mine"
    assert not any("scores/teacher" in name and name.endswith("/c/2/0") for name in hub.commits["me/sums"][1])
    assert list(cs.verify(published)) == []


def test_only_whole_blocks_of_an_undamaged_cache_are_published(
    toy_cache: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(toy_cache, tmp_path / "c.zarr"))
    cs.open(path, writable=True).round().scores("teacher").uncommit(2)
    assert main(["push", str(path), URL]) == 0
    of_teacher = [name for name in hub.commits["me/sums"][0] if "scores/teacher/logprobs/c/" in name]
    assert len(of_teacher) == 5 and not any("/c/2/" in name for name in of_teacher)
    (path / "rounds/00000/rollouts/token_ids/c/1/0").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["push", str(path), URL]) == 1
    assert "is damaged" in capsys.readouterr().err and len(hub.commits["me/sums"]) == 1


def test_a_published_cache_that_cannot_be_read_is_one_line(
    toy_cache: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main([*arguments]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("redpen: ")]
        assert len(lines) == 1 and TOKEN not in lines[0]
        return lines[0]

    assert "no such repository" in refused("inspect", URL)
    assert main(["push", str(toy_cache), URL]) == 0
    assert "hf://datasets/OWNER/NAME" in refused("inspect", "hf://datasets/sums")
    assert "cannot be written" in refused("rollouts", "toy", "--cache", URL)
    assert "cannot be written" in refused("distill", "toy", "--cache", URL, "--run", str(tmp_path / "rounds"))
    assert not (tmp_path / "rounds").exists()
    assert "HUB_ID" in refused("push", str(toy_cache), f"{URL}@main"), "a revision is made, not chosen"
    hub.fails = 403
    assert "cannot be fetched" in refused("inspect", URL)
    hub.fails = None
    assert main(["inspect", URL]) == 0, "what was fetched before is kept, the rest is fetched now"
    open_hub.cache_clear()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    assert "HF_TOKEN" in refused("inspect", URL)
