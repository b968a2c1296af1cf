"""Whatever a served teacher answers: one line, or right log-probs; never more memory than was asked for."""

from __future__ import annotations

import base64
import copy
import gzip
import io
import json
import random
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import pytest

import cache_schema as cs
from pipeline.config import ScoreConfig, TeacherConfig, load_recipe
from pipeline.engines import served as server
from pipeline.engines import server_answers
from pipeline.engines.scoring import ScoreOptions, TokenBatch
from pipeline.engines.served import ServerScorer
from pipeline.errors import ConfigError, ModelError

TEACHER = TeacherConfig(model="toy:teacher", placement="server", url="http://host/v1", served_name="teach")
MODELS = {"data": [{"id": "teach", "max_model_len": 64}]}
RESPONSE = np.array([5, 6, 7, 2], np.int32)
CANDIDATES = np.array([[5, 1, 3], [6, 2, 3], [7, 2, 4], [2, 9, 4]], np.int32)
LOGPROB = float(np.log(np.float32(0.05)))

Handler = Callable[[httpx2.Request], httpx2.Response]


def batch() -> TokenBatch:
    prompt = np.array([3, 4], np.int32)
    row = cs.RolloutRow(0, 0, RESPONSE, np.zeros(len(RESPONSE), np.float32), cs.FINISH_STOP)
    return TokenBatch((cs.RolloutBlock.from_rows([(0, prompt)], [row]),), CANDIDATES)


