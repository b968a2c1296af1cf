"""A model of a recipe, looked up once and passed on: its files, configuration, tokenizer and identity.

    student = resolve(recipe.student)
    student.vocab_size, student.tokenizer, student.identity, student.stop_token_ids(recipe.rollouts)

Each is read when it is first asked for, and then kept: downloading, tokenizers and digests of weights are costly.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer

import cache_schema as cs
from pipeline.config import ModelConfig, RolloutsConfig, TeacherConfig
from pipeline.errors import ModelError, RedpenError, one_line
from pipeline.models.files import check_files, check_tokenizer_files, read_config, read_generation_config
from pipeline.models.identity import adapter_digest, hub_commit, model_digest, served_digest, tokenizer_digest
from pipeline.models.paths import find_directory, resolve_path
from pipeline.quantised.formats import Format, formats_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve(model: ModelConfig | ResolvedModel) -> ResolvedModel:
    """The model of a recipe's section; one that is resolved already is returned unchanged."""
    return model if isinstance(model, ResolvedModel) else ResolvedModel(model)


def setting_name(cfg: ModelConfig, field: str) -> str:
    """A model setting's name in the recipe: `student.model`, `teacher.model`, `teacher.NAME.model`."""
    if not isinstance(cfg, TeacherConfig):
        return f"student.{field}"
    return f"teacher.{field}" if cfg.name == "teacher" else f"teacher.{cfg.name}.{field}"


