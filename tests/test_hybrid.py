"""A Qwen3.5 with the toy's tokenizer goes from rollouts to a merged, evaluated model; its state leaks nowhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cache_schema as cs
import pipeline.evaluate.stage
import pipeline.merge
import pipeline.rollouts.stage
import pipeline.score.stage
import pipeline.train.stage
from helpers.caches import small_recipe
from helpers.tiny_configs import tiny_config
from pipeline.models.resolve import resolve


def qwen35(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = tiny_config("qwen3_5_text", vocab_size=259, eos_token_id=256, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    resolve(small_recipe().student).tokenizer.save_pretrained(path)
    return path


def test_qwen3_5_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = qwen35(tmp_path / "student", 0), qwen35(tmp_path / "teacher", 1)
    settings = [
        "prompts.limit=4",
        "rollouts.rollouts_per_prompt=2",
        "rollouts.max_response_tokens=12",
        f"student.model={student}",
        f"teacher.model={teacher}",
        "student.dtype=float32",
        "teacher.dtype=float32",
        "train.steps=2",
        "train.checkpoint_every=1",
        "eval.max_response_tokens=8",
        "eval.limit=4",
        "rollouts.format_check_prompts=0",
    ]
    recipe, cache, run = small_recipe(*settings), str(tmp_path / "c.zarr"), tmp_path / "run"
    pipeline.rollouts.stage.run(recipe, cache)
    pipeline.score.stage.run(recipe, cache)
    said = capsys.readouterr().err
    assert said.count("student: packing check: not packed") == said.count("teacher: packing check: not packed") == 1
    round_ = cs.open(cache).round(0)
    gap = round_.scores(cs.STUDENT).read(0).sampling_logprobs - round_.rollouts.read(0).rollout_logprobs
    assert np.abs(gap).max() < 1e-4, "the sampler's log-probs are the scorer's"

    streamed = str(tmp_path / "streamed.zarr")
    pipeline.rollouts.stage.run(recipe, streamed)
    pipeline.score.stage.run(small_recipe(*settings, "score.placement=streamed"), streamed)
    theirs = [cs.open(url).round(0).scores("teacher").read(0).logprobs for url in (cache, streamed)]
    assert np.array_equal(*theirs)

    pipeline.train.stage.run(recipe, cache, run)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["ess"] > 0.9999, "the student is still the one that was scored"
    pipeline.merge.run(str(run), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == "Qwen3_5ForCausalLM"
    assert pipeline.evaluate.stage.run(str(run)) == 0
