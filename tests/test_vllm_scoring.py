"""Teachers read by the real vLLM: its engine in this machine's processes, and its server on loopback.

vLLM changes the process that it runs in (threads, distributed state), so it runs in others here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import cache_schema as cs
import pipeline.train.stage as train_stage
from pipeline.config import Recipe
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, TokenBatch
from pipeline.models import load as models
from pipeline.toy import asset_path

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

Make = Callable[..., Recipe]
ROOT = Path(__file__).parent.parent
#: vLLM's newer model runner, which returns the log-probs of given ids, for want of a GPU on interpreted kernels
NEWER_RUNNER = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": f"{ROOT / 'tests' / 'interpreted_triton'}:{ROOT}",
}
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def score(made: Recipe, cache: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`redpen score` as a process, its recipe beside the cache."""
    path = cache.with_suffix(".toml")
    path.write_text(made.to_toml())
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "score", str(path), "--cache", str(cache)],
        cwd=ROOT,
        env=os.environ | QUIET | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_like_resident(cache: Path, resident: Path, *, all_returned: bool) -> None:
    """Every number is there or NaN, and those that are there are the resident teacher's."""
    assert not list(cs.verify(cs.open(cache)))
    read, expected = (cs.open(path).round().scores("teacher") for path in (cache, resident))
    for block in range(cs.open(cache).round().n_blocks):
        mine, theirs = read.read(block), expected.read(block)
        assert mine.candidate_logprobs is not None and mine.rest_logprob is not None and mine.entropy is None
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=2e-5)
        recorded = np.isfinite(mine.candidate_logprobs)
        assert recorded.all() if all_returned else recorded.mean() > 0.9
        np.testing.assert_allclose(mine.candidate_logprobs[recorded], theirs.candidate_logprobs[recorded], atol=2e-5)  # type: ignore[index]
        held = np.exp(theirs.candidate_logprobs).sum(1, where=recorded)  # type: ignore[call-overload]
        np.testing.assert_allclose(np.exp(mine.rest_logprob), 1 - held, atol=2e-6)


def test_a_teacher_in_vllm_is_checked_verified_and_learnt_from(
    unscored: Path, toy_cache: Path, tmp_path: Path, recipe: Make
) -> None:
    made = recipe("score.placement=vllm", "score.teacher_topk=4", "vllm.enforce_eager=true", "train.steps=2")
    out, err = (process := score(made, unscored, NEWER_RUNNER)).communicate(timeout=200)
    assert process.returncode == 0, err
    assert "vLLM and the training forward agree" in err and "reverse KL" in out
    assert_like_resident(unscored, toy_cache, all_returned=True)
    scores = cs.open(unscored).round().scores("teacher").read(0)
    assert (np.diff(scores.topk_logprobs, axis=1) <= 0).all()  # type: ignore[arg-type]
    assert train_stage.run(made, str(unscored), str(tmp_path / "run")) == 0


READ_TWICE = """
import contextlib, sys
import numpy as np
import cache_schema as cs
from pipeline.config import load_recipe
from pipeline.engines import vllm_scorer
from pipeline.engines.scoring import ScoreOptions, TokenBatch
vllm_scorer._LOGITS_PER_STEP = 1  # as few prompt tokens in a step as vLLM takes, so that prompts come in pieces
recipe, directory = load_recipe("toy", ["vllm.enforce_eager=true", f"teacher.model={sys.argv[1]}"]), sys.argv[2]
arrays = dict(np.load(f"{directory}/rollouts.npz"))
candidate_ids = arrays.pop("candidate_ids")
batch = TokenBatch((cs.RolloutBlock(**arrays),), candidate_ids)
scorer = vllm_scorer.VllmScorer(recipe.teacher[0], recipe.vllm, ScoreOptions(topk=5), max_length=900)
with contextlib.closing(scorer):
    first, again = scorer.compute_logprobs(batch), scorer.compute_logprobs(batch)
for name, value in vars(first).items():
    if value is not None:  # nothing is missing for the prefix cache's sake
        np.testing.assert_array_equal(value, getattr(again, name))
np.savez(f"{directory}/scores.npz", **{n: v for n, v in vars(first).items() if v is not None})
"""