@dataclass(frozen=True, eq=False)
class ResolvedModel:
    """Everything about a model that can be known without loading its weights. Attributes raise `ModelError`."""

    settings: ModelConfig

    def setting(self, field: str) -> str:
        """A setting with its value, for messages: `student.model = 'Qwen/Qwen3-8B'`."""
        return f"{setting_name(self.settings, field)} = {getattr(self.settings, field)!r}"

    # -- files -------------------------------------------------------------------------------------------------

    @cached_property
    def directory(self) -> Path:
        """The model's directory, its weights included."""
        return self._directory(weights=True)

    @cached_property
    def config_directory(self) -> Path:
        """The same directory; of a Hub repository, weights need not be in it."""
        return self._directory(weights=False)

    @cached_property
    def adapter_directory(self) -> Path | None:
        """The directory of the model's PEFT adapter; None if it has none."""
        cfg = self.settings
        if cfg.adapter is None:
            return None
        directory = find_directory(resolve_path(cfg.adapter), setting_name(cfg, "adapter"))
        if not (directory / "adapter_config.json").is_file():
            raise ModelError(
                f"{self.setting('adapter')}: no adapter_config.json in {directory}; expected a PEFT adapter, such as "
                "RUN/adapter"
            )
        check_files(directory)
        return directory

    def _directory(self, *, weights: bool) -> Path:
        cfg = self.settings
        name = setting_name(cfg, "model")
        directory = find_directory(
            resolve_path(cfg.model),
            name,
            revision=cfg.revision,
            with_code=cfg.trust_remote_code,
            weights=weights,
        )
        if (directory / "config.json").is_file():
            check_files(directory)
            return directory
        remedy = "expected a model saved by save_pretrained()"
        if (directory / "adapter_config.json").is_file():
            adapter = setting_name(cfg, "adapter")
            remedy = f"this is a PEFT adapter: set {adapter} to it and {name} to its base model"
        if gguf := next(iter(sorted(directory.glob("*.gguf"))), None):
            remedy = (
                f"GGUF is not read: convert it with AutoModelForCausalLM.from_pretrained(DIR, "
                f"gguf_file={gguf.name!r}).save_pretrained(OUT), and its tokenizer in the same way"
            )
        raise ModelError(f"{self.setting('model')}: no config.json in {directory}; {remedy}")

    # -- configuration -----------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> PretrainedConfig:
        """config.json as transformers reads it. One that is quantised may not be quantised again."""
        cfg = self.settings
        read_config(self.config_directory)
        with self.loading_errors("its config.json cannot be used"):
            config = AutoConfig.from_pretrained(
                self.config_directory, trust_remote_code=cfg.trust_remote_code, local_files_only=True
            )
            int(config.get_text_config().vocab_size)
            if not isinstance(config.dtype, torch.dtype | None):
                raise ValueError(f"dtype: expected one of torch's, found {config.dtype!r}")
        if cfg.quantisation is not None and (method := _quantisation(config)):
            raise ModelError(
                f'{setting_name(cfg, "quantisation")} = "{cfg.quantisation}": {cfg.model} is quantised already '
                f"({method}); leave the setting out, or choose the unquantised model"
            )
        return config

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer; may exceed the tokenizer's size (padding)."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """Positions that the model was made for; None if config.json does not say.

        LongRoPE and dynamic NTK choose their frequencies by the longest sequence of a forward: beyond the original
        length a rollout would depend on what is beside it and on whether its start is cached, so their context ends
        there.
        """
        text = self.config.get_text_config()
        context: int | None = getattr(text, "max_position_embeddings", None)
        rope = getattr(text, "rope_parameters", None) or {}
        for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
            original = parameters.get("original_max_position_embeddings")
            if parameters.get("rope_type") in ("longrope", "dynamic") and original:
                context = min(original, context or original)
        return context

    @property
    def dtype(self) -> str:
        """Type of the weights once loaded, e.g. "bfloat16"."""
        config = self.config  # read in any case, so that a bad one is refused before the weights are loaded
        dtype = _DTYPES.get(self.settings.dtype) or config.dtype or torch.float32
        return str(dtype).removeprefix("torch.")

    @property
    def quantisation(self) -> str | None:
        """ "nf4" if the model is quantised while loading, or the method of a quantised checkpoint, e.g. "gptq"."""
        return _quantisation(self.config) or self.settings.quantisation

    @property
    def scored_quantisation(self) -> str | None:
        """The same of the model in this process: "gptq, dequantised" if its weights are dequantised on loading."""
        return f"{self.quantisation}, dequantised" if self.formats else self.quantisation

    @cached_property
    def formats(self) -> list[Format]:
        """Of a checkpoint whose quantised weights are dequantised here, resident or streamed; [] of any other."""
        try:
            return self.require_formats()
        except ModelError:
            return []

    def require_formats(self) -> list[Format]:
        """The same. Raises `ModelError` with the reason for a quantised checkpoint that has none."""
        settings = _quantisation_settings(self.config)
        return formats_of(settings) if settings else []

    @property
    def dense_config(self) -> PretrainedConfig:
        """The configuration of the model once its weights are dequantised; a copy."""
        config = copy.deepcopy(self.config)
        for part in (config, config.get_text_config()):
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config
        return config

    @property
    def architectures(self) -> list[str]:
        """The classes that config.json names."""
        found = read_config(self.config_directory)
        return found.architectures or [found.model_type or "its architecture"]

    # -- tokenizer ---------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        check_tokenizer_files(self.config_directory)
        remedy = "save it beside the model with tokenizer.save_pretrained()"
        with self.loading_errors("its tokenizer cannot be loaded", remedy):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.config_directory, trust_remote_code=self.settings.trust_remote_code, local_files_only=True
            )
            if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
                raise ValueError("it has no vocabulary")  # what transformers returns if there are no tokenizer files
            if min(tokenizer.get_vocab().values()) < 0:
                raise ValueError("it has ids below 0")
            tokenizer.decode(tokenizer("a")["input_ids"])  # a setting of another type fails at the first text
        return tokenizer

    @cached_property
    def tokenizer_identity(self) -> cs.TokenizerIdentity:
        """The tokenizer by digest; its `vocab_size` is the highest id plus one."""
        size = max(self.tokenizer.get_vocab().values()) + 1
        return cs.TokenizerIdentity(self.settings.model, tokenizer_digest(self.tokenizer), size)

    @property
    def known_tokens(self) -> int:
        """Ids below this are both rows of the output layer and tokens of the tokenizer."""
        return min(self.vocab_size, self.tokenizer_identity.vocab_size)

    def stop_token_ids(self, rollouts: RolloutsConfig) -> tuple[int, ...]:
        """Ids that end a response: `rollouts.stop_token_ids`, or every EOS id of the model and its tokenizer.

        Raises `ModelError` if there is none: responses would never end.
        """
        if rollouts.stop_token_ids is not None:
            return tuple(sorted(set(rollouts.stop_token_ids)))
        sources = {
            "its tokenizer": self.tokenizer.eos_token_id,
            "its config.json": self.config.get_text_config().eos_token_id,
            "its generation_config.json": read_generation_config(self.config_directory).eos_token_id,
        }
        ids: set[int] = set()
        for file, value in sources.items():
            found = set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
            if wrong := sorted(token for token in found if not 0 <= token < self.vocab_size):
                raise ModelError(
                    f"{self.setting('model')}: {file} names {wrong[0]} as an EOS token, expected an id below "
                    f"{self.vocab_size}; correct it, or set rollouts.stop_token_ids"
                )
            ids |= found
        if not ids:
            raise ModelError(
                f"{self.setting('model')}: neither the model nor its tokenizer names an EOS token; set "
                "rollouts.stop_token_ids"
            )
        return tuple(sorted(ids))

    # -- identity ----------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> cs.ModelIdentity:
        """The model by digest of its weights; see `pipeline.models.identity` for what it covers and costs."""
        return self._identity(self.directory, model_digest(self.directory))

    @cached_property
    def served_identity(self) -> cs.ModelIdentity:
        """A served teacher, as far as it is known on this machine: the digest is of its configuration and its name on
        the server, and begins with "served:". No weights are read.
        """
        assert isinstance(self.settings, TeacherConfig)
        name = self.settings.served_name or self.settings.model
        return self._identity(self.config_directory, f"served:{served_digest(self.config_directory, name)}")

    def _identity(self, directory: Path, digest: str) -> cs.ModelIdentity:
        adapter = self.adapter_directory
        return cs.ModelIdentity(
            name=self.settings.model,
            revision=hub_commit(directory),
            digest=digest,
            adapter_digest=adapter_digest(adapter) if adapter else None,
        )

    @contextlib.contextmanager
    def loading_errors(
        self, failed: str = "cannot be loaded as a causal language model", remedy: str = ""
    ) -> Iterator[None]:
        """Turn whatever libraries raise for files that they cannot use into a `ModelError`."""
        try:
            yield
        except (torch.OutOfMemoryError, RedpenError):
            raise
        except BaseException as error:
            # A panic of the tokenizers library (Rust) is not an Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            message = f"{self.setting('model')}: {failed} ({one_line(error)})"
            raise ModelError(message + (remedy and f"; {remedy}")) from error


def _quantisation(config: PretrainedConfig) -> str | None:
    """The method by which a checkpoint is quantised; None if it is not."""
    settings = _quantisation_settings(config)
    return str(settings.get("quant_method", "unknown")) if settings else None


def _quantisation_settings(config: PretrainedConfig) -> dict[str, Any] | None:
    """`quantization_config` of a model, or of the text model inside it."""
    parts = (config, config.get_text_config())
    found: Any = next((q for part in parts if (q := getattr(part, "quantization_config", None))), None)
    return found.to_dict() if found is not None and not isinstance(found, dict) else found
