"""Models and tokenizers: where they lie, who they are, how they are loaded. Weights are safetensors only."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

import cache_schema as cs
from pipeline.config import ModelConfig, RolloutsConfig, StudentConfig, TeacherConfig
from pipeline.console import console, say
from pipeline.errors import ConfigError, ModelError, ModelNotFoundError, RedpenError
from pipeline.forward.finite import set_name
from pipeline.models.files import (
    check_model_files,
    check_tokenizer_files,
    named,
    read_adapter_config,
    read_config,
    read_generation_config,
    without_place,
)
from pipeline.models.identity import (
    adapter_digest,
    hub_commit,
    model_digest,
    served_digest,
    tokenizer_digest,
    weight_files,
)
from pipeline.runs.files import MADE, check, check_made, read_record
from pipeline.toy import asset_names, asset_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Attention = Literal["redpen_packed", "sdpa"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What a path or a Hub id may hold in letters, and how many of them a message repeats.
_LONGEST_NAME, _SHOWN = 4096, 120
# What lies beside a model's weights and belongs to it: tokenizer, chat template, generation settings.
_COMPANIONS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# What a model needs from its Hub repository, without the same weights in other layouts.
_HUB_FILES = [*_COMPANIONS, "*.safetensors"]
_HUB_DUPLICATES = ["original/*", "onnx/*", "metal/*", "consolidated*"]
_QUIET_BYTES = 2**30


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says before any weight is read.

    Attributes:
        vocab_size: rows of the output layer; may exceed the tokenizer's (padding).
        context: positions the model was made for, None if it does not say.
        dtype: of the weights once loaded, e.g. "bfloat16".
        quantisation: "nf4" where the model is quantised while loading, or the method of a quantised checkpoint,
            e.g. "gptq".
    """

    vocab_size: int
    context: int | None
    dtype: str
    quantisation: str | None


# -- where ---------------------------------------------------------------------------------------------------


def resolve_path(model: str) -> str:
    """`toy:NAME` as the directory of the embedded asset; any other path or Hub id as it is. Raises
    `ModelError`.
    """
    if not model.startswith("toy:"):
        return model
    try:
        return str(asset_path(model.removeprefix("toy:")))
    except (OSError, ValueError):  # also a name that no file system takes
        raise ModelError(
            f"model {_shown(model)}: expected one of {', '.join(asset_names()[:2])} after toy:"
        ) from None


def base_name(cfg: ModelConfig) -> str:
    """What an adapter calls the model that it goes on: its Hub id, or an absolute path."""
    model = resolve_path(cfg.model)
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def model_directory(cfg: ModelConfig, *, weights: bool = True) -> Path:
    """Where the model lies: the path itself, or a snapshot of the Hub repository, downloaded if need be, without
    its weights if these are not wanted.

    Raises `ModelError` naming the setting, what was looked for, and the remedy.
    """
    label = setting(cfg, "model")
    directory = _directory(resolve_path(cfg.model), cfg.revision, cfg.trust_remote_code, label, weights)
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            remedy = (
                f"this is a PEFT adapter: set {setting(cfg, 'adapter')} to it and "
                f"{setting(cfg, 'model')} to its base model"
            )
        else:
            remedy = "expected a model saved by save_pretrained()"
        raise ModelError(f"{setting(cfg, 'model')} = {cfg.model!r}: no config.json in {directory}; {remedy}")
    return directory


def is_here(cfg: ModelConfig) -> bool:
    """Whether the model, its weights included, can be read without a download."""
    try:
        directory = Path(resolve_path(cfg.model)).expanduser()
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            files, revision = _HUB_FILES, cfg.revision
            found = snapshot_download(cfg.model, revision=revision, allow_patterns=files, local_files_only=True)
            directory = Path(found)
        return bool(weight_files(directory))
    except (ModelError, OSError, ValueError):  # not in the Hub's cache, or no Hub id at all
        return False


