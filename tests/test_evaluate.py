"""Evaluation: figures by hand on a small set, intervals against their formulas, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import cache_schema as cs
from helpers import killing, preloaded
from helpers.caches import overwrite_with_zeros, small_recipe, tree_digest
from pipeline import cli
from pipeline.config import PromptsConfig, Recipe, load_recipe
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import ConfigError, ModelError, PromptError, RedpenError
from pipeline.evaluate import job, stage
from pipeline.evaluate.reread import reread
from pipeline.models import load as models
from pipeline.models.paths import resolve_path
from pipeline.models.resolve import resolve
from pipeline.report.runs import read_run
from pipeline.rounds.scored_block import scored_blocks
from pipeline.runs.files import RECORD, fault, read_record, write_record
from pipeline.runs.lock import locked
from pipeline.text.prompts import load_prompts
from pipeline.text.rendering import render
from pipeline.toy import asset_path, world

N_PROMPTS = 20
SMALL = (
    f"eval.limit={N_PROMPTS}",
    "eval.candidates=259",
    "rollouts.max_response_tokens=24",
    "eval.reread_rollouts=7",
)


# -- a run, by hand -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pipeline.train.stage

    path = tmp_path_factory.mktemp("evaluated") / "run"
    settings = small_recipe("train.lora_rank=8", "train.prompts_per_step=24", "train.learning_rate=0.005")
    assert pipeline.train.stage.run(settings, str(toy_cache), path) == 0
    return path


@pytest.fixture(scope="module")
def figures(run_dir: Path) -> dict[str, dict[str, dict[str, float]]]:
    assert stage.run(str(run_dir), overrides=SMALL) == 0
    written: dict[str, dict[str, dict[str, float]]] = json.loads((run_dir / "eval.json").read_text())
    return written


def heldout(limit: int) -> PromptsConfig:
    return small_recipe().prompts.model_copy(update={"path": "toy:heldout", "limit": limit})


def recipes_student(run_dir: Path, label: str) -> Recipe:
    adapter = [f"student.adapter={run_dir / 'adapter'}"] if label == "after" else []
    return small_recipe(*SMALL, *adapter)


@pytest.mark.parametrize("label", ["before", "after"])
@torch.inference_mode()
def test_greedy_accuracy_by_hand(label: str, run_dir: Path, figures: dict[str, dict[str, dict[str, float]]]) -> None:
    recipe = recipes_student(run_dir, label)
    model, tokenizer = models.load_model(recipe.student, attention="sampling"), resolve(recipe.student).tokenizer
    right = 0
    records = [json.loads(line) for line in asset_path("prompts/heldout.jsonl").read_text().splitlines()]
    for record in records[:N_PROMPTS]:
        ids = tokenizer(record["prompt"])["input_ids"]
        start = len(ids)
        while len(ids) < start + 24 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        right += str(world.read_answer(text)) == record["answer"]
    assert figures[label]["greedy"]["value"] == pytest.approx(right / N_PROMPTS)
    assert 0 < right < N_PROMPTS


@pytest.mark.parametrize("label", ["before", "after"])
@torch.inference_mode()
def test_reverse_kl_by_hand(label: str, run_dir: Path, figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """The whole vocabulary in float64, each fresh rollout alone, and the sampled accuracy of the same rollouts."""
    recipe = recipes_student(run_dir, label)
    student, tokenizer = models.load_model(recipe.student, attention="sampling"), resolve(recipe.student).tokenizer
    teacher = models.load_model(recipe.teacher[0], attention="sampling")
    prompts = heldout(N_PROMPTS)
    records = load_prompts(prompts)
    ids = [np.array(render(record, tokenizer, prompts), np.int32) for record in records]
    sampling = Sampling(1.0, 1.0, (256, 258), 1, 24, seed=0, round_index=-1)
    rollouts = TransformersSampler(student, sampling).sample_block(PromptBlock(0, list(enumerate(ids))))
    divergence, right = [], 0
    for row in range(rollouts.n_rows):
        prompt, response = rollouts.prompt(row), rollouts.response(row)
        sequence = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
        s, t = (
            model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(1)
            for model in (student, teacher)
        )
        divergence += (s.exp() * (s - t)).sum(1).tolist()
        text = tokenizer.decode(response, skip_special_tokens=True)
        right += str(world.read_answer(text)) == records[row]["answer"]
    measured = figures[label]["reverse_kl"]
    assert measured["value"] == pytest.approx(np.mean(divergence), rel=1e-4)
    assert measured["low"] < measured["value"] < measured["high"]
    assert figures[label]["sampled"]["value"] == pytest.approx(right / N_PROMPTS)


def test_the_table_is_on_stdout(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.limit=4", "eval.samples=2"]) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[:8]] == [
        "4 prompts of toy:heldout", "accuracy, greedy", "accuracy, sampled (pass@1)", "pass@2",
        "legal format, sampled", "reverse KL, nats a token", "length, mean tokens", "cut at 24 tokens",
    ]  # fmt: skip
    assert "points" in lines[1] and lines[8].startswith(
        "(95 % intervals; sampled: 2 a prompt at T = 1; reverse KL to toy"
    )
    measured = json.loads((run_dir / "eval.json").read_text())
    assert [f"{measured[label]['response_tokens']:.1f}" for label in ("before", "after")] == lines[6].split()[3:5]
    assert "\x1b" not in out and "─" not in out


def test_fewer_candidates_give_a_lower_bound(
    run_dir: Path, figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path
) -> None:
    """And figures that are written elsewhere leave the run as it is."""
    before = tree_digest(run_dir)
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.candidates=4"], out=tmp_path / "few.json") == 0
    assert tree_digest(run_dir) == before
    few = json.loads((tmp_path / "few.json").read_text())
    for label in ("before", "after"):
        bound, exact = few[label]["reverse_kl"]["value"], figures[label]["reverse_kl"]["value"]
        assert 0 < bound <= exact * (1 + 1e-6) and few[label]["greedy"] == figures[label]["greedy"]


def test_a_tempered_sample_does_not_change_the_reverse_kl(
    run_dir: Path, figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path
) -> None:
    """It is on rollouts at temperature 1, whatever the accuracy is sampled at."""
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.temperature=0.5"], out=tmp_path / "cool.json") == 0
    cool = json.loads((tmp_path / "cool.json").read_text())
    assert cool["before"]["reverse_kl"] == figures["before"]["reverse_kl"]


def test_a_streamed_teacher_says_the_same(
    run_dir: Path, figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are equal bits, and the teacher is never loaded as a whole."""
    loaded: list[str] = []
    whole = models.load_model
    monkeypatch.setattr(
        models, "load_model", lambda source, **rest: loaded.append(source.settings.model) or whole(source, **rest)
    )
    out = tmp_path / "eval.json"
    stage.run(str(run_dir), overrides=(*SMALL, "score.placement=streamed"), out=out)
    assert {label: json.loads(out.read_text())[label]["reverse_kl"] for label in ("before", "after")} == {
        label: figures[label]["reverse_kl"] for label in ("before", "after")
    }
    assert set(loaded) == {"toy:student"}


