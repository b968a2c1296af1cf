"""Stage two on several processes, by torchrun and gloo: one gradient, one data order, one line when it ends.

As a script this file is what those processes run: `torchrun tests/test_distributed.py TASK CACHE DIR`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import cache_schema as cs
from helpers import preloaded
from helpers.caches import SMALL, small_recipe
from helpers.preloaded import processes
from helpers.training import curve
from pipeline import environment
from pipeline.distributed.fsdp import weight_sharding
from pipeline.distributed.ranks import Ranks, join_ranks
from pipeline.distributed.signals import Stop
from pipeline.errors import Interrupted, ModelError
from pipeline.models import load as models
from pipeline.models import lora
from pipeline.train import stage, stopping
from pipeline.train.build import make_objective, make_replay
from pipeline.train.teachers import select_teachers
from pipeline.train.trainer import StudentTrainer

STEPS = 3
KILLED_STEPS = 30
LONG = (f"train.steps={STEPS}", "train.schedule=cosine")

#: layouts of the same gradient: settings that must not change it
CASES = {
    "lora-ddp": (),
    "lora-ddp-small": ("train.tokens_per_microbatch=40",),
    "lora-fsdp": ("train.parallel=fsdp",),
    "lora-fsdp-recomputed": ("train.parallel=fsdp", "train.gradient_checkpointing=true"),
    "full-ddp": ("train.method=full", "train.gradient_checkpointing=true"),
    "full-fsdp": ("train.method=full", "train.parallel=fsdp"),
    "full-fsdp-recomputed": (
        "train.method=full",
        "train.parallel=fsdp",
        "train.gradient_checkpointing=true",
        "train.tokens_per_microbatch=40",
    ),
    # fewer rollouts than ranks
    "single-ddp": ("train.prompts_per_step=1",),
    "single-fsdp": ("train.prompts_per_step=1", "train.parallel=fsdp"),
    "bfloat16lora-ddp": ("student.dtype=bfloat16",),
    "bfloat16lora-fsdp": ("student.dtype=bfloat16", "train.parallel=fsdp"),
    "bfloat16full-ddp": ("student.dtype=bfloat16", "train.method=full"),
    "bfloat16full-fsdp": ("student.dtype=bfloat16", "train.method=full", "train.parallel=fsdp"),
}
#: those that four processes are tried with
BY_FOUR = ("lora-ddp", "lora-fsdp-recomputed", "full-fsdp", "single-ddp", "single-fsdp")
#: those that are also run, stopped and resumed, with what a run leaves
RUNS = {"lora-ddp": "adapter/adapter_model.safetensors", "full-fsdp": "model/model.safetensors"}


# -- what the processes do ----------------------------------------------------------------------------------------


def measure(cache: Path, out: Path, ranks: Ranks, cases: Iterable[str] = CASES) -> None:
    """The gradient of one batch under some layouts, and the metrics of two updates: `<case>.safetensors`."""
    for case in cases:
        recipe = small_recipe(*CASES[case])
        round_ = cs.open(cache).round()
        objective = make_objective(recipe, round_, select_teachers(recipe, round_, str(cache)))
        replay = make_replay(recipe, round_, objective)
        with weight_sharding(ranks, recipe.student, recipe.train) as sharding:
            other = models.load_model(sharding.load_config(recipe.student))
            model = lora.make_trainable(
                models.load_model(sharding.load_config(recipe.student), trainable=True), recipe.train
            )
            generator = torch.Generator().manual_seed(1)
            for parameter in lora.trainable(model).values():  # with B = 0 half of a LoRA's gradient is 0
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
            trainer = StudentTrainer(model, objective, recipe.train, sharding)
            for parameter in model.parameters():  # a LoRA stays whole, all else is in shards
                adapter = recipe.train.method == "lora" and parameter.requires_grad
                assert isinstance(parameter, DTensor) == (sharding.mesh is not None and not adapter)
            batch = replay.batch(3)
            assert (len(batch.distinct) < 4) == case.startswith("single")
            trainer.gradient(batch)
            found = {
                n: sharding.full_tensor(w.grad).clone() for n, w in trainer.masters.items() if w.grad is not None
            }
            metrics = [value for step in range(2) for value in trainer.update(replay.batch(step)).values()]
            found["metrics"] = torch.tensor(metrics, dtype=torch.float64)
            assert all(
                torch.equal(recorded, found["metrics"]) for recorded in sharding.ranks.gather(found["metrics"])
            )
            if sharding.ranks.is_main_process:
                save_file(found, out / f"{case}.safetensors")
            if sharding.ranks.size > 1:
                next(iter(other.parameters())).data[0] += sharding.ranks.rank
                with pytest.raises(ModelError, match=r"rank 1 and rank 0 .*\(1 of \d+ tensors"):
                    sharding.parallelize(other)


@contextmanager
def stop_after_one_step() -> Iterator[Stop]:
    stop = Stop()
    if environment.RANK == environment.WORLD_SIZE - 1:  # one rank is asked, all stop
        stop.signum = signal.SIGINT
    yield stop


def interrupted(cache: Path, run: Path, settings: tuple[str, ...], steps: int) -> None:
    """The first `steps` steps of a run, one at a time."""
    real, stage.graceful = stage.graceful, stop_after_one_step  # type: ignore[assignment]
    for _ in range(steps):
        try:
            stage.run(small_recipe(*LONG, *settings), str(cache), run)
        except (Interrupted, SystemExit):
            continue
        raise AssertionError("it was not stopped")
    stage.graceful = real


def two(cache: Path, out: Path) -> None:
    """All that two processes are wanted for, so that they start once."""
    with join_ranks() as ranks:
        measure(cache, out, ranks)
    for name in RUNS:
        assert stage.run(small_recipe(*LONG, *CASES[name]), str(cache), out / f"{name}-calm") == 0
        interrupted(cache, out / f"{name}-stopped", CASES[name], STEPS)
        assert stage.run(small_recipe(*LONG, *CASES[name]), str(cache), out / f"{name}-stopped") == 0
    assert stage.run(small_recipe(f"train.steps={KILLED_STEPS}"), str(cache), out / "long-calm") == 0
    stale = small_recipe("train.stale_ess=0.9999", "train.stop_window=1", "train.learning_rate=0.01")
    for _ in range(2):  # only rank 0 reports the result: if the others failed too, torchrun would end it
        assert stage.run(stale, str(cache), out / "stale") == (0 if environment.RANK else stopping.EXIT_STALE)
    interrupted(cache, out / "elastic", (), 1)


def broken(cache: Path, out: Path) -> None:
    """The command, with a second rank that fails at its third step."""
    from pipeline import cli
    from pipeline.distributed import signals

    real, signals._MAIN_PROCESS_SECONDS = StudentTrainer.update, 1

    def fails(self: StudentTrainer, batch: Any) -> dict[str, float]:
        if (self.ranks.rank, self.step) == (1, 2):
            raise ModelError("something that only rank 1 has")
        return real(self, batch)

    StudentTrainer.update = fails  # type: ignore[method-assign]
    sys.exit(cli.main(command(cache, out / "run")[3:]))


def four(cache: Path, out: Path) -> None:
    with join_ranks() as ranks:
        measure(cache, out, ranks, BY_FOUR)
    assert stage.run(small_recipe(*LONG, "train.parallel=fsdp"), str(cache), out / "elastic") == 0


# -- the tests ----------------------------------------------------------------------------------------------------


def torchrun(size: int, *command: str) -> preloaded.Process:
    """A job of processes with one thread each."""
    return preloaded.torchrun("--nproc-per-node", str(size), *command)


def finished(job: preloaded.Process) -> None:
    _, err = job.communicate(timeout=120)
    assert job.returncode == 0, err


@pytest.fixture(scope="module")
def by(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What 1, 2 and 4 processes leave; the run `elastic` in 2's directory went from 2 to 1 to 4 of them."""
    made = {size: tmp_path_factory.mktemp(f"by-{size}") for size in (1, 2, 4)}
    job = torchrun(2, __file__, "two", str(toy_cache), str(made[2]))
    measure(toy_cache, made[1], Ranks())
    assert stage.run(small_recipe(*LONG, *CASES["full-ddp"]), str(toy_cache), made[1] / "full-ddp-calm") == 0
    finished(job)
    interrupted(toy_cache, made[2] / "elastic", (), 1)
    (made[2] / "elastic").rename(made[4] / "elastic")
    finished(torchrun(4, __file__, "four", str(toy_cache), str(made[4])))
    return made


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    one, other = (torch.cat([found[name].double().flatten() for name in a if name != "metrics"]) for found in (a, b))
    assert other.norm() > 0
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("size", "case"), [*((size, case) for size in (1, 2) for case in CASES), *((4, case) for case in BY_FOUR)]
)
def test_one_gradient_whatever_the_layout(case: str, size: int, by: dict[int, Path]) -> None:
    kind = case.split("-")[0]
    found, one = load_file(by[size] / f"{case}.safetensors"), load_file(by[1] / f"{kind}-ddp.safetensors")
    exact = not kind.startswith("bfloat16")  # there packing rounds
    assert distance(found, one) < (1e-5 if exact else 3e-2)
    n = len(one["metrics"]) if exact else len(one["metrics"]) // 2  # of the first update
    rtol, atol = (1e-3, 1e-4) if exact else (5e-2, 1e-2)
    torch.testing.assert_close(found["metrics"][:n], one["metrics"][:n], rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_stopped_after_every_step_go_on_bit_for_bit(name: str, by: dict[int, Path]) -> None:
    calm, stopped = by[2] / f"{name}-calm", by[2] / f"{name}-stopped"
    assert len(curve(calm)) == STEPS and curve(stopped) == curve(calm)
    assert (stopped / RUNS[name]).read_bytes() == (calm / RUNS[name]).read_bytes()


def test_shards_are_saved_as_the_whole_model(by: dict[int, Path]) -> None:
    from transformers import AutoModelForCausalLM

    sharded, alone = by[2] / "full-fsdp-calm", by[1] / "full-ddp-calm"
    assert [line["loss"] for line in curve(sharded)] == pytest.approx(
        [line["loss"] for line in curve(alone)], rel=1e-3
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits for run in (alone, sharded))
    torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-2)


