"""Rounds: each student samples the next round, the optimizer goes on, and a kill anywhere changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import cache_schema as cs
from helpers import preloaded
from helpers.caches import SMALL, small_recipe
from helpers.training import curve
from pipeline import distill
from pipeline.cli import main
from pipeline.config import Recipe
from pipeline.distill import Measurement, RoundResult, final_result
from pipeline.errors import RedpenError
from pipeline.evaluate import stage as evaluate
from pipeline.models.resolve import resolve
from pipeline.rounds.metrics import scores_reverse_kl

Make = Callable[..., Recipe]

ROUNDS = (
    "distill.rounds=2",
    "prompts.limit=12",
    "distill.learning_rate_decay=0.5",
    "distill.max_response_tokens=[24,32]",
    "train.steps=3",
    "train.checkpoint_every=1",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished `run` of two rounds, and its cache."""
    path = tmp_path_factory.mktemp("distill")
    assert distill.run(small_recipe(*ROUNDS), str(path / "cache.zarr"), path / "run") == 0
    return path


def test_each_round_is_sampled_by_the_student_before(undisturbed: Path) -> None:
    cache, run = cs.open(undisturbed / "cache.zarr"), undisturbed / "run"
    assert cache.round_indices() == [0, 1] and not list(cs.verify(cache))
    first, second = cache.round(0), cache.round(1)
    adapter = resolve(small_recipe(f"student.adapter={run / 'rounds/00000/adapter'}").student).identity
    assert first.manifest.student.adapter_digest is None
    assert second.manifest.student.adapter_digest == adapter.adapter_digest is not None
    assert [round_.manifest.max_response_tokens for round_ in (first, second)] == [24, 32]
    asked = [{round_.prompts[i]["prompt"] for i in range(12)} for round_ in (first, second)]
    assert not asked[0] & asked[1], "the next prompts of the file"


def test_a_round_of_one_student_goes_on_where_the_last_ended(undisturbed: Path) -> None:
    """Adam's step count shows whether its moments came along."""
    rounds = undisturbed / "run/rounds"
    counts = [
        {
            float(v)
            for name, v in load_file(rounds / place / "optimizer.safetensors").items()
            if name.endswith("/step")
        }
        for place in ("00000/checkpoints/step-00000003", "00001/checkpoints/step-00000003")
    ]
    assert counts == [{3.0}, {6.0}]


def test_a_rounds_standard_error_and_learning_rate(undisturbed: Path) -> None:
    """The standard error is that of a ratio of sums by prompt, here as in a textbook's formula."""
    round_ = cs.open(undisturbed / "cache.zarr").round(0)
    sums, counts = np.zeros(12), np.zeros(12)
    for block in range(round_.n_blocks):
        rollouts = round_.rollouts.read(block)
        student, teacher = (round_.scores(name).read(block) for name in ("student", "teacher"))
        kl = scores_reverse_kl(student, teacher)
        for row in range(rollouts.n_rows):
            prompt, here = int(rollouts.prompt_index[rollouts.row_prompt[row]]), rollouts.response_slice(row)
            sums[prompt] += kl[here].sum()
            counts[prompt] += rollouts.response_length[row]
    mean = sums.sum() / counts.sum()
    error = np.sqrt(np.square(sums - mean * counts).sum()) / counts.sum()
    measured = distill.fresh_reverse_kl(small_recipe(*ROUNDS), str(undisturbed / "cache.zarr"), 0)
    assert measured.value == pytest.approx(mean, rel=1e-6) and measured.error == pytest.approx(error, rel=1e-5)
    assert measured.error > 0
    rates = [line["lr"] for line in curve(undisturbed / "run")]
    assert rates == pytest.approx([1e-3] * 3 + [5e-4] * 3)


