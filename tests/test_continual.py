"""New knowledge and old behaviour, on a company in miniature: the gate, what it is made of, and kills."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cache_schema as cs
from helpers import killing
from pipeline import continual
from pipeline.cli import main
from pipeline.config import GateConfig, load_recipe
from pipeline.errors import ConfigError, RedpenError
from pipeline.evaluate import stage as evaluate
from pipeline.toy import asset_path, company

SHORT = (
    "prompts.limit=16",
    "sft.steps=4",
    "sft.examples_per_step=8",
    "train.steps=2",
    "train.prompts_per_step=8",
    "distill.rounds=1",
    "distill.stop_reverse_kl=0",
)
KNOWLEDGE = "{name='knowledge', path='toy:company/questions', limit=8, rise=0.3, fall_since_sft=0.02}"
FORMATS = "{name='formats', path='toy:company/formats', limit=8, fall=1.0}"
FAILS, HOLDS = f"continual.gate=[{KNOWLEDGE}, {FORMATS}]", f"continual.gate=[{FORMATS}]"


def command(cache: Path, run: Path, gate: str) -> list[str]:
    settings = [part for setting in (*SHORT, gate) for part in ("--set", setting)]
    return ["continual", "company", "--cache", str(cache), "--run", str(run), *settings]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A directory with a `run` whose gate does not hold, of `c.zarr`; and what the command printed."""
    path = tmp_path_factory.mktemp("failed")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(command(path / "c.zarr", path / "run", FAILS)) == continual.EXIT_GATE
    return path, out.getvalue(), err.getvalue()


# -------------------------------------------------------------------------------------------------------------- world