def test_a_run_goes_on_with_another_number_of_processes_and_the_same_batches(by: dict[int, Path]) -> None:
    """One step by 2, one by 1, one by 4 in shards."""
    batches = ("step", "tokens", "rows", "distinct_rows", "tokens_read")
    elastic, calm = curve(by[4] / "elastic"), curve(by[2] / "lora-ddp-calm")
    assert [[line[key] for key in batches] for line in elastic] == [[line[key] for key in batches] for line in calm]
    assert len({line["tokens_read"] for line in calm}) > 1
    assert [line["loss"] for line in elastic] == pytest.approx([line["loss"] for line in calm], rel=1e-3)


def command(cache: Path, run: Path, *settings: str) -> list[str]:
    chosen = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    return ["-m", "pipeline", "--", "train", "toy", "--cache", str(cache), "--run", str(run), *chosen]


def started(cache: Path, run: Path, steps: int, *options: str) -> preloaded.Process:
    """A job of two that has done `steps` steps."""
    job = torchrun(2, *options, *command(cache, run, f"train.steps={KILLED_STEPS}"))
    metrics = run / "metrics.jsonl"
    while job.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < steps):
        time.sleep(0.005)
    return job


def lines(job: preloaded.Process, code: int) -> list[str]:
    """What redpen said, beside torchrun, of a job that ended with `code`."""
    _, err = job.communicate(timeout=90)
    assert job.returncode == code, err
    return [line for line in err.splitlines() if line.startswith("redpen: ")]