def test_long_soft_capped_prompts_in_pieces_are_read_whole_and_twice_the_same(tmp_path: Path, recipe: Make) -> None:
    """Against the training forward; rollouts of a prompt share a prefix, which vLLM caches."""
    torch.manual_seed(0)
    shape = dict(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=32, sliding_window=64)
    config = Gemma2Config(**shape, **heads, max_position_embeddings=1024, final_logit_softcapping=2.0)
    model = Gemma2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    prompts = [(i, rng.integers(0, 500, rng.integers(1, 200))) for i in range(5)]
    rows = [
        cs.RolloutRow(i, j, rng.integers(0, 500, length), np.zeros(length), cs.FINISH_LENGTH)
        for i in range(5)
        for j, length in enumerate(rng.integers(1, 700, 2))
    ]
    rollouts = cs.RolloutBlock.from_rows(prompts, rows)
    assert (rollouts.prompt_length[rollouts.row_prompt] + rollouts.response_length).max() > 512
    teacher = recipe(f"teacher.model={tmp_path / 'model'}", "teacher.dtype=float32").teacher[0]
    resident = ResidentScorer(models.load_model(teacher), ScoreOptions(topk=5))
    ids = resident.compute_logprobs(rollouts).candidate_ids
    expected = resident.compute_logprobs(TokenBatch((rollouts,), ids))
    np.savez(tmp_path / "rollouts.npz", **vars(rollouts), candidate_ids=ids)
    run = [sys.executable, "-c", READ_TWICE, str(tmp_path / "model"), str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    scores = np.load(tmp_path / "scores.npz")
    np.testing.assert_allclose(scores["logprobs"], expected.logprobs, atol=2e-5)
    np.testing.assert_allclose(scores["candidate_logprobs"], expected.candidate_logprobs, atol=2e-5)
    np.testing.assert_allclose(scores["topk_logprobs"], expected.topk_logprobs, atol=2e-5)
    np.testing.assert_allclose(scores["rest_logprob"], expected.rest_logprob, atol=2e-4)
    np.testing.assert_allclose(scores["topk_rest_logprob"], expected.topk_rest_logprob, atol=2e-4)


@contextlib.contextmanager
def serving(port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """vLLM's server, the toy teacher behind it; killed with its engine at the end."""
    arguments = {
        "--model": asset_path("teacher"),
        "--served-model-name": "teach",
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--max-model-len": 64,
        "--gpu-memory-utilization": 0.05,
        "--api-key": "secret",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(part) for pair in arguments.items() for part in pair]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=os.environ | QUIET, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            time.sleep(0.25)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(400)
def test_a_killed_server_costs_one_line_and_the_same_command_goes_on(
    unscored: Path, toy_cache: Path, tmp_path: Path, recipe: Make
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = recipe(
        "score.placement=server",
        f"teacher.url=http://127.0.0.1:{port}/v1",
        "teacher.served_name=teach",
        "score.server_requests=1",
        "score.server_retries=2",
    )
    key, log = {"REDPEN_API_KEY": "secret"}, tmp_path / "server.log"
    commits = unscored / "rounds/00000/scores/teacher/commit/c"
    with serving(port, log) as server:
        process = score(made, unscored, key)
        deadline = time.monotonic() + 100
        while not (commits.is_dir() and list(commits.iterdir())):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.001)
        os.killpg(server.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in err and "secret" not in err
        assert "3 requests in a row failed" in err.splitlines()[-1]
        assert "finished blocks are committed" in err.splitlines()[-1]
    committed = cs.open(unscored).round().scores("teacher").committed()
    assert committed.any() and not committed.all()
    with serving(port, log):
        _, err = (process := score(made, unscored, key)).communicate(timeout=100)
        assert process.returncode == 0, err
    assert_like_resident(unscored, toy_cache, all_returned=False)