def test_the_result_is_one_run(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = undisturbed / "run"
    last = run / "rounds/00001/adapter/adapter_model.safetensors"
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == last.read_bytes()
    assert [(line["round"], line["step"]) for line in curve(run)] == [(i // 3, i + 1) for i in range(6)]
    ledgers = [json.loads((path / "ledger.json").read_text()) for path in (run, *sorted(run.glob("rounds/*")))]
    assert ledgers[0]["train"]["tokens"] == sum(ledger["train"]["tokens"] for ledger in ledgers[1:])
    assert set(ledgers[0]) == {"rollouts", "score student", "score teacher", "train"}
    capsys.readouterr()
    assert evaluate.run(str(run), overrides=("eval.limit=8",)) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["report", str(run), "-o", str(undisturbed / "report.html")]) == 0
    assert f"learned from {undisturbed / 'cache.zarr'}, all rounds" in capsys.readouterr().err


def test_a_finished_run_says_so_and_more_rounds_go_on(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, run = str(undisturbed / "cache.zarr"), undisturbed / "run"
    before = (run / "run.json").read_bytes()
    assert distill.run(small_recipe(*ROUNDS), cache, run) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{run}: max rounds: 2 rounds done", f"adapter: {run / 'adapter'}"]
    assert err.startswith(f"next: `redpen eval {run}`")
    assert (run / "run.json").read_bytes() == before
    with pytest.raises(RedpenError, match=r"train\.learning_rate = 0\.001, now 0\.1"):
        distill.run(small_recipe(*ROUNDS, "train.learning_rate=0.1"), cache, run)


def test_killed_while_it_trains_and_while_it_samples_again(undisturbed: Path, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache.zarr", tmp_path / "run"
    settings = [part for setting in (*SMALL, *ROUNDS) for part in ("--set", setting)]
    command = ["-m", "pipeline", "distill", "toy", "--cache", str(cache), "--run", str(run), *settings]
    moments = (
        lambda: (cache / "rounds/00000/scores/student/commit/c").exists(),  # sampled, the student reads
        lambda: (run / "rounds/00000/checkpoints/step-00000002").exists(),  # trains
        lambda: (cache / "rounds/00001/rollouts/commit/c").exists(),  # samples again
    )
    for reached in moments:
        process = preloaded.python(*command)
        while not reached() and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    done = preloaded.python(*command)
    _, err = done.communicate()
    assert done.returncode == 0, err
    assert err.count("next:") == 1, "stages do not suggest what distill does itself"
    assert curve(run) == curve(undisturbed / "run")
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / "run" / name).read_bytes()


def found(
    *kls: float, error: float = 0.0, heldout: tuple[float, ...] = (), trained: bool = False
) -> list[RoundResult]:
    """Rounds of these fresh reverse KLs; all but the last have trained."""
    rounds = []
    for index, kl in enumerate(kls):
        done = trained or index < len(kls) - 1
        rounds.append(
            RoundResult(Measurement(kl, error), heldout[index] if heldout and done else None, 5 if done else None)
        )
    return rounds


@pytest.mark.parametrize(
    ("settings", "rounds", "kept", "sentence"),
    [
        ((), found(0.1), None, None),
        ((), found(0.1, 0.05, trained=True), None, None),
        ((), found(0.1, 0.0019), 1, "converged after 1 round: reverse KL on fresh rollouts is 0.00190"),
        ((), found(0.1, 0.0019, error=0.0002), None, None),
        ((), found(0.1, 0.05, 0.06), None, None),
        ((), found(0.1, 0.05, 0.06, 0.07), 1, "plateau after 3 rounds: no better reverse KL on fresh rollouts"),
        (
            (),
            found(0.1, 0.05, 0.06, 0.09, error=0.01),
            2,
            "plateau after 3 rounds: no better reverse KL on fresh rollouts in the last 2; the result is the student "
            "of round 1",
        ),
        ((), found(0.1, 0.05, 0.04, 0.03, trained=True), 4, "max rounds: 4 rounds done"),
        (("accuracy",), found(0.1, 0.2, 0.3, heldout=(0.5, 0.7, 0.9), trained=True), None, None),
        (
            ("accuracy",),
            found(0.1, 0.2, 0.3, heldout=(0.9, 0.8, 0.9), trained=True),
            1,
            "plateau after 3 rounds: no better held-out accuracy in the last 2; the result is the student of round 0",
        ),
        (
            ("format",),
            found(0.1, 0.2, 0.3, heldout=(0.8, 0.9, 0.85), trained=True),
            None,
            None,
        ),
        (
            ("format",),
            found(0.1, 0.2, 0.3, heldout=(0.9, 0.8, 0.85), trained=True),
            1,
            "plateau after 3 rounds: no better held-out format in the last 2",
        ),
        (
            ("reverse_kl",),
            found(0.1, 0.2, 0.3, heldout=(0.1, 0.2, 0.15), trained=True),
            1,
            "plateau after 3 rounds: no better held-out reverse KL in the last 2",
        ),
        (("accuracy",), found(0.1, 0.09, 0.0, heldout=(0.5, 0.6)), 2, "converged"),
    ],
)
def test_when_rounds_end(
    recipe: Make, settings: tuple[str, ...], rounds: list[RoundResult], kept: int | None, sentence: str | None
) -> None:
    overrides = ["distill.rounds=4", "distill.patience=2", *(f"train.heldout_metric={name}" for name in settings)]
    result = final_result(recipe(*overrides), rounds)
    if kept is None:
        assert result is None
    else:
        assert result is not None and (result.step, result.exit_code) == (kept, 0)
        assert sentence is not None and result.sentence.startswith(sentence)


@pytest.mark.parametrize(
    ("rounds", "kept"),
    [
        (found(0.001), None),  # of the shortest responses
        (found(0.001, 0.002, trained=True), None),
        (found(0.001, 0.002, 0.001), 2),
        (found(0.001, 0.002, 0.3, 0.4), None),  # the first two are of shorter responses
        (found(0.001, 0.002, 0.3, 0.4, 0.5), 2),
    ],
)
def test_rounds_of_growing_limits_are_compared_at_the_last(
    recipe: Make, rounds: list[RoundResult], kept: int | None
) -> None:
    of_rounds = ["distill.rounds=6", "distill.patience=2", "distill.max_response_tokens=[4,8,16]"]
    result = final_result(recipe(*of_rounds), rounds)
    assert (None if result is None else result.step) == kept


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 0.9), ("format", 0.9), ("reverse_kl", 0.2)])
def test_of_a_rounds_measurements_the_best_counts(metric: str, best: float, recipe: Make, tmp_path: Path) -> None:
    values = enumerate((0.2, 0.9, 0.5), 1)
    lines = [json.dumps({"step": step, f"heldout_{metric}": value}) + "\n" for step, value in values]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    recorded = distill._after_training(
        RoundResult(Measurement(0.1)), recipe(f"train.heldout_metric={metric}"), tmp_path
    )
    assert (recorded.steps, recorded.heldout) == (3, best)


def test_a_round_that_the_student_has_left_makes_room_for_the_next(tmp_path: Path) -> None:
    """By the drift gauge, which for `redpen train` alone is an exit code."""
    run = tmp_path / "run"
    settings = (
        *ROUNDS,
        "train.steps=20",
        "train.stale_ess=0.99999",
        "train.stop_window=2",
        "train.stop_reverse_kl=0",
        "distill.carry=adapter",
    )
    assert distill.run(small_recipe(*settings), str(tmp_path / "c.zarr"), run) == 0
    for index in range(2):
        result = json.loads((run / f"rounds/{index:05d}/run.json").read_text())["result"]
        assert "stale" in result["sentence"] and 0 < result["step"] < 20
        moments = load_file(run / f"rounds/{index:05d}/checkpoints/step-{result['step']:08d}/optimizer.safetensors")
        assert {float(v) for name, v in moments.items() if name.endswith("/step")} == {float(result["step"])}, "new"
    assert (run / "adapter").is_dir()