def test_a_job_stops_together_and_outlives_a_killed_rank(
    toy_cache: Path, by: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = started(toy_cache, run, 3)
    job.terminate()
    (line,) = lines(job, 1)
    done = len(curve(run))
    assert line.startswith(f"redpen: stopped by SIGTERM: step {done} of {KILLED_STEPS} is in ")
    assert done < KILLED_STEPS and (run / f"checkpoints/step-{done:08d}").exists()

    job = started(toy_cache, run, done + 3, "--max-restarts", "1")
    os.kill([pid for pid, _ in processes(job.pid)][1], signal.SIGKILL)
    (line,) = lines(job, 0)
    assert line.startswith("redpen: another rank of this job has ended")
    calm, weights = by[2] / "long-calm", RUNS["lora-ddp"]
    assert curve(run) == curve(calm) and (run / weights).read_bytes() == (calm / weights).read_bytes()


def test_an_error_of_one_rank_ends_the_job_with_its_line(toy_cache: Path, tmp_path: Path) -> None:
    job = torchrun(2, __file__, "broken", str(toy_cache), str(tmp_path))
    assert lines(job, 1) == ["redpen: rank 1: something that only rank 1 has"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shards_on_cuda(toy_cache: Path, tmp_path: Path) -> None:
    """One process with NCCL against one without."""
    alone, job = tmp_path / "alone", tmp_path / "job"
    for directory, ranks in ((alone, Ranks()), (job, Ranks(0, 1, torch.distributed.HashStore()))):
        directory.mkdir()
        measure(toy_cache, directory, ranks)
    for case in CASES:
        one, other = load_file(alone / f"{case}.safetensors"), load_file(job / f"{case}.safetensors")
        assert distance(other, one) < (3e-2 if case.startswith("bfloat16") else 1e-4), case


if __name__ == "__main__":
    task, cache_path, directory = sys.argv[1:]
    {"two": two, "four": four, "broken": broken}[task](Path(cache_path), Path(directory))
