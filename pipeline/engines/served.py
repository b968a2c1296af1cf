"""Scoring by a teacher that is served: an OpenAI-compatible API, such as `vllm serve`, that returns prompt log-probs.

Two ways of asking, the better one where the server has it: vLLM's `/inference/v1/generate` returns the log-probs of
the candidates themselves (vLLM 0.32 with its newer model runner and `--enable-scale-out`), `/v1/completions` with
`prompt_logprobs` those of its likeliest tokens, as many as `--max-logprobs` allows. Token ids go out, and each answer
must be about them. Requests that fail for a reason that may pass are sent again. What becomes of the answers:
`pipeline.engines.prompt_logprobs`.

The server shows no weights, so a served teacher's identity is its configuration and its name there.

    vllm serve TEACHER --enable-scale-out --max-logprobs 64
    REDPEN_API_KEY=... redpen score RECIPE --cache CACHE    # placement = "server", url = "http://host:8000/v1"
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

import cache_schema as cs
from pipeline.config import ScoreConfig, TeacherConfig
from pipeline.console import say, warn
from pipeline.credentials import mask
from pipeline.engines.prompt_logprobs import (
    LIKELIEST,
    EngineLogprobs,
    Question,
    joined,
    misaligned,
    partial_scores,
    questions,
)
from pipeline.engines.scoring import ScoreOptions, TokenBatch, as_batch
from pipeline.engines.server_answers import (
    Choice,
    Completion,
    Failed,
    ModelList,
    Refused,
    decode_array,
    first_difference,
    read_bounded,
    retry_after,
)
from pipeline.errors import ConfigError, ModelError, RedpenError
from pipeline.files import parse_json, parse_model
from pipeline.models.resolve import resolve, setting_name

_T = TypeVar("_T")

_KEYS = ("REDPEN_API_KEY", "OPENAI_API_KEY")
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.2
_QUIET_SECONDS = 30.0
_TRIED_ROLLOUT = 16  # response tokens of the first, short request
# Enough work to keep every request busy, little enough to lose little where the server dies.
_TOKENS_PER_REQUEST = 256
#: Bytes that an answer may have: about models; for each token sent; for each token returned at a position, with its
#: text and rank; for each log-prob in base64. An error's text is cut.
_MODELS_BYTES, _BYTES_A_TOKEN, _BYTES_A_TOLD, _BYTES_A_GIVEN, _OTHER_BYTES = 2**24, 64, 256, 16, 2**20
_ERROR_BYTES = 2**16


@dataclass(frozen=True)
class _Way:
    """How to ask: for `given` candidates by id (0: the server cannot), and for the `likeliest` tokens."""

    given: int
    likeliest: int


class ServerScorer:
    """Scores tokens through a server: log-probs of the tokens, of candidates if it returns them, of its likeliest; no
    entropy.

    Args:
        teacher: `url`, `served_name`; its configuration is read here, its weights are not.
        max_length: tokens of the longest rollout, prompt and response together.
        on_tile: called between answers, and a few times a second, with the response tokens read since the last call;
            what it raises drops the outstanding requests.

    Raises:
        ConfigError: the URL is none, or the server does not return as much as the recipe asks for.
        ModelError: no server, no such model there, or one that returns no prompt log-probs.
    """

    def __init__(
        self,
        teacher: TeacherConfig,
        settings: ScoreConfig,
        options: ScoreOptions = ScoreOptions(),  # noqa: B008  frozen
        *,
        max_length: int,
        on_tile: Callable[[int], None] = lambda tokens: None,
    ):
        assert teacher.url is not None
        try:
            url = httpx2.URL(teacher.url.rstrip("/"))
            if url.scheme not in ("http", "https") or not url.host:
                raise httpx2.InvalidURL("expected http:// or https:// and a host")
        except httpx2.InvalidURL as error:
            raise ConfigError(
                f"{setting_name(teacher, 'url')}: expected a URL such as http://localhost:8000/v1, got "
                f"{mask(teacher.url)!r} ({error})"
            ) from None
        self._url, self._teacher, self._name = url, teacher, teacher.served_name or teacher.model
        self._who = f"{setting_name(teacher, 'url')} = {mask(str(url))!r}"
        self._settings, self._options, self._on_tile = settings, options, on_tile
        self.batch_tokens = _TOKENS_PER_REQUEST * settings.server_requests
        self._vocab_size = resolve(teacher).vocab_size
        self._key = next((key for name in _KEYS if (key := os.environ.get(name, "").strip())), None)
        if self._key is not None and not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"{' or '.join(_KEYS)}: expected the server's key in printable ASCII, found other characters; set "
                "the environment variable again"
            )
        self._way: _Way | None = None
        self._said = -_QUIET_SECONDS
        asyncio.run(self._look(max_length))

    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock:
        """Scores of every response token of the batch, [T] end to end.

        Raises `ModelError` for ids the model lacks, answers about other tokens, and a server that is gone for good.
        """
        return asyncio.run(self._read(questions(as_batch(batch), self._vocab_size, self._who)))

    # -- the server ------------------------------------------------------------------------------------------

    async def _look(self, max_length: int) -> None:
        """Whether the server is there and serves the model, at this length."""
        async with self._client() as client:
            try:
                answer = await self._retried(lambda: self._send(client, "GET", self._at("models"), _MODELS_BYTES))
            except Refused as refusal:
                if refusal.status != 404:  # a server without a list of models may have the model
                    raise self._explained(refusal) from refusal
                return
        returned = parse_model(answer, ModelList, f"{self._who}: its list of models cannot be read", error=ModelError)
        served = {entry.id: entry.max_model_len for entry in returned.data or []}
        if served and self._name not in served:
            raise ModelError(
                f"{self._who}: serves {', '.join(map(repr, list(served)[:5]))}, not {self._name!r}; "
                f"set {setting_name(self._teacher, 'served_name')} to the model's name there"
            )
        if (context := served.get(self._name)) is not None and max_length >= context:
            raise ModelError(
                f"{self._who}: serves {self._name!r} with --max-model-len {context}, a rollout has {max_length} "
                f"tokens and one more is generated; serve it with {max_length + 1} or more"
            )

    async def _choose_way(self, client: httpx2.AsyncClient, question: Question) -> _Way:
        """The way that returns most, found by asking."""
        short = Question(
            question.token_ids[: question.start + _TRIED_ROLLOUT],
            question.start,
            None if question.candidate_ids is None else question.candidate_ids[:_TRIED_ROLLOUT],
        )
        wanted, topk = question.n_candidates, self._options.topk
        ways = [_Way(wanted, topk), _Way(0, max(wanted, topk, LIKELIEST))]
        while True:
            way = ways.pop(0)
            try:
                await self._retried(lambda way=way: self._ask(client, short, way))  # type: ignore[misc]
            except Refused as refusal:
                if refusal.allowed is not None and max(way.given, way.likeliest) > refusal.allowed > 0:
                    # the likeliest then include candidates beyond those asked for
                    more = way.given > refusal.allowed
                    most = refusal.allowed if more else min(way.likeliest, refusal.allowed)
                    ways.insert(0, _Way(min(way.given, refusal.allowed), most))
                elif not ways:
                    raise self._explained(refusal) from refusal
                continue
            break
        if way.likeliest < topk:
            raise ConfigError(
                f"score.teacher_topk = {topk}: {self._who} returns {way.likeliest} log-probs at a position; lower "
                f"it, or start the server with --max-logprobs {topk}"
            )
        if not way.given:
            say(
                f"{self._who}: returns its {way.likeliest} likeliest tokens, other candidates count as the rest; "
                f"vLLM's --enable-scale-out --max-logprobs {max(wanted, LIKELIEST)} may return all"
            )
        elif way.given < wanted:
            say(
                f"{self._who}: returns {way.given} of {wanted} candidates and its {way.likeliest} likeliest tokens, "
                f"others count as the rest; --max-logprobs {wanted} at the server returns all"
            )
        return way

    def _client(self) -> httpx2.AsyncClient:
        n_requests, seconds = self._settings.server_requests, self._settings.server_timeout
        return httpx2.AsyncClient(
            headers={"Accept-Encoding": "gzip"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            timeout=httpx2.Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds), pool=None),
            limits=httpx2.Limits(max_connections=n_requests, max_keepalive_connections=n_requests),
        )

    def _at(self, path: str) -> str:
        return f"{self._url}/{path}"

    # -- requests --------------------------------------------------------------------------------------------

    async def _read(self, asked: list[Question]) -> cs.ScoreBlock:
        returned: dict[int, cs.ScoreBlock] = {}
        async with self._client() as client:
            if self._way is None:
                self._way = await self._choose_way(client, asked[0])
            way, free = self._way, asyncio.Semaphore(self._settings.server_requests)

            async def read(question: Question) -> cs.ScoreBlock:
                async with free:
                    return await self._retried(lambda: self._ask(client, question, way))

            waiting = {asyncio.create_task(read(question)): number for number, question in enumerate(asked)}
            try:
                while waiting:
                    done, _ = await asyncio.wait(waiting, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    n_read = 0
                    for task in done:
                        number = waiting.pop(task)
                        returned[number] = task.result()
                        n_read += returned[number].n_tokens
                    self._on_tile(n_read)
            except Refused as refusal:
                raise self._explained(refusal) from refusal
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        return joined([returned[number] for number in range(len(asked))])

    async def _ask(self, client: httpx2.AsyncClient, question: Question, way: _Way) -> cs.ScoreBlock:
        """One request and its answer. Raises `Refused`, `Failed`, and `ModelError` for a wrong answer."""
        sent = question.token_ids.tolist()
        if way.given:
            ids = question.given_ids(way.given, self._vocab_size)
            sampling: dict[str, Any] = {
                "max_tokens": 1,
                "temperature": 0,
                "detokenize": False,
                "prompt_logprob_token_ids": ids.tolist(),
                "prompt_logprob_start": question.start - 1,  # row i predicts token i + 1
            }
            if way.likeliest:
                sampling["prompt_logprobs"] = way.likeliest
            body = {"model": self._name, "token_ids": sent, "sampling_params": sampling, "return_token_ids": True}
            path = str(self._url).removesuffix("/v1") + "/inference/v1/generate"
        else:
            body = {
                "model": self._name,
                "prompt": sent,
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": way.likeliest,
                "return_token_ids": True,
            }
            path = self._at("completions")
        width = way.likeliest + 1
        at_most = _OTHER_BYTES + len(sent) * (_BYTES_A_TOKEN + width * _BYTES_A_TOLD)
        at_most += len(question.response) * way.given * _BYTES_A_GIVEN
        answer = parse_model(
            await self._send(client, "POST", path, at_most, body),
            Completion,
            f"{self._who}: an answer that cannot be read",
            error=ModelError,
        )
        try:
            choice = (answer.choices or [Choice()])[0]
            echoed = answer.prompt_token_ids or choice.prompt_token_ids
            if echoed is not None and echoed != sent:
                raise misaligned(*first_difference(sent, echoed))
            returned = None
            if (positions := answer.prompt_logprobs or choice.prompt_logprobs) is not None:
                returned = EngineLogprobs.positions(
                    positions, question, vocab_size=self._vocab_size, at_most=2 * width + 16
                )
            if way.given:
                if echoed is None or (encoded := answer.prompt_token_id_logprobs) is None:
                    raise Refused(501, "did not return the log-probs of the ids asked for")
                given = EngineLogprobs.given(ids, decode_array(encoded, ids.shape))
                returned = given if returned is None else given.beside(returned)
            if returned is None:
                raise ModelError("returned no prompt_logprobs; serve the teacher with vLLM")
            return partial_scores(
                question,
                returned,
                self._options.topk if way.likeliest >= self._options.topk else 0,
                self._options.topk_among,
            )
        except ModelError as error:
            raise ModelError(f"{self._who}: {error}; nothing of it is stored") from error

    async def _send(
        self, client: httpx2.AsyncClient, method: str, url: str, at_most: int, body: Any = None
    ) -> dict[str, Any]:
        """The JSON object that is answered, of `at_most` bytes. Raises `Refused`, `Failed`, `ModelError`."""
        try:
            async with (
                asyncio.timeout(self._settings.server_timeout),
                client.stream(method, url, json=body) as response,
            ):
                is_answer = response.status_code == 200
                content = await read_bounded(response, at_most if is_answer else _ERROR_BYTES)
                if is_answer and len(content) > at_most:
                    raise ModelError(f"{self._who}: expected an answer of at most {at_most:,} bytes, got more")
        except TimeoutError:
            raise Failed(f"no answer in {self._settings.server_timeout:g} s") from None
        except httpx2.TransportError as error:
            raise Failed(self._shown(f"{type(error).__name__}: {error}")) from None
        except zlib.error as error:
            raise Failed(f"its compressed answer is damaged ({error})") from None
        text = content.decode("utf-8", "replace")
        if response.status_code in _AGAIN:
            raise Failed(f"{response.status_code}: {self._shown(text)}", retry_after(response))
        if response.status_code != 200:
            raise Refused(response.status_code, self._shown(text))
        try:
            answer = parse_json(text, "answer")
        except RedpenError:
            raise Failed(f"not JSON: {self._shown(text)}") from None
        if not isinstance(answer, dict):
            raise Failed(f"expected a JSON object, got {type(answer).__name__}")
        return answer

    async def _retried(self, send: Callable[[], Awaitable[_T]]) -> _T:
        """What `send` gives at last; waits longer after every failure, each request by a different time."""
        for n_failures in range(self._settings.server_retries + 1):
            try:
                return await send()
            except Failed as failure:
                last = failure
            if n_failures == self._settings.server_retries:
                break
            wait = min(_FIRST_WAIT * 2**n_failures, _LONGEST_WAIT) * random.uniform(0.5, 1)
            if time.monotonic() - self._said >= _QUIET_SECONDS:
                self._said = time.monotonic()
                warn(f"{self._who}: {last}; sending again, {self._settings.server_retries} times at most")
            await asyncio.sleep(max(wait, last.wait or 0))
        raise ModelError(
            f"{self._who}: {n_failures + 1} requests in a row failed, the last by {last}; finished blocks are "
            "committed, start the server and run the same command again"
        ) from last

    def _explained(self, refusal: Refused) -> ModelError:
        """What to do about a request that the server will not have."""
        remedies = {
            401: f"set the environment variable {_KEYS[0]} or {_KEYS[1]} to its key",
            403: f"set the environment variable {_KEYS[0]} or {_KEYS[1]} to a key that may use {self._name!r}",
            404: f"check the URL (it ends in /v1 as a rule) and {setting_name(self._teacher, 'served_name')}, "
            f"now {self._name!r}",
            400: f"{self._name!r} must be served with the length of the rollouts and one more (--max-model-len)",
        }
        remedy = remedies.get(refusal.status, "the server must return prompt_logprobs; vLLM's does")
        return ModelError(f"{self._who}: refused with {refusal.status}: {refusal}; {remedy}")

    def _shown(self, text: str) -> str:
        """What the server said, on a short line, without the key."""
        with contextlib.suppress(AttributeError, RedpenError):
            error = parse_json(text, "answer")
            error = error.get("error", error)
            text = str(error.get("message") or error.get("detail") or text)
        text = " ".join(text.replace(self._key, "***").split() if self._key else text.split())
        return text if len(text) <= 200 else text[:197] + "..."