def adapter_directory(cfg: ModelConfig) -> Path | None:
    """The directory of the model's PEFT adapter, None if it has none. Raises `ModelError`."""
    if cfg.adapter is None:
        return None
    directory = _directory(resolve_path(cfg.adapter), None, False, setting(cfg, "adapter"), True)
    if not (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{setting(cfg, 'adapter')} = {cfg.adapter!r}: no adapter_config.json in {directory}; "
            "expected a PEFT adapter, such as RUN/adapter"
        )
    return directory


def setting(cfg: ModelConfig, field: str) -> str:
    """The recipe's name of a model's setting, for messages: `student.model`, `teacher.model`,
    `teacher.NAME.model`.
    """
    if not isinstance(cfg, TeacherConfig):
        return f"student.{field}"
    return f"teacher.{field}" if cfg.name == "teacher" else f"teacher.{cfg.name}.{field}"


@functools.cache
def _directory(model: str, revision: str | None, with_code: bool, label: str, weights: bool) -> Path:
    if len(model) > _LONGEST_NAME or "\0" in model or "://" in model:
        found = "this is a URL" if "://" in model else "this is no path"
        raise ModelNotFoundError(f"{label} = {_shown(model)}: {found}; give a model's directory or a Hub id")
    path = Path(model).expanduser()
    if _is_directory(path):
        check_made(path)
        return path
    if path.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        found = "this is a file" if path.exists() else "there is no such directory"
        raise ModelNotFoundError(f"{label} = {model!r}: {found}; give a model's directory or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        files = [*_HUB_FILES, "*.py"] if with_code else _HUB_FILES
        unwanted = _HUB_DUPLICATES if weights else [*_HUB_DUPLICATES, "*.safetensors"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=files, ignore_patterns=unwanted))
    except Exception as error:  # network, authorisation, disk: the Hub client has no common root for them
        at = f" at revision {revision!r}" if revision else ""
        raise ModelNotFoundError(
            f"{label} = {model!r}: neither a directory here nor a model of the Hub that can be had now{at} "
            f"({_one_line(error)}); check the name, the network and `hf auth login`, or give a local path"
        ) from error


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a part of it is longer than the file system takes
        return False


def _shown(name: str) -> str:
    return repr(name) if len(name) <= _SHOWN else f"{name[:_SHOWN]!r}... ({len(name):,} letters)"


# -- who -----------------------------------------------------------------------------------------------------


def model_facts(cfg: ModelConfig) -> ModelFacts:
    """Read the model's configuration. Raises `ModelError`, also for one that would be quantised twice."""
    config = _load_config(cfg)
    with _loading(cfg, "its config.json cannot be used"):
        text = config.get_text_config()
        size, context = int(text.vocab_size), getattr(text, "max_position_embeddings", None)
        if not isinstance(config.dtype, torch.dtype | None):
            raise ValueError(f"dtype: expected one of torch's, found {config.dtype!r}")
    checkpoint = getattr(config, "quantization_config", None)
    if checkpoint is not None and not isinstance(checkpoint, dict):
        checkpoint = checkpoint.to_dict()
    quantisation = str(checkpoint.get("quant_method", "unknown")) if checkpoint else cfg.quantisation
    if checkpoint and cfg.quantisation is not None:
        raise ModelError(
            f'{setting(cfg, "quantisation")} = "{cfg.quantisation}": {cfg.model} is quantised already '
            f"({quantisation}); leave the setting out, or take the model as it was before"
        )
    dtype = _DTYPES.get(cfg.dtype) or config.dtype or torch.float32
    return ModelFacts(
        vocab_size=size,
        context=context,
        dtype=str(dtype).removeprefix("torch."),
        quantisation=quantisation,
    )


def architectures(cfg: ModelConfig) -> list[str]:
    """The classes that a model's configuration names. Raises `ModelError`."""
    found = read_config(model_directory(cfg, weights=False))
    return found.architectures or [found.model_type or "its architecture"]


def model_identity(cfg: ModelConfig) -> cs.ModelIdentity:
    """The model by digest; see `pipeline.models.identity` for what it covers and costs. Raises `ModelError`."""
    directory, adapter = model_directory(cfg), adapter_directory(cfg)
    return cs.ModelIdentity(
        name=cfg.model,
        revision=hub_commit(directory),
        digest=model_digest(directory),
        adapter_digest=adapter_digest(adapter) if adapter else None,
    )


