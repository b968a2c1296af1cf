"""Partial scores against full distributions, and a served teacher that misbehaves: a real HTTP server on loopback
whose answers are the toy teacher's.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import io
import json
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import cache_schema as cs
import pipeline.train.stage as train_stage
from helpers import preloaded
from helpers.models import random_adapter
from pipeline.config import Recipe, TeacherConfig, load_recipe
from pipeline.engines import served as server
from pipeline.engines.prompt_logprobs import EngineLogprobs, ScoreRequest, check_agreement, partial_scores
from pipeline.engines.scoring import ScoreOptions, TokenBatch
from pipeline.engines.served import ServerScorer
from pipeline.errors import ConfigError, Interrupted, ModelError
from pipeline.models import load as models
from pipeline.models.resolve import resolve
from pipeline.rounds.metrics import REST_FLOOR
from pipeline.score import stage
from pipeline.toy import asset_path

Make = Callable[..., Recipe]
ROOT = Path(__file__).parent.parent


# -- partial scores ------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def likeliest(logprobs: np.ndarray, tokens: np.ndarray, n: int) -> EngineLogprobs:
    """What vLLM returns: the token itself first, then the n likeliest, in fp32."""
    ids = np.hstack([tokens[:, None], np.argsort(-logprobs, axis=1, kind="stable")[:, :n]])
    return EngineLogprobs(ids, np.take_along_axis(logprobs, ids, 1).astype(np.float32).astype(np.float64))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_returned=st.integers(1, 30),
    n_candidates=st.integers(1, 12),
    topk=st.integers(0, 6),
    sharpness=st.floats(0.1, 30),
)
def test_partial_scores_are_those_of_the_distribution(
    seed: int, n_returned: int, n_candidates: int, topk: int, sharpness: float
) -> None:
    rng, n_tokens, vocab = np.random.default_rng(seed), 9, 30
    expected = log_softmax(rng.normal(size=(n_tokens, vocab)) * sharpness)
    tokens = rng.integers(0, vocab, n_tokens)
    candidates = np.hstack([tokens[:, None], rng.integers(0, vocab, (n_tokens, n_candidates - 1))]).astype(np.int32)
    question = ScoreRequest(np.concatenate([[0], tokens]).astype(np.int32), 1, candidates)
    recorded = likeliest(expected, tokens, max(n_returned, topk))
    scores = partial_scores(question, recorded, topk)

    every = np.arange(n_tokens)
    np.testing.assert_allclose(scores.logprobs, expected[every, tokens], rtol=1e-6)
    known = np.zeros((n_tokens, vocab), bool)
    np.put_along_axis(known, recorded.ids, True, 1)
    is_returned = np.take_along_axis(known, candidates, 1)
    assert scores.candidate_logprobs is not None and scores.rest_logprob is not None
    np.testing.assert_array_equal(np.isnan(scores.candidate_logprobs), ~is_returned)
    np.testing.assert_allclose(
        scores.candidate_logprobs[is_returned], np.take_along_axis(expected, candidates, 1)[is_returned], rtol=1e-6
    )

    def outside(*inside: np.ndarray) -> np.ndarray:
        """log of what is outside these ids, if they are returned."""
        taken = np.zeros((n_tokens, vocab), bool)
        for ids in inside:
            np.put_along_axis(taken, ids, True, 1)
        return np.log(np.maximum(np.where(taken & known, 0, np.exp(expected)).sum(1), REST_FLOOR))

    np.testing.assert_allclose(np.exp(scores.rest_logprob), np.exp(outside(candidates)), atol=2e-6)
    if topk:
        assert scores.topk_ids is not None and scores.topk_rest_logprob is not None
        best = -np.sort(-expected, axis=1)[:, :topk]
        np.testing.assert_allclose(scores.topk_logprobs, best, rtol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(expected, scores.topk_ids, 1), best, rtol=1e-6)
        np.testing.assert_allclose(
            np.exp(scores.topk_rest_logprob), np.exp(outside(candidates, scores.topk_ids)), atol=2e-6
        )


def test_tokens_beyond_the_candidates_make_a_small_rest_exact() -> None:
    logprobs = log_softmax(np.array([[30.0, 8.0, 7.0, 0.0]]))  # candidates hold all but 4e-10
    question = ScoreRequest(np.array([0, 0], np.int32), 1, np.array([[0]], np.int32))
    scores = partial_scores(question, likeliest(logprobs, np.array([0]), 3))
    assert scores.rest_logprob is not None and np.isfinite(scores.rest_logprob).all()
    assert scores.rest_logprob[0] == pytest.approx(np.log(REST_FLOOR))
    logprobs = log_softmax(np.array([[14.0, 0.0, 0.0, -9.0]]))  # 2e-6: fp32 alone would be off by 5 %
    scores = partial_scores(question, likeliest(logprobs, np.array([0]), 3))
    assert scores.rest_logprob is not None
    assert scores.rest_logprob[0] == pytest.approx(np.logaddexp.reduce(logprobs[0, 1:]), abs=0.04)


def test_a_missing_score_is_nan_and_never_0() -> None:
    """A position without an answer, a null log-prob, and a token that the teacher holds to be impossible."""
    tokens = np.array([3, 5, 6, 7, 4], np.int32)
    candidates = np.array([[5, 1], [6, 2], [7, 2], [4, 9]], np.int32)
    answer = [
        None,
        {"5": {"logprob": -0.5}, "2": {"logprob": -1.0}},
        None,
        {"7": {"logprob": None}, "2": {"logprob": -0.1}},
        {"4": {"logprob": -9999.0}, "9": {"logprob": 0.0}},
    ]
    question = ScoreRequest(tokens, 1, candidates)
    scores = partial_scores(question, EngineLogprobs.from_positions(answer, question), topk=1)
    nan = np.nan
    np.testing.assert_array_equal(scores.logprobs, np.float32([-0.5, nan, nan, nan]))
    np.testing.assert_array_equal(
        scores.candidate_logprobs, np.float32([[-0.5, nan], [nan, nan], [nan, nan], [nan, nan]])
    )
    assert scores.rest_logprob is not None and scores.topk_ids is not None
    np.testing.assert_allclose(scores.rest_logprob, [np.log(1 - np.exp(-0.5)), nan, nan, nan], rtol=1e-5)
    np.testing.assert_array_equal(scores.topk_ids, [[5], [0], [2], [9]])
    np.testing.assert_array_equal(np.isnan(scores.topk_logprobs).ravel(), [False, True, True, True])


def test_an_id_that_the_teacher_lacks_is_not_asked_for() -> None:
    question = ScoreRequest(np.array([1, 2], np.int32), 1, np.array([[2, 40, 3]], np.int32))
    ids = question.given_ids(8, vocab_size=30)
    np.testing.assert_array_equal(ids, [[2, -1, 3]])
    scores = partial_scores(question, EngineLogprobs.of_given_ids(ids, [[-1.0, -np.inf, -2.0]]))
    np.testing.assert_array_equal(scores.candidate_logprobs, np.float32([[-1, np.nan, -2]]))
    np.testing.assert_array_equal(question.given_ids(2, vocab_size=50), [[2, 40]])


TOKENS = np.array([1, 2, 3], np.int32)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([None, {"1": {"logprob": -1.0}}, {"2": {"logprob": -1.0}}], "position 1 token 2 was sent, 1 came back"),
        ([None, {"2": {"logprob": -1.0}}], "returned 2 positions, 3 tokens were sent"),
        ([None, {"2": {"logprob": -0.1}, "3": {"logprob": -0.1}}, None], "add up to 1.81"),
        ([None, {"2": {"logprob": 2.5}}, None], "a log-prob of 2.5; log-probs are at most 0"),
        ([None, {"2": {"logprob": -0.1}}, {"3": {"logprob": -0.1}}], "returned 1 tokens at a position, expected 2"),
    ],
)
def test_answers_that_mean_something_else_are_refused(answer: Any, message: str) -> None:
    question = ScoreRequest(TOKENS, 1, None)
    with pytest.raises(ModelError, match=message):
        partial_scores(question, EngineLogprobs.from_positions(answer, question), topk=2)


def test_readings_that_are_apart_are_refused() -> None:
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(size=200).astype(np.float32)
    near = cs.ScoreBlock(logprobs=logprobs - rng.normal(size=200).astype(np.float32) * 1e-5)
    assert "on 200 tokens" in check_agreement(near, cs.ScoreBlock(logprobs=logprobs), "float32")
    shifted, missing = np.roll(logprobs, 1), logprobs.copy()
    missing[3] = np.nan
    for wrong in (shifted, logprobs / 2, missing):
        with pytest.raises(ModelError, match=r"differ by .* nats a token on average"):
            check_agreement(cs.ScoreBlock(logprobs=wrong), cs.ScoreBlock(logprobs=logprobs), "bfloat16")


# -- a server ------------------------------------------------------------------------------------------------


@functools.cache
def _model() -> PreTrainedModel:
    return models.load_model(load_recipe("toy").teacher[0], attention="sampling")


class TeacherServer:
    """Answers as vLLM's server does, with the toy teacher's log-probs, after the mishaps that it is given.

    Attributes:
        mishaps: what happens to the next requests, instead of an answer: a name, or a status to answer with.
        always: what happens to all of them. after: what happens to all of them once it gave so many answers.
        allowed: its --max-logprobs. scale_out: whether it returns the log-probs of given ids.
        temperature: another one makes it another model.
    """

    def __init__(self, port: int = 0):
        self.mishaps: deque[str | int] = deque()
        self.always: str | int | None = None
        self.after: tuple[int, str] | None = None
        self.allowed, self.scale_out, self.temperature, self.key = 20, False, 1.0, ""
        self.n_answers = self.n_requests = self.in_flight = self.most_in_flight = 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._model = _model()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "teach", "max_model_len": 64}]})

            def do_POST(self) -> None:
                with teacher._lock:
                    teacher.in_flight += 1
                    teacher.most_in_flight = max(teacher.in_flight, teacher.most_in_flight)
                try:
                    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                    teacher.handle(self, body)
                finally:
                    with teacher._lock:
                        teacher.in_flight -= 1

            def reply(
                self,
                status: int,
                value: Any,
                headers: dict[str, str] | None = None,
                kept: float = 1,
                promised: float = 1,
            ) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(int(promised * len(text))))
                for name, header in (headers or {}).items():
                    self.send_header(name, header)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(text[: int(kept * len(text))])

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:  # clients may go
                pass

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: Any, body: dict[str, Any]) -> None:
        with self._lock:
            self.n_requests += 1
            if self.after is not None and self.n_answers >= self.after[0]:
                self.always = self.after[1]
            mishap = self.always or (self.mishaps.popleft() if self.mishaps else None)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            sent = request.headers.get("authorization")
            return request.reply(401, {"error": {"message": f"Incorrect API key provided: {sent}"}})
        if mishap == "hang":
            self._closing.wait(30)
            mishap = "reset"
        if mishap == "reset":
            request.close_connection = True
            return request.connection.close()
        if isinstance(mishap, int):
            headers = {"retry-after": "0.3"} if mishap == 429 else {}
            return request.reply(mishap, {"error": {"message": f"mishap {mishap}"}}, headers)
        by_ids = request.path == "/inference/v1/generate"
        if by_ids and not self.scale_out:
            return request.reply(403, {"error": {"message": "Scale-out endpoints are disabled. Restart vllm serve"}})
        asked = body["sampling_params"] if by_ids else body
        given = asked.get("prompt_logprob_token_ids")
        for n in (asked.get("prompt_logprobs") or 0, len(given[0]) if given else 0):
            if n > self.allowed:
                message = f"Requested prompt logprobs of {n}, which is greater than max allowed: {self.allowed}"
                return request.reply(400, {"error": {"message": message}})
        answer = self.answer(body["token_ids"] if by_ids else body["prompt"], asked)
        if mishap == "other ids":
            holder = answer if by_ids else answer["choices"][0]
            holder["prompt_token_ids"] = [*holder["prompt_token_ids"][:-1], 7]
        elif mishap == "shifted":
            answer["choices"][0]["prompt_logprobs"].insert(0, answer["choices"][0]["prompt_logprobs"].pop())
        elif mishap == "silent":
            answer["choices"][0]["prompt_logprobs"] = None
        elif mishap == "no choices":
            answer = {"choices": "none"}
        with self._lock:
            self.n_answers += 1
        kept, promised = {"truncated": (0.5, 1), "half": (0.5, 0.5)}.get(str(mishap), (1, 1))
        request.reply(200, answer, kept=kept, promised=promised)
        if kept < 1:
            request.close_connection = True

    @torch.inference_mode()
    def answer(self, ids: list[int], asked: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            logits = self._model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float() / self.temperature
        logprobs, n = logits.log_softmax(-1).numpy(), asked.get("prompt_logprobs")
        positions: list[Any] = [None]
        for row, token in zip(logprobs, ids[1:], strict=True):
            recorded = [token, *np.argsort(-row)[: n or 0].tolist()]
            positions.append({str(i): {"logprob": float(row[i]), "rank": 1, "decoded_token": "?"} for i in recorded})
        choice = {"text": "?", "prompt_logprobs": None if n is None else positions, "prompt_token_ids": ids}
        if (given := asked.get("prompt_logprob_token_ids")) is None:
            return {"choices": [choice]}
        rows = logprobs[asked["prompt_logprob_start"] :]
        array = np.where(np.array(given) < 0, -np.inf, np.take_along_axis(rows, np.maximum(given, 0), 1))
        np.save(file := io.BytesIO(), array.astype(np.float32))
        encoded = base64.b64encode(file.getvalue()).decode()
        return {"choices": [{}], "prompt_token_id_logprobs": encoded} | {k: choice[k] for k in list(choice)[1:]}


@pytest.fixture
def teacher_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherServer]:
    monkeypatch.setattr(server, "_FIRST_WAIT", 0.01)
    for name in ("REDPEN_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.closing(TeacherServer()) as served:
        yield served


def served(recipe: Make, at: TeacherServer | str, *overrides: str) -> Recipe:
    url = at if isinstance(at, str) else at.url
    mine = ["score.placement=server", f"teacher.url={url}", "teacher.served_name=teach", "score.server_retries=3"]
    return recipe(*mine, *overrides)


def scorer_of(made: Recipe, topk: int = 0, on_tile: Callable[[int], None] = lambda tokens: None) -> ServerScorer:
    options = ScoreOptions(candidates=8, topk=topk)
    return ServerScorer(made.teacher[0], made.score, options, max_length=48, on_tile=on_tile)


def batch_of(cache: Path, blocks: int = 1) -> tuple[TokenBatch, cs.ScoreBlock]:
    """Some blocks of the cache, and the resident teacher's scores of them."""
    round_ = cs.open(cache).round()
    ids = [round_.scores("student").read(block).candidate_ids for block in range(blocks)]
    batch = TokenBatch(tuple(round_.rollouts.read(block) for block in range(blocks)), np.concatenate(ids))
    scores = [round_.scores("teacher").read(block) for block in range(blocks)]
    joined = {n: np.concatenate([getattr(s, n) for s in scores]) for n in ("logprobs", "candidate_logprobs")}
    return batch, cs.ScoreBlock(**joined)