def test_what_was_measured_before_the_teacher_failed_is_kept(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval.json"
    with pytest.raises(ConfigError, match=r"score\.memory_gib"):
        stage.run(str(run_dir), overrides=(*SMALL, "score.placement=streamed", "score.memory_gib=1e-9"), out=out)
    assert "accuracy, greedy" in capsys.readouterr().out
    kept = json.loads(out.read_text())
    assert "greedy" in kept["after"] and "reverse_kl" not in kept["after"]

    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    (copy / "eval.json").write_text("{}")  # of an earlier evaluation
    before = tree_digest(copy)
    with pytest.raises(ConfigError, match=r"score\.memory_gib"):
        stage.run(str(copy), overrides=(*SMALL, "score.placement=streamed", "score.memory_gib=1e-9"))
    (copy / ".lock").write_bytes((run_dir / ".lock").read_bytes())
    assert tree_digest(copy) == before and "eval.json still belongs to" in capsys.readouterr().err


def test_models_are_never_in_memory_together(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[object]] = []
    real = models.load_model

    def alone(*args: object, **kwargs: object) -> object:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        model = real(*args, **kwargs)  # type: ignore[arg-type]
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_model", alone)
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.limit=2"]) == 0
    assert len(alive) == 3


# -- what is left for the report ----------------------------------------------------------------------------------


def test_the_fresh_rollouts_are_kept_as_a_cache(
    run_dir: Path, figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path
) -> None:
    kept = shutil.copytree(run_dir, tmp_path / "run")
    assert stage.run(str(kept), overrides=[*SMALL, "eval.samples=2", "rollouts.prompts_per_block=8"]) == 0
    cache, measured = cs.open(kept / "eval.zarr"), json.loads((kept / "eval.json").read_text())
    assert list(cs.verify(cache)) == [] and cache.round_indices() == [0, 1]
    assert sorted(path.name for path in kept.glob("eval.zarr*")) == ["eval.zarr"]
    for index, label in enumerate(("before", "after")):
        round_ = cache.round(index)
        assert round_.manifest.engine == "eval" and round_.prompts[3] == load_prompts(heldout(N_PROMPTS))[3]
        assert (round_.n_blocks, bool(round_.manifest.student.adapter_digest)) == (3, label == "after")
        kl = [m.reverse_kl["teacher"] for m in scored_blocks(round_)]
        assert np.concatenate(kl).mean() == pytest.approx(measured[label]["reverse_kl"]["value"], rel=1e-6)
        tokenizer, n_right = resolve(recipes_student(kept, label).student).tokenizer, 0
        for block in range(round_.n_blocks):
            rollouts = round_.rollouts.read(block)
            for row in range(rollouts.n_rows):
                answer = round_.prompts[int(rollouts.prompt_index[rollouts.row_prompt[row]])]["answer"]
                text = tokenizer.decode(rollouts.response(row), skip_special_tokens=True)
                n_right += str(world.read_answer(text)) == answer
        assert measured[label]["sampled"]["value"] == pytest.approx(n_right / (2 * N_PROMPTS))


def test_a_kill_leaves_the_old_rollouts(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = shutil.copytree(run_dir, tmp_path / "run")
    before = tree_digest(kept / "eval.zarr")
    monkeypatch.setattr(stage, "_keep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stage.run(str(kept), overrides=[*SMALL, "eval.limit=4"])
    assert tree_digest(kept / "eval.zarr") == before
    monkeypatch.undo()
    assert stage.run(str(kept), overrides=[*SMALL, "eval.limit=4"]) == 0
    assert cs.open(kept / "eval.zarr").round().n_prompts == 4
    assert not list(kept.glob("*.partial"))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


KEPT = ("eval.json", "eval.zarr", "reread.safetensors")


def kept_digests(run: Path) -> dict[str, str]:
    return {name: tree_digest(path) if path.is_dir() else path.read_text("latin-1")
            for name in KEPT if (path := run / name).exists()}  # fmt: skip


def of_one_evaluation(run: str) -> None:
    """Of what a run holds, files of two evaluations are never believed together."""
    counts = set()
    if fault(run, "eval.json") is None:
        counts.add(json.loads(Path(run, "eval.json").read_text())["prompts"]["count"])
    if fault(run, "eval.zarr") is None:
        counts.add(cs.open(Path(run, "eval.zarr")).round(0).n_prompts)
    assert len(counts) <= 1


def test_a_kill_between_any_two_writes(run_dir: Path, figures: dict[str, object], tmp_path: Path) -> None:
    run, undisturbed = (Path(shutil.copytree(run_dir, tmp_path / name)) for name in ("run", "undisturbed"))
    settings = [f"--set={setting}" for setting in (*SMALL[1:], "eval.limit=2")]
    writes = [("eval.json", 1), ("run.json", 2)]
    killing.before_each(writes, "eval", str(run), *settings, after=(of_one_evaluation, str(run)))
    assert cli.main(["eval", str(undisturbed), *settings]) == 0
    found, expected = (json.loads((path / "eval.json").read_text()) for path in (run, undisturbed))
    assert found["before"] == expected["before"] and found["after"] == expected["after"]
    of_one_evaluation(str(run))
    assert all(fault(run, name) is None for name in KEPT) and not list(run.glob(".*.partial"))


def test_a_full_disk_leaves_the_earlier_evaluation(
    run_dir: Path, figures: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    earlier, real = kept_digests(run), stage.staged_file

    def full(path: Path, content: str | bytes) -> object:
        if path.name == "reread.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, content)

    monkeypatch.setattr(stage, "staged_file", full)
    assert cli.main(["eval", str(run), "--set", "eval.limit=2", *(f"--set={setting}" for setting in SMALL[1:])]) == 1
    said = capsys.readouterr()
    assert kept_digests(run) == earlier and not list(run.glob(".*.partial"))
    assert said.err.splitlines()[-1].startswith("redpen: ") and "No space left" in said.err.splitlines()[-1]
    assert "accuracy, greedy" in said.out, "what was measured is printed all the same"


def test_two_evaluations_of_a_run(run_dir: Path, figures: dict[str, object], tmp_path: Path) -> None:
    """One does it; the other says who does, in one line, and takes nothing from it."""
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    with (
        locked(run, "evaluates"),
        pytest.raises(RedpenError, match=f"process {os.getpid()} evaluates it"),
    ):
        stage.run(str(run), out=run / "../run/eval.json")
    small = (*SMALL, "eval.limit=2", "eval.reread_rollouts=0", "rollouts.max_response_tokens=4")
    settings = [f"--set={setting}" for setting in small]
    pair = [preloaded.python("-m", "pipeline", "eval", str(run), *settings) for _ in range(2)]
    ends = [(process.communicate(60), process.returncode) for process in pair]
    assert sorted(code for _, code in ends) in ([0, 0], [0, 1])
    for (_, err), code in ends:
        if code:
            (line,) = err.splitlines()
            assert "evaluates it; wait for it or stop it" in line
    assert cs.open(run / "eval.zarr").round(1).n_prompts == 2
    assert [fault(run, name) for name in KEPT] == [None] * 3


def test_figures_of_the_run_before_it_went_on_are_not_shown(
    run_dir: Path, figures: dict[str, object], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    assert read_run(run)["eval"] is not None
    (run / "eval.json").write_text((run / "eval.json").read_text().replace("0.", "1.", 1))
    assert read_run(run)["eval"] is None


@torch.inference_mode()
def test_the_trained_student_reads_the_worst_cached_rollouts(
    run_dir: Path, figures: dict[str, dict[str, dict[str, float]]], toy_cache: Path, tmp_path: Path
) -> None:
    """Each alone, by a plain forward over the whole vocabulary in float64."""
    kept = shutil.copytree(run_dir, tmp_path / "run")
    assert stage.run(str(kept), overrides=[*SMALL, "eval.limit=2"]) == 0
    with safe_open(kept / "reread.safetensors", "numpy") as file:
        recorded, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert about == {key: str(value) for key, value in json.loads((kept / "run.json").read_text())["cache"].items()}
    round_ = cs.open(toy_cache).round()
    worst, place = {}, {}
    for scored in scored_blocks(round_):
        rollouts = scored.rollouts
        for row in range(rollouts.n_rows):
            number = int(rollouts.prompt_index[rollouts.row_prompt[row]] * 4 + rollouts.sample_index[row])
            worst[number] = scored.reverse_kl["teacher"][rollouts.response_slice(row)].max()
            place[number] = (scored, row)
    assert recorded["numbers"].tolist() == sorted(sorted(worst, key=lambda number: -worst[number])[:7])
    assert recorded["start"].tolist() == (np.cumsum(recorded["length"]) - recorded["length"]).tolist()
    model = models.load_model(recipes_student(kept, "after").student, attention="sampling")
    for number, start, length in zip(recorded["numbers"], recorded["start"], recorded["length"], strict=True):
        scored, row = place[int(number)]
        prompt, response = scored.rollouts.prompt(row), scored.rollouts.response(row)
        sequence = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
        logp = model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(1)
        logp_TV, span = logp.numpy(), slice(int(start), int(start + length))
        candidates = scored.student.candidate_ids[scored.rollouts.response_slice(row)]
        of_candidates = np.take_along_axis(logp_TV, candidates.astype(np.int64), 1)
        np.testing.assert_allclose(recorded["logprobs"][span], logp_TV[np.arange(length), response], atol=1e-4)
        np.testing.assert_allclose(recorded["entropy"][span], -(np.exp(logp_TV) * logp_TV).sum(1), atol=1e-4)
        np.testing.assert_allclose(recorded["candidate_logprobs"][span], of_candidates, atol=1e-3)
        rest = 1 - np.exp(of_candidates).sum(1)
        np.testing.assert_allclose(np.exp(recorded["rest_logprob"][span]), rest, atol=1e-6)


def damage(cache: Path) -> None:
    overwrite_with_zeros(cache / "rounds/00000/scores/teacher/candidate_logprobs/c")


def change(cache: Path) -> None:
    cs.open(cache, writable=True).round().scores("teacher").uncommit(0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "nothing is there"),
        (damage, "candidate_logprobs"),
        (change, "has changed since (teacher digest)"),
    ],
    ids=["gone", "damaged", "changed"],
)
def test_a_cache_that_cannot_be_read_again(
    spoil: Callable[[Path], None],
    said: str,
    run_dir: Path,
    toy_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, cache = shutil.copytree(run_dir, tmp_path / "run"), shutil.copytree(toy_cache, tmp_path / "cache.zarr")
    record = read_record(kept)
    assert record is not None
    write_record(kept, record.model_copy(update={"cache": record.cache | {"url": str(cache)}}))
    spoil(cache)
    recipe = recipes_student(kept, "after")
    assert reread(kept, models.load_model(recipe.student), recipe) is None
    (line,) = (
        line for line in capsys.readouterr().err.splitlines() if "cached rollouts are not scored again" in line
    )
    assert said in line


def test_what_changed_is_shown(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.run(str(run_dir), overrides=SMALL, out=tmp_path / "eval.json") == 0
    shown = capsys.readouterr().out.partition("greedy responses changed")
    count, of, n_prompts = shown[0].split()[-3:]
    assert (of, n_prompts) == ("of", str(N_PROMPTS)) and 3 <= int(count) <= N_PROMPTS
    rows = [line.split(maxsplit=2) for line in shown[2].splitlines()[1:]]
    assert [row[0] for row in rows] == ["prompt", "before", "after"] * 3
    records = load_prompts(heldout(N_PROMPTS))
    for prompt, before, after in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        (answer,) = (record["answer"] for record in records if record["prompt"] == prompt[1])
        assert prompt[2] == f"(answer: {answer})" and before[2] != after[2]
        for _, mark, text in (before, after):
            assert (mark == "right") == (str(world.read_answer(text)) == answer)


def test_prompts_without_answers_get_no_greedy_responses(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "p.jsonl"
    records = load_prompts(heldout(6))
    prompts.write_text("".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in records))
    temperatures: list[float] = []
    sample = TransformersSampler.sample_block

    def recorded(self: TransformersSampler, block: PromptBlock) -> cs.RolloutBlock:
        temperatures.append(self._sampling.temperature)
        return sample(self, block)

    monkeypatch.setattr(TransformersSampler, "sample_block", recorded)
    out = tmp_path / "eval.json"
    assert stage.run(str(run_dir), prompts=str(prompts), overrides=SMALL, out=out) == 0
    assert temperatures == [1.0, 1.0] and "greedy" not in json.loads(out.read_text())["after"]
    assert "of 6 sampled responses changed" in capsys.readouterr().out


# -- one model ----------------------------------------------------------------------------------------------------


def test_a_bare_model_with_prompts(
    figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, heldout = resolve_path("toy:student"), asset_path("prompts/heldout.jsonl")
    settings = [*SMALL, "prompts.template=none", r"eval.answer_pattern=''=(\d+)\s*$''".replace("''", "'")]
    out = tmp_path / "eval.json"
    assert stage.run(student, prompts=str(heldout), overrides=settings, out=out) == 0
    measured = json.loads(out.read_text())
    assert measured["model"]["greedy"] == figures["before"]["greedy"] and "reverse_kl" not in measured["model"]
    assert "change" not in capsys.readouterr().out


def test_the_embedded_models_need_nothing_else(
    figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    assert stage.run("toy:student", teacher="toy:teacher", overrides=SMALL, out=out) == 0
    measured = json.loads(out.read_text())["model"]
    assert measured["greedy"] == figures["before"]["greedy"]
    assert measured["reverse_kl"]["value"] == pytest.approx(figures["before"]["reverse_kl"]["value"], rel=1e-6)


def test_a_recipe_brings_its_teacher(figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    assert stage.run(resolve_path("toy:student"), recipe="toy", overrides=SMALL, out=out) == 0
    measured = json.loads(out.read_text())
    assert measured["teacher"] == "toy:teacher"
    assert measured["model"]["reverse_kl"]["value"] == pytest.approx(
        figures["before"]["reverse_kl"]["value"], rel=1e-6
    )


# -- what is refused ----------------------------------------------------------------------------------------------


def unfinished(run: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "adapter")
    return copy


REFUSED: dict[str, tuple[Callable[[Path, Path], str | Path], dict[str, object], type[Exception], str]] = {
    "an unfinished run": (unfinished, {}, RedpenError, "has no adapter yet; finish it with the same `redpen train`"),
    "a recipe beside a run": (lambda run, _: run, {"recipe": "toy"}, ConfigError, "brings its own recipe"),
    "an unknown setting": (
        lambda run, _: run,
        {"overrides": ["eval.sample=3"]},
        ConfigError,
        "did you mean eval.samples",
    ),
    "neither run nor model": (lambda _, tmp: tmp, {"prompts": "toy:heldout"}, RedpenError, "expected a run of"),
    "no such model": (lambda _, tmp: tmp / "nowhere", {"prompts": "toy:heldout"}, ModelError, "no such directory"),
    "a model without prompts": (
        lambda *_: resolve_path("toy:student"),
        {},
        ConfigError,
        "give the prompts with --prompts",
    ),
    "no such prompts": (lambda run, _: run, {"prompts": "nowhere.jsonl"}, PromptError, "nowhere.jsonl"),
    "prompts too long": (
        lambda run, _: run,
        {"overrides": ["rollouts.max_prompt_tokens=3"]},
        PromptError,
        "set rollouts.max_prompt_tokens to",
    ),
    "prompts too long, by their own name": (
        lambda run, _: run,
        {"prompts": "toy:heldout", "overrides": ["rollouts.max_prompt_tokens=3", "prompts.path=toy:train"]},
        PromptError,
        "toy:heldout: prompt 1:",
    ),
    "no such prompts, by their setting": (
        lambda run, _: run,
        {"overrides": ["eval.path=nowhere.jsonl"]},
        PromptError,
        "set eval.path",
    ),
    "responses beyond the context": (
        lambda run, _: run,
        {"overrides": ["eval.max_response_tokens=512"]},
        ConfigError,
        "eval.max_response_tokens: expected at most",
    ),
    "responses beyond the context, by rollouts": (
        lambda *_: "toy:student",
        {"overrides": ["rollouts.max_response_tokens=512"]},
        ConfigError,
        "rollouts.max_response_tokens: expected at most",
    ),
    "responses beyond the teacher's context": (
        lambda _, tmp: "toy:student",
        {"teacher": "SHORT", "overrides": ["eval.max_response_tokens=100"]},
        ConfigError,
        "short's context of 64 tokens",
    ),
    "a teacher without prompts": (
        lambda *_: resolve_path("toy:student"),
        {"teacher": "toy:teacher", "tasks": ["ifeval"]},
        ConfigError,
        "--teacher toy:teacher: ",
    ),
    "an empty name": (lambda run, _: run, {"prompts": ""}, ConfigError, "--prompts: expected a file"),
    "an empty place": (lambda run, _: run, {"out": ""}, ConfigError, "--out: expected a file"),
    "a directory for the figures": (lambda run, _: run, {"out": "."}, ConfigError, "--out .: expected a file"),
    "figures over something else": (
        lambda run, _: run,
        {"out": Path(__file__)},
        RedpenError,
        "test_evaluate.py: exists and is not the figures of an evaluation",
    ),
    "tasks said twice": (
        lambda run, _: run,
        {"tasks": ["a"], "overrides": ["eval.tasks=['b']"]},
        ConfigError,
        "--set eval.tasks and --tasks",
    ),
    "prompts said twice": (
        lambda run, _: run,
        {"prompts": "toy:heldout", "overrides": ["eval.path=toy:train"]},
        ConfigError,
        "--set eval.path and --prompts",
    ),
    "another student": (lambda run, _: run, {"overrides": ["student.model=x"]}, ConfigError, "--set student.model"),
    "a setting of training": (lambda run, _: run, {"overrides": ["train.steps=9"]}, ConfigError, "--set train.steps"),
}


@pytest.mark.parametrize(("target", "options", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_measured_is_one_line(
    target: Callable[[Path, Path], str | Path],
    options: dict[str, object],
    kind: type[Exception],
    message: str,
    run_dir: Path,
    tmp_path: Path,
) -> None:
    if options.get("teacher") == "SHORT":
        short = Path(shutil.copytree(resolve_path("toy:teacher"), tmp_path / "short"))
        facts = json.loads((short / "config.json").read_text())
        (short / "config.json").write_text(json.dumps(facts | {"max_position_embeddings": 64}))
        options = options | {"teacher": str(short)}
    with pytest.raises(kind) as caught:
        stage.run(str(target(run_dir, tmp_path)), **options)  # type: ignore[arg-type]
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_without_answers(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"prompt": p.prompt}) + "\n" for p in world.sample("heldout", 4, 0)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    assert stage.run("toy:student", prompts=str(tmp_path / "p.jsonl"), overrides=["eval.format="]) == 0
    said = capsys.readouterr()
    assert "length, mean tokens" in said.out and "the first of 4 sampled responses:" in said.out
    assert "reverse KL" not in said.out and "4 of 4 prompts have no answer; accuracy is not measured" in said.err
    assert stage.run(str(run_dir), prompts=str(tmp_path / "p.jsonl")) == 0
    said = capsys.readouterr()
    assert "reverse KL" in said.out and "accuracy" not in said.out
    assert "4 of 4 prompts have no answer" in said.err


def test_a_run_outlives_its_teacher(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy needs no teacher; one that was asked for by name is still required."""
    gone = f"teacher.model={tmp_path / 'gone'}"
    out = tmp_path / "eval.json"
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.limit=4", gone], out=out) == 0
    said = capsys.readouterr()
    assert "no such directory" in said.err and "reverse KL is left out" in said.err
    assert "accuracy" in said.out and "reverse_kl" not in json.loads(out.read_text())["after"]
    with pytest.raises(ModelError, match="no such directory"):
        stage.run(str(run_dir), teacher=str(tmp_path / "gone"), overrides=SMALL)


def test_a_run_that_learned_from_no_teacher_is_compared_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A control, or rewards alone: its record names none."""
    (tmp_path / RECORD).write_text(json.dumps({"cache": {"url": "c", "teacher": ""}}))
    assert job._run_teacher(load_recipe("toy-ensemble"), tmp_path).name == "teacher"
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path} learned from no teacher; reverse KL is to teacher alone" in said