def served_identity(cfg: TeacherConfig) -> cs.ModelIdentity:
    """Who a served teacher is, as far as can be known here: its digest is of its configuration and its name on the
    server, and begins with "served:". Reads no weights, whether they are here or not. Raises `ModelError`.
    """
    directory, adapter = model_directory(cfg, weights=False), adapter_directory(cfg)
    return cs.ModelIdentity(
        name=cfg.model,
        revision=hub_commit(directory),
        digest=f"served:{served_digest(directory, cfg.served_name or cfg.model)}",
        adapter_digest=adapter_digest(adapter) if adapter else None,
    )


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, name: str) -> cs.TokenizerIdentity:
    """The tokenizer by digest; `vocab_size` is its highest id plus one."""
    return cs.TokenizerIdentity(name, tokenizer_digest(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def made_student(student: StudentConfig, directory: Path) -> StudentConfig | None:
    """The student that the run in `directory` has made of this one, which is this one where training gained nothing;
    None while the run has not ended, or where what it made has been removed.

    Raises `DamagedRunError` where it is not what the run ended with.
    """
    record = read_record(directory)
    if record is None or record.result is None:
        return None
    if record.result.step == 0:
        return student
    for name in MADE:
        if (directory / name).is_dir():
            check(directory, name, record=record)
            made = str(directory / name)
            changed = {"adapter": made} if name == "adapter" else {"model": made, "revision": None, "adapter": None}
            return student.model_copy(update=changed)
    return None


def free_memory() -> None:
    """Give back what models had that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stop_token_ids(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase, rollouts: RolloutsConfig) -> tuple[int, ...]:
    """Ids that end a response: `rollouts.stop_token_ids`, or every EOS id that model and tokenizer name.

    Raises `ModelError` where nothing names one: responses would never end.
    """
    if rollouts.stop_token_ids is not None:
        return tuple(sorted(set(rollouts.stop_token_ids)))
    directory = model_directory(cfg, weights=False)
    size = model_facts(cfg).vocab_size
    named_by = {
        "its tokenizer": tokenizer.eos_token_id,
        "its config.json": _load_config(cfg).get_text_config().eos_token_id,
        "its generation_config.json": read_generation_config(directory).eos_token_id,
    }
    ids: set[int] = set()
    for file, value in named_by.items():
        found = set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
        if wrong := sorted(token for token in found if not 0 <= token < size):
            raise ModelError(
                f"{setting(cfg, 'model')} = {cfg.model!r}: {file} names {wrong[0]} as an EOS token, expected an id "
                f"below {size}; correct it, or set rollouts.stop_token_ids"
            )
        ids |= found
    if not ids:
        raise ModelError(
            f"{setting(cfg, 'model')} = {cfg.model!r}: neither the model nor its tokenizer names an EOS "
            "token; set rollouts.stop_token_ids"
        )
    return tuple(sorted(ids))


# -- loading -------------------------------------------------------------------------------------------------


def pick_device(cfg: ModelConfig) -> torch.device:
    """The device for a model: `auto` is the current CUDA device where there is one. Raises `ModelError`."""
    if cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError(f'{setting(cfg, "device")} = "cuda": torch sees no CUDA device; use "cpu" or "auto"')
    return torch.device("cuda", torch.cuda.current_device())


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `ModelError`."""
    directory = model_directory(cfg, weights=False)
    check_tokenizer_files(directory)
    remedy = "save it beside the model with tokenizer.save_pretrained()"
    with _loading(cfg, "its tokenizer cannot be loaded", remedy):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=cfg.trust_remote_code, local_files_only=True
        )
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
            raise ValueError("it has no vocabulary")  # what transformers makes of a model without tokenizer files
        if min(tokenizer.get_vocab().values()) < 0:
            raise ValueError("it has ids below 0")
    return tokenizer


def load_model(
    cfg: ModelConfig, *, attention: Attention = "redpen_packed", trainable: bool = False
) -> PreTrainedModel:
    """The causal language model on its device, in eval mode, its adapter (if any) applied but not merged.

    With `quantisation = "nf4"` its linear layers, the head aside, are in 4 bits with doubly quantised block constants
    (Dettmers et al., "QLoRA", arXiv 2305.14314); they compute in `dtype`, which all other weights have.

    Args:
        attention: "redpen_packed" for packed rollouts (`pipeline.forward.packing`), "sdpa" for generation.
        trainable: let the adapter require gradients; otherwise nothing does.

    Raises:
        ConfigError: to be quantised, and bitsandbytes is not installed.
        ModelError: not found, not a causal language model, weights missing or damaged.
    """
    started = time.perf_counter()
    if attention == "redpen_packed":
        from pipeline.forward.packing import register_packed_attention

        register_packed_attention()
    directory, device, facts = model_directory(cfg), pick_device(cfg), model_facts(cfg)
    check_model_files(directory)
    dtype = getattr(torch, facts.dtype)
    n_bytes = sum(os.path.getsize(file) for file in weight_files(directory))
    with _loading(cfg):
        with _quiet(progress=n_bytes > _QUIET_BYTES and console.is_terminal):
            model, loaded = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                quantization_config=_nf4(cfg, dtype) if cfg.quantisation == "nf4" else None,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=cfg.trust_remote_code,
                local_files_only=True,
                device_map={"": device} if device.type == "cuda" else None,
                output_loading_info=True,
            )
        for module in model.modules():
            # On some CPUs bitsandbytes' Linear4bit would, once in eval mode, repack its weight for a kernel that
            # computes in bf16 whatever the dtype, and has no gradient.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        # transformers would go on without some tensors, and with random numbers in the place of others
        check_places(cfg, loaded["missing_keys"], loaded["unexpected_keys"], loaded["mismatched_keys"])
        if cfg.adapter is not None:
            model = with_adapter(model, cfg, trainable=trainable)
    model.eval()
    if not trainable:
        model.requires_grad_(False)
    set_name(model, f"{setting(cfg, 'model')} = {cfg.model!r}")
    adapter = f" with adapter {cfg.adapter}" if cfg.adapter else ""
    quantised = f"{cfg.quantisation} and " if cfg.quantisation else ""
    say(
        f"{setting(cfg, 'model').rpartition('.')[0]}: {cfg.model}{adapter}, {_count(model.num_parameters())} "
        f"parameters in {quantised}{facts.dtype} on {device.type}, loaded in {time.perf_counter() - started:.1f} s"
    )
    return model