def assert_agrees(scores: cs.ScoreBlock, expected: cs.ScoreBlock, *, recorded: float) -> None:
    assert scores.candidate_logprobs is not None and expected.candidate_logprobs is not None
    np.testing.assert_allclose(scores.logprobs, expected.logprobs, atol=1e-5)
    known = np.isfinite(scores.candidate_logprobs)
    assert known.mean() >= recorded and known[:, 0].all()
    np.testing.assert_allclose(scores.candidate_logprobs[known], expected.candidate_logprobs[known], atol=2e-5)
    assert scores.rest_logprob is not None and np.isfinite(scores.rest_logprob).all()


def test_a_served_teacher_is_verified_and_learnt_from(
    unscored: Path,
    toy_cache: Path,
    tmp_path: Path,
    recipe: Make,
    teacher_server: TeacherServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = served(recipe, teacher_server, "score.teacher_topk=4", "score.server_requests=3", "train.steps=2")
    assert stage.run(made, str(unscored)) == 0
    out, err = capsys.readouterr()
    assert "the server and the training forward agree" in err and "returns its 20 likeliest" in err
    assert "reverse KL" in out and "% of candidates" in out and "not scored" not in out
    assert 2 <= teacher_server.most_in_flight <= 3
    assert not list(cs.verify(cs.open(unscored)))
    group = cs.open(unscored).round().scores("teacher")
    manifest = group.manifest
    assert isinstance(manifest, cs.ScoresManifest)
    assert (manifest.engine, manifest.partial, manifest.entropy, manifest.dtype) == ("server", True, False, "served")
    assert manifest.model.digest.startswith("served:")
    expected = batch_of(toy_cache, 6)[1]
    blocks = [group.read(block) for block in range(6)]
    names = ("logprobs", "candidate_logprobs", "rest_logprob")
    scores = cs.ScoreBlock(**{n: np.concatenate([getattr(b, n) for b in blocks]) for n in names})
    assert_agrees(scores, expected, recorded=0.9)
    assert train_stage.run(made, str(unscored), str(tmp_path / "run")) == 0
    assert stage.run(made, str(unscored)) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_served_teacher_reads_its_own_text(
    unscored: Path, tmp_path: Path, recipe: Make, teacher_server: TeacherServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server gets the ids of the text; the check against the training forward is on the same ones."""
    template = "teacher.prompt={{ answer }}\n{{ prompt }}"
    assert stage.run(served(recipe, teacher_server, template), str(unscored)) == 0
    assert "the server and the training forward agree" in capsys.readouterr().err
    assert stage.run(recipe(template, "teacher.name=here"), str(unscored), "here") == 0
    round_ = cs.open(unscored).round()
    for block in range(round_.n_blocks):
        there, here = (round_.scores(name).read(block) for name in ("teacher", "here"))
        assert_agrees(there, here, recorded=0.8)


@pytest.mark.parametrize("mishap", ["reset", "truncated", "half", "hang", 429, 500, 503])
def test_transient_errors_are_retried(
    toy_cache: Path, recipe: Make, teacher_server: TeacherServer, mishap: str | int
) -> None:
    batch, expected = batch_of(toy_cache)
    made = served(recipe, teacher_server, f"score.server_timeout={1 if mishap == 'hang' else 30}")
    scorer = scorer_of(made)
    assert_agrees(scorer.compute_logprobs(batch), expected, recorded=0.9)
    n_before, started = teacher_server.n_requests, time.monotonic()
    teacher_server.mishaps.extend([mishap] * 2)
    assert_agrees(scorer.compute_logprobs(batch), expected, recorded=0.9)
    assert teacher_server.n_requests == n_before + batch.blocks[0].n_rows + 2
    if mishap in (429, "hang"):  # it said when to come back; it had that long
        assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        ("other ids", r"returned other tokens than were sent: .* was sent, 7 came back"),
        ("shifted", r"returned other tokens than were sent"),
        ("silent", r"returned no prompt_logprobs; serve the teacher with vLLM"),
        ("no choices", r"an answer that cannot be read"),
        (400, r"refused with 400: mishap 400; 'teach' must be served with .*--max-model-len"),
        (404, r"refused with 404: mishap 404; check the URL .*teacher\.served_name, now 'teach'"),
        (500, r"4 requests in a row failed, the last by 500: mishap 500; .* run the same command again"),
        ("reset", r"4 requests in a row failed, the last by \w+Error.*; .* run the same command again"),
    ],
)
def test_what_will_not_pass_is_one_line_and_nothing_is_stored(
    unscored: Path, recipe: Make, teacher_server: TeacherServer, mishap: str | int, message: str
) -> None:
    teacher_server.always = mishap
    with pytest.raises(ModelError, match=rf"teacher\.url = 'http://127.*{message}") as caught:
        stage.run(served(recipe, teacher_server), str(unscored))
    assert "\n" not in str(caught.value)
    assert cs.open(unscored).round().scorer_names() == ["student"]


def test_the_key_is_sent_and_never_shown(
    unscored: Path, recipe: Make, teacher_server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher_server.key = "right-key"
    made = served(recipe, teacher_server)
    with pytest.raises(ModelError, match=r"refused with 401: .*REDPEN_API_KEY or OPENAI_API_KEY"):
        stage.run(made, str(unscored))
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    with pytest.raises(ModelError, match=r"refused with 401: .*Bearer \*\*\*") as caught:
        stage.run(made, str(unscored))
    assert "wrong-key" not in str(caught.value)
    monkeypatch.setenv("REDPEN_API_KEY", "right-key\n")
    assert stage.run(made, str(unscored)) == 0


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["teacher.url=http://127.0.0.1:9/v1", "score.server_retries=1"], ModelError, r"2 requests in a row failed"),
        (["teacher.url=localhost:8000/v1"], ConfigError, r"teacher\.url: expected a URL such as"),
        (["teacher.served_name=other"], ModelError, r"serves 'teach', not 'other'; set teacher\.served_name"),
        (
            ["teacher.adapter=run/adapter", "teacher.served_name="],
            ConfigError,
            r"with an adapter needs teacher\.served_name",
        ),
        (["score.teacher_topk=21"], ConfigError, r"score\.teacher_topk = 21: .* returns 20 .*--max-logprobs 21"),
    ],
)
def test_a_server_that_cannot_do_it_is_named(
    unscored: Path,
    recipe: Make,
    teacher_server: TeacherServer,
    overrides: list[str],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        stage.run(served(recipe, teacher_server, *overrides), str(unscored))
    assert "\n" not in str(caught.value)
    assert cs.open(unscored).round().scorer_names() == ["student"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_missed_before_anything_is_read(unscored: Path, recipe: Make) -> None:
    shutil.rmtree(unscored / "rounds/00000/scores/student")
    with pytest.raises(ConfigError, match="vLLM is not installed; "):
        stage.run(recipe("score.placement=vllm"), str(unscored))
    assert cs.open(unscored).round().scorer_names() == []


def test_a_rollout_as_long_as_the_servers_context_is_found_out_at_once(
    recipe: Make, teacher_server: TeacherServer
) -> None:
    made = served(recipe, teacher_server)
    with pytest.raises(ModelError, match=r"--max-model-len 64, a rollout has 64 tokens .* 65 or more"):
        ServerScorer(made.teacher[0], made.score, max_length=64)


@pytest.mark.parametrize(
    ("allowed", "scale_out", "topk", "recorded", "said"),
    [
        (20, True, 0, 1.0, ""),
        (20, True, 4, 1.0, ""),
        (5, True, 0, 0.7, "returns 5 of 8 candidates and its 5 likeliest"),
        (5, False, 0, 0.4, "returns its 5 likeliest tokens"),
    ],
)
def test_the_request_that_returns_most_is_chosen(
    toy_cache: Path,
    recipe: Make,
    teacher_server: TeacherServer,
    capsys: pytest.CaptureFixture[str],
    allowed: int,
    scale_out: bool,
    topk: int,
    recorded: float,
    said: str,
) -> None:
    teacher_server.allowed, teacher_server.scale_out = allowed, scale_out
    batch, expected = batch_of(toy_cache)
    scores = scorer_of(served(recipe, teacher_server), topk).compute_logprobs(batch)
    assert_agrees(scores, expected, recorded=recorded)
    assert said in capsys.readouterr().err
    assert (scores.topk_ids is not None) == bool(topk)
    alone = scorer_of(served(recipe, teacher_server)).compute_logprobs(batch.blocks[0])
    np.testing.assert_allclose(alone.logprobs, scores.logprobs, atol=1e-6)
    assert alone.candidate_logprobs is None


def test_another_model_behind_the_name_is_refused(
    unscored: Path, recipe: Make, teacher_server: TeacherServer
) -> None:
    teacher_server.temperature = 0.2
    with pytest.raises(ModelError, match=r"the server and the training forward differ by .* nats a token on average"):
        stage.run(served(recipe, teacher_server), str(unscored))
    assert cs.open(unscored).round().scorer_names() == ["student"]


def test_a_server_whose_second_answer_is_another_is_refused(
    unscored: Path, recipe: Make, teacher_server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a prefix cache gives whose entries are not the model's."""
    score = ServerScorer.compute_logprobs

    def score_and_warm_up(self: ServerScorer, batch: TokenBatch) -> cs.ScoreBlock:
        scores = score(self, batch)
        teacher_server.temperature = 0.2
        return scores

    monkeypatch.setattr(ServerScorer, "compute_logprobs", score_and_warm_up)
    with pytest.raises(ModelError, match=r"the server and a second call of it differ by .* nats a token on average"):
        stage.run(served(recipe, teacher_server), str(unscored))
    assert cs.open(unscored).round().scorer_names() == ["student"]


def test_a_served_adapter_without_effect_is_refused(
    unscored: Path, tmp_path: Path, recipe: Make, teacher_server: TeacherServer
) -> None:
    """The server runs the teacher without it. Its effect is too small for the comparison of log-probs in bf16."""
    adapter = random_adapter(asset_path("teacher"), tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    weakened = {name: tensor * 0.02 if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(weakened, adapter / "adapter_model.safetensors", {"format": "pt"})
    made = served(recipe, teacher_server, f"teacher.adapter={adapter}")
    with pytest.raises(ModelError, match=r"teacher\.adapter = .*the server shows -?\d% of the effect"):
        stage.run(made, str(unscored))
    assert cs.open(unscored).round().scorer_names() == ["student"]


def test_the_weights_of_a_served_teacher_are_not_fetched(
    unscored: Path,
    tmp_path: Path,
    recipe: Make,
    teacher_server: TeacherServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "snapshot"

    def snapshot_download(repo: str, **options: Any) -> str:
        """The Hub, which holds the toy teacher."""
        assert repo == "org/teacher"
        if not options.get("local_files_only"):
            refused = shutil.ignore_patterns(*options["ignore_patterns"])
            shutil.copytree(asset_path("teacher"), directory, ignore=refused, dirs_exist_ok=True)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    made = served(recipe, teacher_server, "teacher.model=org/teacher")
    assert stage.run(made, str(unscored)) == 0
    assert (directory / "config.json").exists() and not list(directory.glob("*.safetensors"))
    assert "the server cannot be checked against them" in capsys.readouterr().err
    identity = cs.open(unscored).round().scores("teacher").manifest.model  # type: ignore[union-attr]
    beside = TeacherConfig(model="toy:teacher", served_name="teach")
    assert identity.digest == resolve(beside).served_identity.digest
    assert resolve(TeacherConfig(model="toy:teacher")).served_identity.digest != identity.digest
    assert not list(cs.verify(cs.open(unscored)))


def test_a_server_that_dies_costs_the_blocks_in_flight(
    unscored: Path, recipe: Make, teacher_server: TeacherServer
) -> None:
    made = served(recipe, teacher_server, "score.server_requests=1", "score.server_retries=1")
    teacher_server.after = (40, "reset")  # of 96, and the sample
    with pytest.raises(ModelError, match=r"2 requests in a row failed.*finished blocks are committed"):
        stage.run(made, str(unscored))
    group = cs.open(unscored).round().scores("teacher")
    committed = group.committed()
    assert committed.any() and not committed.all()
    before = {int(b): group.commits()["committed_at_us"][b] for b in np.flatnonzero(committed)}
    assert not list(cs.verify(cs.open(unscored)))
    teacher_server.after = teacher_server.always = None
    assert stage.run(made, str(unscored)) == 0
    group = cs.open(unscored).round().scores("teacher")
    assert group.committed().all() and not list(cs.verify(cs.open(unscored)))
    assert before == {b: group.commits()["committed_at_us"][b] for b in before}


def test_a_stop_drops_requests_at_once(toy_cache: Path, recipe: Make, teacher_server: TeacherServer) -> None:
    scorer = scorer_of(served(recipe, teacher_server))
    batch, _ = batch_of(toy_cache)
    scorer.compute_logprobs(batch)
    teacher_server.always = "hang"
    started, calls = time.monotonic(), []

    def on_tile(n_read: int) -> None:
        calls.append(n_read)
        if len(calls) > 2:
            raise Interrupted(signal.SIGTERM)

    stopped = scorer_of(served(recipe, teacher_server), on_tile=on_tile)
    stopped._columns = scorer._columns
    with pytest.raises(Interrupted):
        stopped.compute_logprobs(batch)
    assert time.monotonic() - started < 5 and calls == [0, 0, 0]


def test_sigterm_ends_a_run_whose_server_hangs(
    unscored: Path, tmp_path: Path, recipe: Make, teacher_server: TeacherServer
) -> None:
    teacher_server.after = (20, "hang")
    (tmp_path / "served.toml").write_text(served(recipe, teacher_server).to_toml())
    recipe_file = str(tmp_path / "served.toml")
    process = preloaded.python("-m", "pipeline", "score", recipe_file, "--cache", str(unscored))
    deadline = time.monotonic() + 120
    while teacher_server.always is None:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "0 of 6 blocks by teacher are committed; the same command continues" in err and "Traceback" not in err
    assert not list(cs.verify(cs.open(unscored)))
