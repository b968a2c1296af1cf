"""Stage two: gradients against a naive oracle, what is loaded and touched, what is refused, and how a run ends."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

import cache_schema as cs
import pipeline.score.stage
from helpers import cache_factory as factory
from helpers.caches import make_cache, small_recipe, tree_digest
from helpers.training import curve, distance, flat_gradient, gradient, moved, naive_gradient, trainer_of
from pipeline.config import Recipe
from pipeline.errors import ConfigError, ModelError, RedpenError
from pipeline.models import lora
from pipeline.models.paths import resolve_path
from pipeline.train import ledger, stage
from pipeline.train.packs import tokens_of
from pipeline.train.trainer import learning_rate

Make = Callable[..., Recipe]


# -- the gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["reverse_kl", "importance_sampling"])
def test_gradient_is_that_of_the_formula(loss: str, toy_cache: Path, recipe: Make) -> None:
    trainer, replay = trainer_of(toy_cache, recipe(f"train.loss={loss}"))
    moved(trainer)
    batch = replay.batch(1)
    assert distance(gradient(trainer, batch), naive_gradient(trainer, batch, loss)) < 1e-5


@pytest.mark.parametrize("loss", ["reverse_kl", "importance_sampling"])
def test_gradient_and_metrics_do_not_depend_on_micro_batches(loss: str, toy_cache: Path, recipe: Make) -> None:
    results = []
    for budget, chunk in ((10_000, 1024), (100, 1024), (60, 7), (30, 1024)):
        settings = [f"train.tokens_per_microbatch={budget}", f"train.rows_per_chunk={chunk}"]
        trainer, replay = trainer_of(toy_cache, recipe(f"train.loss={loss}", *settings))
        batch = replay.batch(0)
        sums = moved(trainer).gradient(batch)
        results.append((len(batch.micro_batches(budget)), flat_gradient(trainer), sums.metrics()))
    assert [n for n, _, _ in results] == sorted({n for n, _, _ in results}), "budgets that make no difference"
    _, whole, metrics = results[0]
    for _, other, same in results[1:]:
        assert distance(other, whole) < 1e-5
        assert same == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_a_gradient_starts_from_nothing(toy_cache: Path, recipe: Make) -> None:
    trainer, replay = trainer_of(toy_cache, recipe())
    first = gradient(moved(trainer), replay.batch(0))
    trainer.model.zero_grad()
    assert torch.equal(gradient(trainer, replay.batch(0)), first)


def test_prompts_that_are_shared_change_nothing_but_the_work(toy_cache: Path, recipe: Make) -> None:
    read, gradients, measured = [], [], []
    for share in (1, 1000):
        trainer, replay = trainer_of(toy_cache, recipe(f"train.share_prompts_from={share}"))
        batch = replay.batch(0)
        measured.append(moved(trainer).gradient(batch).metrics())
        gradients.append(flat_gradient(trainer))
        read.append(tokens_of(batch.rows(share)))
    assert read[0] < read[1] == sum(rollout.n_tokens for rollout, _ in batch.distinct)
    assert distance(*gradients) < 1e-5
    assert measured[0] == pytest.approx(measured[1], rel=1e-4, abs=1e-6)


def test_ranks_add_up_to_one_process(toy_cache: Path, recipe: Make) -> None:
    trainer, replay = trainer_of(toy_cache, recipe())
    batch = replay.batch(0)
    whole = gradient(moved(trainer), batch)
    parts = torch.zeros_like(whole)
    for rank in range(3):
        for parameter in trainer.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for micro_batch in batch.micro_batches(100, rank, 3):
            trainer._forward(micro_batch, batch.n_tokens)[0].backward()
        parts += flat_gradient(trainer)
    assert distance(parts, whole) < 1e-5


def test_tokens_that_are_not_trained_do_not_move_the_student(toy_cache: Path, recipe: Make) -> None:
    """What a tool wrote, say: neither in the loss nor in its denominator, whatever the teacher thinks of it."""
    trainer, replay = trainer_of(toy_cache, recipe())
    batch = replay.batch(0)
    for rollout in batch.rollouts:
        where = rollout.block.rollouts.response_slice(rollout.row)
        rollout.block.weights[where.start : where.start + 3] = 0
    expected = gradient(moved(trainer), batch)
    for rollout in batch.rollouts:
        where = rollout.block.rollouts.response_slice(rollout.row)
        rollout.block.columns["teacher/candidate_logprobs"][where.start : where.start + 3] -= 5
    assert torch.equal(gradient(trainer, batch), expected)
    assert batch.n_tokens == sum(len(r.weights) - 3 for r in batch.rollouts)


def test_the_teachers_own_candidates_join(tmp_path: Path, recipe: Make) -> None:
    """With a teacher's top-k stored, C is the union without repeats and the rest is what is outside both."""
    cache = make_cache(tmp_path / "c.zarr", recipe("score.candidates=2", "score.teacher_topk=4", "prompts.limit=4"))
    trainer, replay = trainer_of(cache, recipe("train.prompts_per_step=4"))
    batch = replay.batch(0)
    moved(trainer)
    sums = trainer.gradient(batch)
    total, n_tokens = 0.0, 0
    for rollout in batch.rollouts:
        ids = torch.from_numpy(rollout.token_ids).long()
        with torch.no_grad():
            logits = trainer.model(input_ids=ids[None], use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
        logp = logits.double().log_softmax(1).numpy()
        for t in range(len(logp)):
            teacher = dict(zip(rollout.column("student/candidate_ids")[t].tolist(),
                               rollout.column("teacher/candidate_logprobs")[t].tolist(), strict=True))  # fmt: skip
            teacher |= dict(zip(rollout.column("teacher/topk_ids")[t].tolist(),
                                rollout.column("teacher/topk_logprobs")[t].tolist(), strict=True))  # fmt: skip
            chosen = list(teacher)
            rest = np.log(np.exp(np.delete(logp[t], chosen)).sum())
            teacher_rest = float(rollout.column("teacher/topk_rest_logprob")[t])
            total += sum(np.exp(logp[t, v]) * (logp[t, v] - teacher[v]) for v in chosen)
            total += np.exp(rest) * (rest - teacher_rest)
        n_tokens += len(logp)
    assert sums.metrics()["reverse_kl"] == pytest.approx(total / n_tokens, rel=1e-4)
    assert sums.metrics()["loss"] == pytest.approx(total / n_tokens, rel=1e-4)


def test_a_teacher_that_is_the_student_teaches_nothing(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    cache = Path(shutil.copytree(toy_cache, tmp_path / "c.zarr"))
    twin = recipe("teacher.name=twin", "teacher.model=toy:student")
    pipeline.score.stage.run(twin, str(cache), "twin")
    for loss in ("reverse_kl", "importance_sampling"):
        settings = recipe(f"train.loss={loss}", "train.prompts_per_step=24", "train.tokens_per_microbatch=8192")
        normal, replay = trainer_of(cache, settings, "teacher")
        reference = float(gradient(normal, replay.batch(0)).norm())
        trainer, replay = trainer_of(cache, settings, "twin")
        batch = replay.batch(0)
        for rollout in batch.rollouts:
            gap = rollout.column("student/logprobs") - rollout.column("twin/logprobs")
            assert np.abs(gap).max() <= 1e-5
        assert float(gradient(trainer, batch).norm()) <= 1e-6 * reference


def test_dropout_is_a_function_of_seed_and_step(toy_cache: Path, recipe: Make) -> None:
    trainer, replay = trainer_of(toy_cache, recipe("train.lora_dropout=0.3"))
    batch = replay.batch(0)
    first = gradient(moved(trainer), batch)
    torch.rand(7)
    assert torch.equal(gradient(trainer, batch), first)
    trainer.step = 1
    assert not torch.equal(gradient(trainer, batch), first)


def test_checkpointed_activations_give_the_same_gradient(toy_cache: Path, recipe: Make) -> None:
    plain, replay = trainer_of(toy_cache, recipe())
    saving, _ = trainer_of(toy_cache, recipe("train.gradient_checkpointing=true"))
    layers = [m for m in saving.model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert any(layer.training for layer in layers)
    batch = replay.batch(0)
    assert distance(gradient(moved(saving), batch), gradient(moved(plain), batch)) < 1e-5


# -- the adapter --------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_follows_from_the_seed_and_leaves_the_head(toy_cache: Path, recipe: Make) -> None:
    def fresh(*overrides: str) -> dict[str, torch.Tensor]:
        torch.rand(3)
        trainer, _ = trainer_of(toy_cache, recipe(*overrides))
        return {name: p.detach().clone() for name, p in trainer.parameters.items()}

    one, same, other = fresh(), fresh(), fresh("train.seed=1")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert not any("lm_head" in name or "embed" in name for name in one)
    assert {name.split(".")[-4] for name in one} == set(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert all(p.dtype == torch.float32 for p in fresh("student.dtype=bfloat16").values())


def test_unknown_targets_and_the_head_are_refused(toy_cache: Path, recipe: Make) -> None:
    with pytest.raises(ModelError, match=r"train\.lora_targets"):
        trainer_of(toy_cache, recipe('train.lora_targets=["no_such_layer"]'))
    with pytest.raises(ModelError, match="lm_head"):
        trainer_of(toy_cache, recipe('train.lora_targets=["lm_head"]'))


def test_an_adapted_student_goes_on_with_its_adapter(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    trainer, _ = trainer_of(toy_cache, recipe())
    lora.save(moved(trainer).model, trainer.weights(), tmp_path / "adapter", recipe().student, "")
    adapted = f"student.adapter={tmp_path / 'adapter'}"
    again, _ = trainer_of(toy_cache, recipe(adapted))
    assert again.parameters.keys() == trainer.parameters.keys()
    assert all(torch.equal(p, trainer.parameters[name]) for name, p in again.parameters.items())
    with pytest.raises(ModelError, match="r 4 "):
        trainer_of(toy_cache, recipe(adapted, "train.lora_rank=8"))


def test_learning_rate_schedules() -> None:
    def rates(schedule: str, warmup: int = 0) -> list[float]:
        train = small_recipe(
            f"train.schedule={schedule}", "train.learning_rate=1", f"train.warmup_steps={warmup}", "train.steps=4"
        ).train
        return [learning_rate(train, step) for step in range(4)]

    assert rates("constant") == [1, 1, 1, 1]
    assert rates("linear") == [1, 0.75, 0.5, 0.25]
    assert rates("linear", warmup=2) == [0.5, 1, 1, 0.5]
    assert rates("cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates("constant", warmup=4) == [0.25, 0.5, 0.75, 1]


def test_a_loss_that_is_not_finite_moves_nothing(toy_cache: Path, recipe: Make) -> None:
    trainer, replay = trainer_of(toy_cache, recipe())
    batch = replay.batch(0)
    batch.rollouts[0].column("teacher/candidate_logprobs")[0, 0] = -np.inf
    before = [p.detach().clone() for p in trainer.parameters.values()]
    with pytest.raises(RedpenError, match="step 1: loss inf"):
        trainer.update(batch)
    assert trainer.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters.values(), strict=True))


# -- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps."""
    run = tmp_path_factory.mktemp("run") / "a"
    assert stage.run(small_recipe(), str(toy_cache), run) == 0
    return run


def test_only_the_student_is_loaded_and_the_cache_untouched(
    toy_cache: Path, tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's teacher does not even exist any more, and every model that transformers opens is written down."""
    opened: list[str] = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def record(**kwargs: object) -> object:
        opened.append(str(kwargs["pretrained_model_name_or_path"]))
        return real(**kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    before = tree_digest(toy_cache)
    gone = recipe(f"teacher.model={tmp_path / 'deleted'}", "train.steps=2")
    assert stage.run(gone, str(toy_cache), tmp_path / "run") == 0
    assert opened == [resolve_path("toy:student")]
    assert tree_digest(toy_cache) == before


def test_a_run_leaves_the_documented_files(finished: Path, toy_cache: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        ".lock", "recipe.toml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "adapter", "ledger.json"
    }  # fmt: skip
    lines = curve(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0].keys() >= {
        "loss", "reverse_kl", "sampled_logprob_gap", "entropy", "grad_norm", "lr", "ess", "ratio_mean", "ratio_max",
        "chi_square", "tokens", "rows", "distinct_rows", "tokens_read",
    }  # fmt: skip
    assert lines[0]["ess"] == pytest.approx(1) and lines[0]["rows"] == 16
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]
    assert small_recipe().to_toml() == (finished / "recipe.toml").read_text()

    round_ = cs.open(toy_cache).round()
    spent = json.loads((finished / "ledger.json").read_text())
    assert spent.keys() == {"rollouts", "score student", "score teacher", "train"}
    assert spent["score teacher"]["tokens"] == sum(
        int(b.prompt_length[b.row_prompt].sum()) + b.n_tokens for b in map(round_.rollouts.read, range(6))
    )
    n_student = ledger.parameters(small_recipe().student)
    assert spent["rollouts"]["flops"] == 2 * n_student * spent["rollouts"]["tokens"]
    assert spent["train"]["tokens"] == sum(line["tokens_read"] for line in lines)
    assert spent["train"]["flops"] > 4 * n_student * spent["train"]["tokens"] and spent["train"]["seconds"] > 0


def test_first_metrics_are_those_of_the_cache(finished: Path, toy_cache: Path) -> None:
    """Before its first update the student is the cached one, so its reverse KL can be computed from the cache
    alone."""
    from pipeline.rounds.metrics import reverse_kl

    _, replay = trainer_of(toy_cache, small_recipe())
    kl, gap = [], []
    for rollout in replay.batch(0).rollouts:
        block = rollout.prompt_index // 4
        student = cs.open(toy_cache).round().scores("student").read(block)
        where = rollout.block.rollouts.response_slice(rollout.row)
        teacher, rest = rollout.column("teacher/candidate_logprobs"), rollout.column("teacher/rest_logprob")
        kl += reverse_kl(student.candidate_logprobs[where], student.rest_logprob[where], teacher, rest).tolist()
        gap += (rollout.column("student/logprobs") - rollout.column("teacher/logprobs")).tolist()
    first = curve(finished)[0]
    assert first["reverse_kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert first["sampled_logprob_gap"] == pytest.approx(np.mean(gap), rel=1e-4)
    assert first["tokens"] == len(kl)


def test_importance_sampling_reports_the_same_reverse_kl(
    toy_cache: Path, finished: Path, tmp_path: Path, recipe: Make
) -> None:
    assert stage.run(recipe("train.loss=importance_sampling", "train.steps=1"), str(toy_cache), tmp_path / "is") == 0
    one, other = curve(tmp_path / "is")[0], curve(finished)[0]
    assert one["reverse_kl"] == pytest.approx(other["reverse_kl"], rel=1e-6) and one["loss"] != other["loss"]


def test_plain_peft_loads_the_adapter(finished: Path, toy_cache: Path) -> None:
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    loaded = peft.PeftModel.from_pretrained(base, finished / "adapter")
    trainer, replay = trainer_of(toy_cache, small_recipe())
    from pipeline.runs import checkpoint

    trainer.restore(checkpoint.load(finished / "checkpoints" / "step-00000005"))
    ids = torch.from_numpy(replay.batch(0).rollouts[0].token_ids).long()[None]
    with torch.no_grad():
        theirs, ours = loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits
        with loaded.disable_adapter():
            without = loaded(input_ids=ids).logits
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert not torch.allclose(theirs, without, atol=1e-2)


def test_tensorboard_holds_the_curve(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    drawn = {event.step: event.value for event in events.Scalars("train/reverse_kl")}
    assert drawn == pytest.approx({int(line["step"]): line["reverse_kl"] for line in curve(finished)}, rel=1e-6)


def test_a_finished_run_is_left_alone(finished: Path, toy_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree_digest(finished)
    assert stage.run(small_recipe(), str(toy_cache), finished) == 0
    assert "is finished: max steps: 5 done" in capsys.readouterr().out
    assert tree_digest(finished) == before


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.lora_rank=8"], "train.lora_rank = 4, now 8"),
        (["train.steps=4", "train.seed=3"], "train.steps = 5, now 4; train.seed = 0, now 3"),
        (["student.dtype=bfloat16"], "student.dtype = float32, now bfloat16"),
    ],
)
def test_a_run_of_another_recipe_is_refused(
    overrides: list[str], named: str, finished: Path, toy_cache: Path, recipe: Make
) -> None:
    with pytest.raises(RedpenError) as caught:
        stage.run(recipe(*overrides), str(toy_cache), finished)
    assert named in str(caught.value) and "another --run" in str(caught.value) and "\n" not in str(caught.value)


def test_operational_settings_may_change(finished: Path, toy_cache: Path, recipe: Make) -> None:
    settings = recipe(
        "train.tokens_per_microbatch=999", "train.checkpoint_every=1", "train.gradient_checkpointing=true"
    )
    assert stage.run(settings, str(toy_cache), finished) == 0


def test_a_run_on_another_cache_is_refused(finished: Path, tmp_path: Path, recipe: Make) -> None:
    other = make_cache(tmp_path / "other.zarr", recipe("rollouts.seed=1"))
    with pytest.raises(RedpenError, match=r"rollouts digest: \w+, now \w+.*another --run"):
        stage.run(small_recipe(), str(other), finished)


def test_a_run_that_never_took_a_step_may_change(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    """What went wrong before the first checkpoint can be put right without another --run."""
    run = tmp_path / "run"
    with pytest.raises(ModelError):
        stage.run(recipe('train.lora_targets=["no_such_layer"]'), str(toy_cache), run)
    assert stage.run(recipe(), str(toy_cache), run) == 0


def test_a_directory_of_something_else_is_refused(toy_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RedpenError, match=r"found thesis\.tex; choose another --run"):
        stage.run(small_recipe(), str(toy_cache), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_train_one_run(toy_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RedpenError, match="another process is working on it"):
            stage.run(small_recipe(), str(toy_cache), run)


def test_a_full_disk_is_one_line(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runs import checkpoint

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(RedpenError, match=r"No space left on device.*run the same command again"):
            stage.run(small_recipe(), str(toy_cache), run)
    assert stage.run(small_recipe(), str(toy_cache), run) == 0
    assert len(curve(run)) == 5


# -- how training ends --------------------------------------------------------------------------------------------


def test_a_run_stops_when_the_round_is_done(
    toy_cache: Path, tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    easy = recipe("train.stop_reverse_kl=5", "train.stop_window=2")
    assert stage.run(easy, str(toy_cache), tmp_path / "run") == 0
    assert "round done after 2 steps" in capsys.readouterr().out
    assert len(curve(tmp_path / "run")) == 2 and (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_a_stale_cache_ends_a_run_with_code_3(
    toy_cache: Path, tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = recipe("train.stale_ess=0.9999", "train.stop_window=1", "train.learning_rate=0.01")
    for _ in range(2):  # the second time it only says so again
        assert stage.run(strict, str(toy_cache), tmp_path / "run") == 3
        assert "stale after 2 steps: the effective sample size is" in capsys.readouterr().out


# -- caches that do not fit ---------------------------------------------------------------------------------------


def no_cache(path: Path, _: Path) -> None:
    pass


def not_a_cache(path: Path, _: Path) -> None:
    path.mkdir()
    (path / "data.bin").write_bytes(b"x")


def not_sampled(path: Path, _: Path) -> None:
    cs.create(path)


def copied(change: Callable[[cs.Round], None]) -> Callable[[Path, Path], None]:
    def make(path: Path, toy: Path) -> None:
        shutil.copytree(toy, path)
        change(cs.open(path, writable=True).round())

    return make


def without(group: str) -> Callable[[Path, Path], None]:
    def make(path: Path, toy: Path) -> None:
        shutil.copytree(toy, path)
        shutil.rmtree(path / "rounds/00000/scores" / group)

    return make


def another_student(path: Path, _: Path) -> None:
    factory.filled(path)


def newer(path: Path, toy: Path) -> None:
    shutil.copytree(toy, path)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["redpen"]["version"] = 3
    (path / "zarr.json").write_text(json.dumps(root))


def resampled(round_: cs.Round) -> None:
    """Block 2 holds other rollouts than were scored."""
    block = round_.rollouts.read(2)
    block.rollout_logprobs[:] = -1
    round_.rollouts.write(2, block)


UNFIT: dict[str, tuple[Callable[[Path, Path], None], list[str], str]] = {
    "no cache": (no_cache, [], "nothing is there; `redpen rollouts"),
    "not a cache": (not_a_cache, [], "not a redpen cache"),
    "newer format": (newer, [], "format version 2 at most, found 3"),
    "not sampled": (not_sampled, [], "holds no rollouts yet"),
    "not scored": (without("student"), [], "not scored yet; run `redpen score"),
    "no teacher": (without("teacher"), [], "not scored yet; run `redpen score"),
    "half the rollouts": (
        copied(lambda r: r.rollouts.uncommit(1)),
        [],
        "5 of 6 blocks are sampled; run `redpen rollouts",
    ),
    "half the student": (
        copied(lambda r: r.scores("student").uncommit(4)),
        [],
        "5 of 6 blocks are scored by 'student'; run `redpen score",
    ),
    "half the teacher": (
        copied(lambda r: [r.scores("teacher").uncommit(b) for b in (0, 3)] and None),
        [],
        "4 of 6 blocks are scored by 'teacher'; run `redpen score",
    ),
    "resampled": (copied(resampled), [], "5 of 6 blocks are scored by 'student'"),
    "another student": (
        another_student,
        [],
        "was sampled by a different student: it has student.digest ssssssssssssssss (student)",
    ),
    "another teacher": (
        lambda p, t: shutil.copytree(t, p) and None,
        ["train.teacher=huge"],
        "is scored by teacher; run",
    ),
}


@pytest.mark.parametrize(("make", "overrides", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_an_unfit_cache_is_one_line(
    make: Callable[[Path, Path], None],
    overrides: list[str],
    message: str,
    toy_cache: Path,
    tmp_path: Path,
    recipe: Make,
) -> None:
    cache = tmp_path / "c.zarr"
    make(cache, toy_cache)
    with pytest.raises((cs.CacheError, RedpenError)) as caught:
        stage.run(recipe(*overrides), str(cache), tmp_path / "run")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_several_teachers_must_be_chosen_from(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    cache = Path(shutil.copytree(toy_cache, tmp_path / "c.zarr"))
    scores = cache / "rounds/00000/scores"
    shutil.copytree(scores / "teacher", scores / "second")
    with pytest.raises(ConfigError, match=r"train\.teacher: .* scored by second, teacher"):
        stage.run(recipe(), str(cache), tmp_path / "run")
    assert stage.run(recipe("train.teacher=second", "train.steps=1"), str(cache), tmp_path / "run") == 0


def test_importance_sampling_needs_rollouts_of_the_whole_distribution(
    toy_cache: Path, tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """What counts is how the cache was sampled, not what this recipe says of sampling."""
    cache = Path(shutil.copytree(toy_cache, tmp_path / "c.zarr"))
    sampled = [("", "temperature", 0.3), ("scores/student", "sampling_temperature", 0.3), ("", "top_p", 0.9)]
    for group, name, value in sampled:
        attributes = cache / "rounds/00000" / group / "zarr.json"
        metadata = json.loads(attributes.read_text())
        metadata["attributes"]["redpen"][name] = value
        attributes.write_text(json.dumps(metadata))
        if name == "sampling_temperature":
            settings = recipe("train.loss=importance_sampling", "train.steps=1")
            assert stage.run(settings, str(cache), tmp_path / "cool") == 0
            assert "was sampled at temperature 0.3" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"was sampled at top_p 0\.9"):
        stage.run(settings, str(cache), tmp_path / "nucleus")
    assert stage.run(recipe("train.steps=1"), str(cache), tmp_path / "direct") == 0


def test_a_cached_advantage_is_for_one_pass(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    """Replayed, its optimum is a point mass; 24 prompts at 4 a step are 6 steps."""
    cached = ["train.loss=importance_sampling", "train.advantage=cached"]
    with pytest.raises(ConfigError, match=r"one pass only: 7 steps x 4 prompts need 28 prompts, the round holds 24"):
        stage.run(recipe(*cached, "train.steps=7"), str(toy_cache), tmp_path / "seven")
    assert stage.run(recipe(*cached, "train.steps=6"), str(toy_cache), tmp_path / "six") == 0


def test_a_first_start_on_a_bad_block_leaves_the_run_usable(toy_cache: Path, recipe: Make, tmp_path: Path) -> None:
    """The same command trains once the cache is repaired."""
    cache = Path(shutil.copytree(toy_cache, tmp_path / "cache"))
    shards = [p for p in (cache / "rounds/00000/scores/teacher/logprobs/c").rglob("*") if p.is_file()]
    kept = {shard: shard.read_bytes() for shard in shards}
    for shard in shards:
        shard.unlink()
    with pytest.raises(cs.CorruptBlockError, match="its shard is missing"):
        stage.run(recipe("train.steps=1"), str(cache), tmp_path / "run")
    for shard, data in kept.items():
        shard.write_bytes(data)
    assert stage.run(recipe("train.steps=1"), str(cache), tmp_path / "run") == 0