def save_model(
    model: PreTrainedModel, directory: Path, source: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write weights and configuration as transformers and vLLM read them; all else that belongs to a model is copied
    from `source`, the model's origin, as it is there.

    Args:
        state: the weights, where they are not to be taken from the model itself.
    """
    with _quiet(progress=False):
        settings, model.generation_config = model.generation_config, GenerationConfig()  # valid, or it is not saved
        try:
            model.save_pretrained(directory, state_dict=None if state is None else dict(state))
        finally:
            model.generation_config = settings
    (directory / "generation_config.json").unlink(missing_ok=True)
    for file in sorted(source.iterdir()):
        belongs = any(file.match(pattern) for pattern in _COMPANIONS) and not file.name.endswith(".index.json")
        if belongs and file.is_file() and not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)


def load_skeleton(cfg: ModelConfig, device: torch.device | None = None) -> PreTrainedModel:
    """What `load_model` would load, for packed rollouts, in eval mode and without its weights and its adapter.

    Weights are on torch's meta device: shapes and types only. Buffers that no checkpoint holds, such as rotary
    frequencies, are on `device`, by default the model's.

    Raises:
        ModelError: not found, not a causal language model.
    """
    from pipeline.forward.packing import register_packed_attention

    register_packed_attention()
    config, device, facts = _load_config(cfg), device or pick_device(cfg), model_facts(cfg)
    with _loading(cfg), _quiet(progress=False):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, facts.dtype),
                attn_implementation="redpen_packed",
                trust_remote_code=cfg.trust_remote_code,
            )
        for name, buffer in model.named_non_persistent_buffers():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, torch.empty_like(buffer, device=device))
        model.initialize_weights()  # which on the meta device does nothing
    set_name(model, f"{setting(cfg, 'model')} = {cfg.model!r}")
    return model.eval().requires_grad_(False)


def _nf4(cfg: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'{setting(cfg, "quantisation")} = "nf4": needs bitsandbytes, which cannot be imported '
            f"({_one_line(error)}); install redpen[quant], or leave the setting out"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


@contextlib.contextmanager
def _loading(
    cfg: ModelConfig, failed: str = "cannot be loaded as a causal language model", remedy: str = ""
) -> Iterator[None]:
    """Whatever libraries raise for files that they cannot use becomes a `ModelError`."""
    try:
        yield
    except (torch.OutOfMemoryError, RedpenError):
        raise
    except BaseException as error:
        # What tokenizers' Rust code raises where it gives up is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{setting(cfg, 'model')} = {cfg.model!r}: {failed} ({_one_line(error)})" + (remedy and f"; {remedy}")
        ) from error


def _load_config(cfg: ModelConfig) -> transformers.PretrainedConfig:
    directory = model_directory(cfg, weights=False)
    read_config(directory)
    with _loading(cfg, "its config.json cannot be used"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=cfg.trust_remote_code, local_files_only=True)


def check_places(
    cfg: ModelConfig, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Any] = ()
) -> None:
    """Refuse a checkpoint that is not the whole model, or not this one. Raises `ModelError`.

    Args:
        missing: names of weights that no tensor gives; unexpected: tensors that no weight takes; mismatched: those of
            another shape.
    """
    wrong = {
        "are missing from its files": sorted(missing),
        "of its files have no place in the model": without_place(unexpected, read_config(model_directory(cfg))),
        "have another shape than its config.json says": sorted(str(key) for key in mismatched),
    }
    for what, names in wrong.items():
        if names:
            raise ModelError(
                f"{setting(cfg, 'model')} = {cfg.model!r}: {len(names)} weights {what} ({named(names)}), so another "
                "model would run than was saved; compare its config.json (architectures, num_hidden_layers, "
                "attention_bias) with the checkpoint, or download it again"
            )


def with_adapter(model: PreTrainedModel, cfg: ModelConfig, *, trainable: bool = False) -> Any:
    """The model with its adapter, unmerged. Raises `ModelError`."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    directory = adapter_directory(cfg)
    assert directory is not None
    label = f"{setting(cfg, 'adapter')} = {cfg.adapter!r}"
    read_adapter_config(directory)
    if not (directory / "adapter_model.safetensors").is_file():
        raise ModelError(f"{directory}: expected adapter_model.safetensors, found none; only safetensors are read")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
            # Once more, since only this says which tensors found no place.
            loaded = set_peft_model_state_dict(adapted, load_peft_weights(str(directory), device="cpu"))
        except (torch.OutOfMemoryError, RedpenError):
            raise
        except Exception as error:  # whatever peft, safetensors and torch raise
            raise ModelError(
                f"{label}: cannot be loaded as a PEFT adapter of {cfg.model} ({_one_line(error)}); train or copy it "
                "again"
            ) from error
    if unexpected := loaded.unexpected_keys:
        raise ModelError(
            f"{label}: {len(unexpected)} of its tensors have no place in {cfg.model} ({named(unexpected)}); choose "
            "the model that it was trained on"
        )
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ModelError(f"{label}: does not fit {cfg.model} ({_one_line(warning.message)})")
    return adapted


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """transformers' loading report, and perhaps its bar, are off: what matters in them becomes an error."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _count(number: int) -> str:
    for bound, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= bound:
            return f"{number / bound:.2f} {suffix}"
    return str(number)


def _one_line(error: object) -> str:
    """What an exception of a library says first, with its kind where the text alone says little."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines and not isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 200 else text[:197] + "..."
