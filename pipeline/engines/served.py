"""Scoring by a served teacher: an OpenAI-compatible API, such as `vllm serve`, that returns prompt log-probs.

Of two endpoints, the better one that the server supports is used: vLLM's `/inference/v1/generate` returns log-probs
of the candidates (vLLM 0.32 with its newer model runner and `--enable-scale-out`), `/v1/completions` with
`prompt_logprobs` those of its likeliest tokens, as many as `--max-logprobs` allows. Requests contain token ids, and
each response must be about these. Requests that fail for a reason that may pass are repeated.
`pipeline.engines.prompt_logprobs` makes scores of the responses.

The weights on the server cannot be seen, so a served teacher's identity is its configuration and its name there.

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
    ScoreRequest,
    joined,
    misaligned,
    partial_scores,
    score_requests,
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
from pipeline.errors import ConfigError, ModelError, RedpenError, shorten
from pipeline.files import parse_json, parse_model
from pipeline.models.resolve import resolve, setting_name

_T = TypeVar("_T")

_API_KEYS = ("REDPEN_API_KEY", "OPENAI_API_KEY")
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.2
_WARNING_SECONDS = 30.0
_TRIAL_TOKENS = 16  # response tokens of the first, short request
# Enough work to keep every connection busy, and little to repeat if the server fails.
_TOKENS_PER_REQUEST = 256
#: Most bytes of a response: of /models; for each token sent; for each token returned at a position, with its text and
#: rank; for each log-prob in base64; for the rest. An error's text is shortened.
_MODELS_BYTES, _TOKEN_BYTES, _RETURNED_BYTES, _GIVEN_BYTES, _OTHER_BYTES = 2**24, 64, 256, 16, 2**20
_ERROR_BYTES = 2**16


@dataclass(frozen=True)
class _Columns:
    """Log-probs to request at a position: of `given` candidates (0: unsupported), and of the `likeliest` tokens."""

    given: int
    likeliest: int


class ServerScorer:
    """Scores tokens through a server: log-probs of the tokens, of candidates if it returns them, of its likeliest; no
    entropy.

    Args:
        teacher: `url`, `served_name`; its configuration is loaded here, its weights are not.
        max_length: tokens of the longest rollout, prompt and response together.
        on_tile: called between responses, and a few times a second, with the response tokens scored since the last
            call; what it raises cancels the outstanding requests.

    Raises:
        ConfigError: the URL is invalid, or the server returns fewer log-probs than the recipe needs.
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
        self._key = next((key for name in _API_KEYS if (key := os.environ.get(name, "").strip())), None)
        if self._key is not None and not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"{' or '.join(_API_KEYS)}: expected the server's key in printable ASCII, found other characters; "
                "set the environment variable again"
            )
        self._columns: _Columns | None = None
        self._warned_at = -_WARNING_SECONDS
        asyncio.run(self._check_server(max_length))

    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock:
        """Scores of every response token of the batch, [T] end to end.

        Raises `ModelError` for ids that the model lacks, responses about other tokens, and a server that stays
        unreachable.
        """
        return asyncio.run(self._score(score_requests(as_batch(batch), self._vocab_size, self._who)))

    # -- the server ------------------------------------------------------------------------------------------

    async def _check_server(self, max_length: int) -> None:
        """Raise `ModelError` unless the server serves the model, at this length."""
        async with self._client() as client:
            try:
                answer = await self._retried(lambda: self._send(client, "GET", self._at("models"), _MODELS_BYTES))
            except Refused as refusal:
                if refusal.status != 404:  # a server without a list of models may have the model
                    raise self._refusal(refusal) from refusal
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

    async def _choose_columns(self, client: httpx2.AsyncClient, request: ScoreRequest) -> _Columns:
        """The most columns that the server returns, found by trial."""
        short = ScoreRequest(
            request.token_ids[: request.start + _TRIAL_TOKENS],
            request.start,
            None if request.candidate_ids is None else request.candidate_ids[:_TRIAL_TOKENS],
        )
        wanted, topk = request.n_candidates, self._options.topk
        choices = [_Columns(wanted, topk), _Columns(0, max(wanted, topk, LIKELIEST))]
        while True:
            columns = choices.pop(0)
            try:
                await self._retried(lambda columns=columns: self._request(client, short, columns))  # type: ignore[misc]
            except Refused as refusal:
                if refusal.allowed is not None and max(columns.given, columns.likeliest) > refusal.allowed > 0:
                    # the likeliest then include candidates beyond the requested ones
                    more = columns.given > refusal.allowed
                    most = refusal.allowed if more else min(columns.likeliest, refusal.allowed)
                    choices.insert(0, _Columns(min(columns.given, refusal.allowed), most))
                elif not choices:
                    raise self._refusal(refusal) from refusal
                continue
            break
        if columns.likeliest < topk:
            raise ConfigError(
                f"score.teacher_topk = {topk}: {self._who} returns {columns.likeliest} log-probs at a position; "
                f"lower it, or start the server with --max-logprobs {topk}"
            )
        if not columns.given:
            say(
                f"{self._who}: returns its {columns.likeliest} likeliest tokens, other candidates count as the rest; "
                f"vLLM's --enable-scale-out --max-logprobs {max(wanted, LIKELIEST)} may return all"
            )
        elif columns.given < wanted:
            say(
                f"{self._who}: returns {columns.given} of {wanted} candidates and its {columns.likeliest} likeliest "
                f"tokens, others count as the rest; --max-logprobs {wanted} at the server returns all"
            )
        return columns

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

    async def _score(self, requests: list[ScoreRequest]) -> cs.ScoreBlock:
        returned: dict[int, cs.ScoreBlock] = {}
        async with self._client() as client:
            if self._columns is None:
                self._columns = await self._choose_columns(client, requests[0])
            columns, free = self._columns, asyncio.Semaphore(self._settings.server_requests)

            async def score(request: ScoreRequest) -> cs.ScoreBlock:
                async with free:
                    return await self._retried(lambda: self._request(client, request, columns))

            waiting = {asyncio.create_task(score(request)): number for number, request in enumerate(requests)}
            try:
                while waiting:
                    done, _ = await asyncio.wait(waiting, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    n_scored = 0
                    for task in done:
                        number = waiting.pop(task)
                        returned[number] = task.result()
                        n_scored += returned[number].n_tokens
                    self._on_tile(n_scored)
            except Refused as refusal:
                raise self._refusal(refusal) from refusal
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        return joined([returned[number] for number in range(len(requests))])

    async def _request(self, client: httpx2.AsyncClient, request: ScoreRequest, columns: _Columns) -> cs.ScoreBlock:
        """The scores of one rollout. Raises `Refused`, `Failed`, and `ModelError` for a wrong response."""
        sent = request.token_ids.tolist()
        if columns.given:
            ids = request.given_ids(columns.given, self._vocab_size)
            sampling: dict[str, Any] = {
                "max_tokens": 1,
                "temperature": 0,
                "detokenize": False,
                "prompt_logprob_token_ids": ids.tolist(),
                "prompt_logprob_start": request.start - 1,  # row i predicts token i + 1
            }
            if columns.likeliest:
                sampling["prompt_logprobs"] = columns.likeliest
            body = {"model": self._name, "token_ids": sent, "sampling_params": sampling, "return_token_ids": True}
            path = str(self._url).removesuffix("/v1") + "/inference/v1/generate"
        else:
            body = {
                "model": self._name,
                "prompt": sent,
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": columns.likeliest,
                "return_token_ids": True,
            }
            path = self._at("completions")
        width = columns.likeliest + 1
        at_most = _OTHER_BYTES + len(sent) * (_TOKEN_BYTES + width * _RETURNED_BYTES)
        at_most += len(request.response) * columns.given * _GIVEN_BYTES
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
                returned = EngineLogprobs.from_positions(
                    positions, request, vocab_size=self._vocab_size, at_most=2 * width + 16
                )
            if columns.given:
                if echoed is None or (encoded := answer.prompt_token_id_logprobs) is None:
                    raise Refused(501, "did not return the log-probs of the requested ids")
                given = EngineLogprobs.of_given_ids(ids, decode_array(encoded, ids.shape))
                returned = given if returned is None else given.joined_with(returned)
            if returned is None:
                raise ModelError("returned no prompt_logprobs; serve the teacher with vLLM")
            return partial_scores(
                request,
                returned,
                self._options.topk if columns.likeliest >= self._options.topk else 0,
                self._options.topk_among,
            )
        except ModelError as error:
            raise ModelError(f"{self._who}: {error}; nothing of it is stored") from error

    async def _send(
        self, client: httpx2.AsyncClient, method: str, url: str, at_most: int, body: Any = None
    ) -> dict[str, Any]:
        """The JSON object of the response, of `at_most` bytes. Raises `Refused`, `Failed`, `ModelError`."""
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
            raise Failed(self._excerpt(f"{type(error).__name__}: {error}")) from None
        except zlib.error as error:
            raise Failed(f"its compressed answer is damaged ({error})") from None
        text = content.decode("utf-8", "replace")
        if response.status_code in _RETRIED:
            raise Failed(f"{response.status_code}: {self._excerpt(text)}", retry_after(response))
        if response.status_code != 200:
            raise Refused(response.status_code, self._excerpt(text))
        try:
            answer = parse_json(text, "answer")
        except RedpenError:
            raise Failed(f"not JSON: {self._excerpt(text)}") from None
        if not isinstance(answer, dict):
            raise Failed(f"expected a JSON object, got {type(answer).__name__}")
        return answer

    async def _retried(self, send: Callable[[], Awaitable[_T]]) -> _T:
        """The result of `send`, which is repeated after a failure; the waits grow, by a random factor."""
        for n_failures in range(self._settings.server_retries + 1):
            try:
                return await send()
            except Failed as failure:
                last = failure
            if n_failures == self._settings.server_retries:
                break
            wait = min(_FIRST_WAIT * 2**n_failures, _LONGEST_WAIT) * random.uniform(0.5, 1)
            if time.monotonic() - self._warned_at >= _WARNING_SECONDS:
                self._warned_at = time.monotonic()
                warn(f"{self._who}: {last}; retrying up to {self._settings.server_retries} times")
            await asyncio.sleep(max(wait, last.wait or 0))
        raise ModelError(
            f"{self._who}: {n_failures + 1} requests in a row failed, the last by {last}; finished blocks are "
            "committed, start the server and run the same command again"
        ) from last

    def _refusal(self, refusal: Refused) -> ModelError:
        """The error for a refused request, with a remedy."""
        remedies = {
            401: f"set the environment variable {' or '.join(_API_KEYS)} to its key",
            403: f"set the environment variable {' or '.join(_API_KEYS)} to a key that may use {self._name!r}",
            404: f"check the URL (it usually ends in /v1) and {setting_name(self._teacher, 'served_name')}, "
            f"now {self._name!r}",
            400: f"{self._name!r} must be served with the length of the rollouts and one more (--max-model-len)",
        }
        remedy = remedies.get(refusal.status, "the server must return prompt_logprobs; vLLM's does")
        return ModelError(f"{self._who}: refused with {refusal.status}: {refusal}; {remedy}")

    def _excerpt(self, text: str) -> str:
        """The server's message on a short line, without the key."""
        with contextlib.suppress(AttributeError, RedpenError):
            error = parse_json(text, "answer")
            error = error.get("error", error)
            text = str(error.get("message") or error.get("detail") or text)
        return shorten(text.replace(self._key, "***") if self._key else text)