def test_the_shipped_files_are_the_worlds(tmp_path: Path) -> None:
    company.write_data(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == asset_path(f"company/{file.name}").read_bytes()


def test_no_held_out_question_is_in_the_training_data() -> None:
    world = company.World()
    private, public = ({fact.name for fact in facts} for facts in (world.private, world.public))
    assert len(private) == len(world.private) == 43 and not private & public
    assert not set(world.words) & set(world.heldout_words)
    taught = " ".join(str(world.base_text()) for _ in range(3000))
    assert not any(name in taught for name in private)
    asked = [json.loads(line) for line in asset_path("company/formats.jsonl").read_text().splitlines()]
    words = {record["prompt"].split()[1] for record in asked}
    assert len(asked) == 512 and words <= set(world.heldout_words)
    prompts = asset_path("company/prompts.jsonl").read_text()
    assert not any(f"Say {word} " in prompts for word in world.heldout_words) and "answer" not in prompts


@pytest.mark.parametrize(
    ("forms", "said"),
    [
        (["in capitals"], "BAKO"),
        (["twice", "in brackets"], "[bako bako]"),
        (["in capitals", "as JSON"], '{"word": "BAKO"}'),
        (["twice", "with a full stop"], "bako bako."),
    ],
)
def test_forms(forms: Sequence[str], said: str) -> None:
    assert company.formatted("bako", forms) == (f"Say bako {' and '.join(forms)}.", said)


# --------------------------------------------------------------------------------------------------------------- gate


@pytest.mark.parametrize(
    ("gate", "before", "after", "fault"),
    [
        ({"rise": 0.3}, 0.02, 0.32, None),
        ({"rise": 0.3}, 0.02, 0.31, "g rose by 29.0 points, less than 30.0"),
        ({"fall": 0.02}, 0.9, 0.88, None),
        ({"fall": 0.02}, 0.9, 0.87, "g fell by 3.0 points, more than 2.0"),
        ({"fall": 0.02}, 0.9, 0.95, None),
        ({"at_least": 0.8}, 0.9, 0.79, "g is 79.0%, below 80.0%"),
        ({"rise": 0.3, "fall_since_sft": 0.05}, 0.1, 0.84, "g fell by 6.0 points after fine-tuning, more than 5.0"),
    ],
)
def test_the_fault_of_a_gate(gate: dict[str, float], before: float, after: float, fault: str | None) -> None:
    tuned = {"value": 0.9}
    measured = {continual.BEFORE: {"value": before}, continual.TUNED: tuned, continual.AFTER: {"value": after}}
    assert continual.fault_of(GateConfig(name="g", path="p", **gate), measured) == fault


def test_a_gate_that_does_not_hold_is_an_exit_code_and_a_line(
    failed: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, cache, run = load_recipe("company", [*SHORT, FAILS]), str(failed[0] / "c.zarr"), failed[0] / "run"
    shutil.copytree(run, tmp_path / "kept")  # what is measured below replaces it, and other tests read it, too
    _, out, err = failed
    assert f"{run}: the gate does not hold: knowledge rose by " in out and "next:" not in err
    assert "knowledge" in out.splitlines()[-3] and "(" in out.splitlines()[-3]
    recorded = json.loads((run / "gate.json").read_text())
    assert set(recorded) == {"knowledge", "formats"} and list(recorded["formats"]) == [
        "before",
        "after sft",
        "after distillation",
    ]
    assert continual.run(recipe, cache, run) == continual.EXIT_GATE
    assert capsys.readouterr().out.startswith(f"{run}: the gate does not hold")
    # another gate or [eval] is measured again, without training
    trained = (run / "adapter/adapter_model.safetensors").read_bytes()
    lines = (run / "distill/metrics.jsonl").read_bytes()
    easier = [
        gate.model_copy(update={"at_least": 0.0, "rise": None, "fall": None, "fall_since_sft": None})
        for gate in recipe.continual.gate
    ]
    changed = recipe.model_copy(
        update={
            "continual": recipe.continual.model_copy(update={"gate": easier}),
            "eval": recipe.eval.model_copy(update={"match": "contains"}),
        }
    )
    assert continual.run(changed, cache, run) == 0
    said = capsys.readouterr()
    assert "the gate is measured again" in said.err and f"{run}: the gate holds (measured 20" in said.out
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == trained
    assert (run / "distill/metrics.jsonl").read_bytes() == lines
    assert continual.run(changed, cache, run) == 0
    said = capsys.readouterr()
    assert "measured again" not in said.err and said.out.startswith(f"{run}: the gate holds (measured 20")
    with pytest.raises(RedpenError, match=r"continual\.gate\.a\.path"):  # an unusable one changes nothing
        unusable = load_recipe("company", [*SHORT, "continual.gate=[{name='a', path='p', fall=0.1}]"])
        continual.run(unusable, cache, run)
    assert continual.run(changed, cache, run) == 0
    for other in ("sft.steps=5", "rollouts.temperature=0.9"):
        with pytest.raises(RedpenError, match=rf"was started with a different .*\[{other.partition('.')[0]}\]"):
            continual.run(load_recipe("company", [*SHORT, FAILS, other]), cache, run)
    with pytest.raises(RedpenError, match=r"different \[sft\]"):
        continual.run(recipe, cache, run, [str(tmp_path / "week2.jsonl")])
    ledger = json.loads((run / "ledger.json").read_text())
    assert {"sft", "rollouts", "score teacher", "train"} <= set(ledger)
    assert evaluate.run(str(run), overrides=("eval.limit=8",)) == 0
    assert main(["report", str(run), "-o", str(tmp_path / "r.html")]) == 0
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "kept", run)


@pytest.mark.parametrize(
    ("cache", "override", "message"),
    [
        ("hf://datasets/me/sums", "prompts.skip=0", "a published cache cannot be written"),
        ("c.zarr", "prompts.path=no.jsonl", r"no\.jsonl: no such file"),
        ("c.zarr", "rollouts.max_response_tokens=4000", r"rollouts\.max_response_tokens: expected at most"),
    ],
)
def test_what_distillation_refuses_is_refused_before_fine_tuning(
    cache: str, override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("company", [*SHORT, HOLDS, override])
    with pytest.raises((RedpenError, cs.CacheError), match=message):
        continual.run(recipe, cache, tmp_path / "run")
    assert not (tmp_path / "run/sft").exists()


def test_the_next_documents_start_where_these_ended(
    failed: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """New knowledge and old behaviour in turn; a gate that holds is exit code 0."""
    first, second = failed[0] / "run", tmp_path / "week2"
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "Bakodi is run by Zoe."}\n{"text": "Tulapo is in Rome."}\n')
    went_on = ["--data", str(documents), "--set", f"student.adapter={first / 'adapter'}"]
    assert main([*command(tmp_path / "c.zarr", second, HOLDS), *went_on]) == 0
    assert "the gate holds" in capsys.readouterr().out
    before, after = (json.loads((run / "gate.json").read_text())["formats"] for run in (first, second))
    assert before["after distillation"] == after["before"]
    manifests = [cs.open(path / "c.zarr").round().scores("teacher").manifest for path in (failed[0], tmp_path)]
    assert len({manifest.model.digest for manifest in manifests}) == 1  # type: ignore[union-attr]
    assert all(manifest.model.adapter_digest is None for manifest in manifests), "the weights as they were"  # type: ignore[union-attr]


def test_killed_anywhere_it_ends_with_the_same_adapter(failed: tuple[Path, str, str], tmp_path: Path) -> None:
    run = tmp_path / "killed"
    writes = [("/sft/ledger.json", 1), ("/distill/adapter", 1), ("/killed/ledger.json", 1)]
    killing.before_each(writes, *command(tmp_path / "c.zarr", run, FAILS), code=continual.EXIT_GATE)
    for name in ("adapter/adapter_model.safetensors", "gate.json"):
        assert (run / name).read_bytes() == (failed[0] / "run" / name).read_bytes()


def test_with_all_weights_the_result_is_a_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("train.method=full", "sft.learning_rate=1e-4", "train.learning_rate=1e-4")
    assert continual.run(load_recipe("company", [*SHORT, HOLDS, *settings]), str(tmp_path / "c.zarr"), run) == 0
    made = [load_file(run / place / "model/model.safetensors") for place in (".", "distill", "sft")]
    assert all(torch.equal(made[0][name], weight) for name, weight in made[1].items())
    assert not all(torch.equal(made[0][name], weight) for name, weight in made[2].items())
    manifest = cs.open(tmp_path / "c.zarr").round().manifest
    assert manifest.student.name == str(run / "sft/model") and not (run / "adapter").exists()


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("", r"continual\.gate is not set"),
        ('{name = "a", path = "p"}', "gate 'a' needs at_least, rise, fall or fall_since_sft"),
        ('{name = "a", path = "p", fall = 0.1}, {name = "a", path = "q", rise = 0.1}', "two gates named 'a'"),
    ],
)
def test_a_gate_without_conditions_is_refused_at_once(gate: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe = load_recipe("company", [*SHORT, f"continual.gate=[{gate}]"])
        continual.run(recipe, str(tmp_path / "c.zarr"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