def reading(request: httpx2.Request) -> dict[str, Any]:
    """The answer of a teacher that knows every token equally well."""
    body = json.loads(request.content)
    asked = body.get("sampling_params", body)
    ids = body.get("token_ids") or body["prompt"]
    n = asked.get("prompt_logprobs") or 0
    positions: list[Any] = [None]
    for token in ids[1:]:
        recorded = [token, *[other for other in range(10, 10 + n) if other != token][: min(n, 15)]]
        positions.append({str(one): {"logprob": LOGPROB, "rank": 1, "decoded_token": "?"} for one in recorded})
    choice = {"prompt_logprobs": positions if n else None, "prompt_token_ids": ids}
    if (given := asked.get("prompt_logprob_token_ids")) is None:
        return {"choices": [choice]}
    np.save(file := io.BytesIO(), np.full(np.shape(given), LOGPROB, np.float32))
    return {"choices": [{}], "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode(), **choice}


def answering(post: Handler, models: Any = MODELS) -> Handler:
    def handler(request: httpx2.Request) -> httpx2.Response:
        return post(request) if request.method == "POST" else sent(models)

    return handler


def score(monkeypatch: pytest.MonkeyPatch, handler: Handler, **settings: Any) -> cs.ScoreBlock:
    transport = httpx2.MockTransport(handler)
    monkeypatch.setattr(ServerScorer, "_client", lambda self: httpx2.AsyncClient(transport=transport))
    made = ScoreConfig(server_retries=0, **settings)
    scorer = ServerScorer(TEACHER, made, ScoreOptions(candidates=3), max_length=48)
    return scorer.compute_logprobs(batch())


def raw(content: bytes, status: int = 200, **headers: str) -> Handler:
    """Sends its body in a piece, as a stream."""

    async def body() -> AsyncIterator[bytes]:
        yield content

    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: httpx2.Response(status, content=body(), headers=names)


def sent(answer: Any) -> httpx2.Response:
    return raw(json.dumps(answer).encode())(httpx2.Request("GET", "http://host"))


def refused(monkeypatch: pytest.MonkeyPatch, handler: Handler, **settings: Any) -> str:
    with pytest.raises(ModelError, match=r"teacher\.url = 'http://host/v1'") as caught:
        score(monkeypatch, handler, **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


HOSTILE = (
    *(None, True, -1, 0, 2**70, 10**400, -(10**400), 1.5, 1e300, float("nan"), float("inf"), "", "x", "9" * 300),
    *([], {}, [1], [[]], {"x": 1}, [None] * 5, {str(2**70): {"logprob": -1.0}}, {"-1": {"logprob": -1.0}}, "AAAA"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(item, (*path, key))


def mutated(rng: random.Random, value: Any) -> Any:
    value, path = copy.deepcopy(value), rng.choice(list(places(value)))
    if not path:
        return rng.choice(HOSTILE)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if rng.random() < 0.2:
        del holder[path[-1]]
    else:
        holder[path[-1]] = rng.choice(HOSTILE)
    return value


@pytest.mark.parametrize("seed", range(6))
def test_a_mutated_answer_is_one_line_or_right(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_FIRST_WAIT", 0.0)
    right = score(monkeypatch, answering(lambda request: sent(reading(request))))
    np.testing.assert_allclose(right.logprobs, LOGPROB, rtol=1e-6)
    for number in range(60):
        rng = random.Random(f"{seed} {number}")
        whose = rng.random()

        def handler(request: httpx2.Request, rng: random.Random = rng, whose: float = whose) -> httpx2.Response:
            answer: Any = reading(request) if request.method == "POST" else MODELS
            if (whose < 0.15) == (request.method == "GET"):
                answer = mutated(rng, answer)
            return sent(answer)

        try:
            scores = score(monkeypatch, handler)
        except ModelError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, number
            continue
        known = scores.logprobs[np.isfinite(scores.logprobs)]
        assert len(scores.logprobs) == 4 and (known <= 0.01).all(), number


def encoded(array: Any = None, content: bytes | None = None) -> Handler:
    if content is None:
        np.save(file := io.BytesIO(), array, allow_pickle=True)
        content = file.getvalue()

    def handler(request: httpx2.Request) -> httpx2.Response:
        answer = reading(request)
        if "prompt_token_id_logprobs" in answer:
            answer["prompt_token_id_logprobs"] = base64.b64encode(content).decode()
        return sent(answer)

    return answering(handler)


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000, 3), }"
HUGE = b"\x93NUMPY\x01\x00v\x00" + HEADER.ljust(117)


@pytest.mark.parametrize(
    "handler",
    [
        encoded(content=b""),
        encoded(content=b"\x93NUMPY"),
        encoded(content=HUGE + b"\n"),
        encoded(np.zeros((4, 2), np.float32)),
        encoded(np.zeros((4, 3), np.int64)),
        encoded(np.array([[{}] * 3] * 4, object)),
        encoded(np.full((4, 3), np.nan, np.float32)),
        encoded(np.full((4, 3), 0.5, np.float32)),
    ],
)
def test_an_invalid_array_is_one_line(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(monkeypatch, handler)


def test_answers_are_bounded_by_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = b" " * 2**25
    deflated = zlib.compress(spaces)
    for content, headers in (
        (spaces, {}),
        (gzip.compress(spaces), {"content_encoding": "gzip"}),
        (deflated, {"content_encoding": "deflate"}),
    ):
        assert "bytes" in refused(monkeypatch, answering(raw(content, **headers)))
        assert "bytes" in refused(monkeypatch, raw(content, **headers))
    good = json.dumps(MODELS).encode()

    def zipped(request: httpx2.Request) -> httpx2.Response:
        content = good if request.method == "GET" else json.dumps(reading(request)).encode()
        return raw(gzip.compress(content), content_encoding="gzip")(request)

    np.testing.assert_allclose(score(monkeypatch, zipped).logprobs, LOGPROB, rtol=1e-6)
    for content, headers in (
        (b"[" * 200_000, {}),
        (b'{"a":' * 100_000, {}),
        (b"\xff" * 1000, {"content_encoding": "gzip"}),
        (good, {"content_encoding": "zstd"}),
        (good, {"content_encoding": "br"}),
    ):
        refused(monkeypatch, answering(raw(content, **headers)))
    for status in (400, 500, 503):
        refused(monkeypatch, answering(raw(b"[" * 2**25, status)))


def test_a_drip_ends_with_the_time_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    said = refused(monkeypatch, answering(lambda request: httpx2.Response(200, content=drip())), server_timeout=0.3)
    assert "no answer in 0.3 s" in said


@pytest.mark.parametrize("when", ["nan", "inf", "-5", "x", "1e400"])
def test_a_retry_after_header_is_bounded(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (server_answers.retry_after(httpx2.Response(429, headers={"retry-after": when})) or 0) <= 60


def test_a_key_that_no_header_can_hold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDPEN_API_KEY", "S3cr3t\xe9")
    recipe = load_recipe("toy", ["score.placement=server", "teacher.url=http://127.0.0.1:9/v1"])
    with pytest.raises(ConfigError, match="REDPEN_API_KEY") as caught:
        ServerScorer(recipe.teacher[0], recipe.score, ScoreOptions(), max_length=8)
    assert "S3cr3t" not in str(caught.value) and "\n" not in str(caught.value)
