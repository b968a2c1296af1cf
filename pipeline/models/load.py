"""Causal language models: loaded with weights or without, and saved. Weights are safetensors only."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from pipeline.config import ModelConfig
from pipeline.console import console, say
from pipeline.disk import memory_limits
from pipeline.environment import install_hint
from pipeline.errors import ConfigError, ModelError, RedpenError, one_line, shorten
from pipeline.files import read_text
from pipeline.forward.finite import set_name
from pipeline.forward.head import unwrapped
from pipeline.forward.rows import native_attention, sampling_attention, set_can_pack
from pipeline.models._transformers_compat import initialize_on_meta, quiet, save_weights
from pipeline.models.files import (
    AdapterConfigFile,
    check_model_files,
    misplaced_tensors,
    read_adapter_config,
    read_config,
    shortened,
)
from pipeline.models.identity import weight_files
from pipeline.models.paths import COMPANIONS
from pipeline.models.quantised import lazy_state
from pipeline.models.resolve import ResolvedModel, resolve, setting_name

if TYPE_CHECKING:
    from pipeline.models.architecture import LayoutChoice

Attention = Literal["scoring", "sampling"]

# A progress bar is shown for larger models.
_QUIET_BYTES = 2**30
# Weights to a byte of a checkpoint; those of one bit are eight.
_MOST_A_BYTE = 16
# For one regular expression of an adapter and all modules of a model.
_PATTERN_SECONDS = 5.0
# That each rank of an adapter has at least.
_BYTES_A_RANK = 16


def free_memory() -> None:
    """Return the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that could be had on a device now; on the CPU, file caches that would give way included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = read_text(Path("/proc/meminfo")).splitlines()
    available = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return min([available, *memory_limits()])


def pick_device(cfg: ModelConfig) -> torch.device:
    """The device for a model: `auto` is the current CUDA device if there is one. Raises `ModelError`."""
    if cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError(f'{setting_name(cfg, "device")} = "cuda": torch sees no CUDA device; use "cpu" or "auto"')
    return torch.device("cuda", torch.cuda.current_device())


def load_model(
    model: ModelConfig | ResolvedModel, *, attention: Attention = "scoring", trainable: bool = False
) -> PreTrainedModel:
    """The causal language model on its device, in eval mode, with its adapter (if any) applied but not merged.

    A quantised checkpoint is dequantised (`pipeline.quantised`), or loaded by transformers' own quantiser if its
    format is not known here. With `quantisation = "nf4"` linear layers, except the head, are in 4 bits with doubly
    quantised block constants (Dettmers et al., "QLoRA", arXiv 2305.14314); they compute in `dtype`, which all other
    weights have.

    Args:
        attention: "scoring": redpen's packed attention if the architecture can be packed
            (`pipeline.models.architecture`), else transformers' own. "sampling": transformers' own.
        trainable: let the adapter require gradients; otherwise nothing does.

    Raises:
        ConfigError: it is to be quantised, and bitsandbytes is not installed.
        ModelError: not found, not a causal language model, or weights are missing or damaged.
    """
    started = time.perf_counter()
    source = resolve(model)
    layout = _layout(source)
    packed = attention == "scoring" and layout.packed
    cfg, directory, device = source.settings, source.directory, pick_device(source.settings)
    check_model_files(directory)
    dtype = getattr(torch, source.dtype)
    n_bytes = sum(os.path.getsize(file) for file in weight_files(directory))
    if layout.n_parameters > _MOST_A_BYTE * n_bytes:  # before memory for them is allocated
        raise ModelError(
            f"{source.setting('model')}: its config.json describes {layout.n_parameters:,} weights, its files have "
            f"{n_bytes:,} bytes; compare its config.json (vocab_size, hidden_size, num_hidden_layers) with the "
            "checkpoint, or download it again"
        )
    with source.loading_errors(), ExitStack() as stack:
        load: Any = _auto_class(source.config).from_pretrained
        where: dict[str, Any] = {"pretrained_model_name_or_path": directory, "local_files_only": True}
        where["trust_remote_code"] = cfg.trust_remote_code
        if source.formats:
            load = type(load_skeleton(source, torch.device("meta"))).from_pretrained  # an auto class wants a path
            where = {"pretrained_model_name_or_path": None, "config": source.dense_config}
            where["state_dict"] = lazy_state(source, device, stack)
        with quiet(progress=n_bytes > _QUIET_BYTES and console.is_terminal):
            loaded, report = load(
                **where,
                dtype=dtype,
                quantization_config=_nf4(cfg, dtype) if cfg.quantisation == "nf4" else None,
                attn_implementation="redpen_packed" if packed else None,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report, by name
                device_map={"": device} if device.type == "cuda" else None,
                output_loading_info=True,
            )
        loaded.name_or_path = loaded.config.name_or_path = str(directory)
        for module in loaded.modules():
            # On some CPUs bitsandbytes' Linear4bit would, once in eval mode, repack its weight for a kernel that
            # computes in bf16 whatever the dtype, and has no gradient.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        # transformers would leave out some tensors, and fill others with random numbers
        check_weight_names(source, report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
        if cfg.adapter is not None:
            loaded = with_adapter(loaded, source, trainable=trainable)
    set_can_pack(loaded, layout.packed)
    if not packed:
        choose = native_attention if attention == "scoring" else sampling_attention
        unwrapped(loaded).set_attn_implementation(choose(loaded))
    loaded.eval()
    if not trainable:
        loaded.requires_grad_(False)
    set_name(loaded, source.setting("model"))
    adapter = f" with adapter {cfg.adapter}" if cfg.adapter else ""
    quantised = f"{cfg.quantisation} and " if cfg.quantisation else ""
    if source.formats:
        quantised = f"{source.quantisation}, dequantised to "
    say(
        f"{setting_name(cfg, 'model').rpartition('.')[0]}: {cfg.model}{adapter}, {_count(loaded.num_parameters())} "
        f"parameters in {quantised}{source.dtype} on {device.type}, loaded in {time.perf_counter() - started:.1f} s"
    )
    return loaded


def with_adapter(model: PreTrainedModel, source: ModelConfig | ResolvedModel, *, trainable: bool = False) -> Any:
    """The model with the adapter of its settings, not merged. Raises `ModelError`."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    source = resolve(source)
    directory, base, label = source.adapter_directory, source.settings.model, source.setting("adapter")
    assert directory is not None
    settings, weights_file = read_adapter_config(directory), directory / "adapter_model.safetensors"
    if not weights_file.is_file():
        raise ModelError(f"{directory}: expected adapter_model.safetensors, found none; only safetensors are read")
    rank = settings.largest_rank
    if rank * _BYTES_A_RANK > (n_bytes := weights_file.stat().st_size):  # before memory for it is allocated
        raise ModelError(f"{label}: its adapter_config.json has rank {rank:,}, its weights {n_bytes:,} bytes")
    _check_patterns(settings, model, label)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
            # Loaded once more, since only this reports tensors that belong nowhere in the model.
            weights = load_peft_weights(str(directory), device="cpu")
            loaded = set_peft_model_state_dict(adapted, weights)
        except (torch.OutOfMemoryError, RedpenError):
            raise
        except Exception as error:  # whatever peft, safetensors and torch raise
            raise ModelError(
                f"{label}: cannot be loaded as a PEFT adapter of {base} ({one_line(error)}); train or copy it again"
            ) from error
    names = Counter(_in_text_model(name) for name in weights)  # of a text model in a wrapper, each is stored twice
    if unexpected := [name for name in loaded.unexpected_keys if names[_in_text_model(name)] < 2]:
        raise ModelError(
            f"{label}: {len(unexpected)} of its tensors have no place in {base} ({shortened(unexpected)}); choose "
            "the model that it was trained on"
        )
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ModelError(f"{label}: does not fit {base} ({one_line(warning.message)})")
    return adapted


def _check_patterns(settings: AdapterConfigFile, model: PreTrainedModel, label: str) -> None:
    """Refuse regular expressions that take so long that peft would seem to hang."""
    if threading.current_thread() is not threading.main_thread():  # there it cannot be interrupted
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for pattern in settings.patterns:
            signal.setitimer(signal.ITIMER_REAL, _PATTERN_SECONDS)
            with contextlib.suppress(re.error):  # peft says what is wrong
                for name, _ in model.named_modules():
                    re.fullmatch(pattern, name)
    except TimeoutError:
        raise ModelError(
            f"{label}: the regular expression {shorten(pattern, 80)!r} of its adapter_config.json takes longer than "
            f"{_PATTERN_SECONDS:g} s to find modules; list their names instead, or train the adapter again"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _in_text_model(name: str) -> str:
    """A weight's name without the prefix of a vision wrapper; without the adapter's name, which peft adds."""
    return name.replace(".language_model.", ".").replace(".default.", ".")


def _auto_class(config: PretrainedConfig) -> Any:
    """Of transformers, which class loads a model: one that exists in a vision wrapper alone (Mistral 3, Qwen3-VL) is
    loaded with it, and used as text.
    """
    in_wrapper = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None)
    return AutoModelForImageTextToText if in_wrapper and not alone else AutoModelForCausalLM


def _layout(source: ResolvedModel) -> LayoutChoice:
    from pipeline.forward.attention import register_packed_attention
    from pipeline.models.architecture import choose_layout

    register_packed_attention()
    return choose_layout(source)


def load_skeleton(
    model: ModelConfig | ResolvedModel, device: torch.device | None = None, attention: str | None = "scoring"
) -> PreTrainedModel:
    """The model that `load_model` would load for scoring, in eval mode, without weights and adapter.

    Weights are on torch's meta device: shapes and types only. Buffers that no checkpoint holds, such as rotary
    frequencies, are on `device`, by default the model's.

    Raises:
        ModelError: not found, or not a causal language model.
    """
    from pipeline.forward.attention import register_packed_attention

    register_packed_attention()
    source = resolve(model)
    if attention == "scoring":
        attention = "redpen_packed" if _layout(source).packed else None
    config, device = source.dense_config, device or pick_device(source.settings)
    with source.loading_errors(), quiet(progress=False):
        with torch.device("meta"):
            skeleton = _auto_class(config).from_config(
                config,
                dtype=getattr(torch, source.dtype),
                attn_implementation=attention,
                trust_remote_code=source.settings.trust_remote_code,
            )
        initialize_on_meta(skeleton, device)
        if attention is None:
            skeleton.set_attn_implementation(native_attention(skeleton))
    set_name(skeleton, source.setting("model"))
    return skeleton.eval().requires_grad_(False)


def save_model(
    model: PreTrainedModel, directory: Path, source: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write weights and configuration as transformers and vLLM read them; a model's other files are copied unchanged
    from `source`, its origin.

    Args:
        state: the weights, if they are not to be taken from the model itself.
    """
    with quiet(progress=False):
        save_weights(model, directory, None if state is None else dict(state))
    for file in sorted(source.iterdir()):
        belongs = any(file.match(pattern) for pattern in COMPANIONS) and not file.name.endswith(".index.json")
        if belongs and file.is_file() and not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)


def check_weight_names(
    model: ModelConfig | ResolvedModel,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[Any] = (),
) -> None:
    """Refuse a checkpoint that does not hold exactly this model's weights. Raises `ModelError`.

    Args:
        missing: weights that no tensor of the checkpoint gives.
        unexpected: tensors that no weight takes.
        mismatched: tensors of another shape than their weight.
    """
    source = resolve(model)
    wrong = {
        "are missing from its files": sorted(missing),
        "of its files have no place in the model": misplaced_tensors(unexpected, read_config(source.directory)),
        "have another shape than its config.json says": sorted(map(_mismatch, mismatched)),
    }
    for what, names in wrong.items():
        if names:
            raise ModelError(
                f"{source.setting('model')}: {len(names)} weights {what} ({shortened(names)}), so another model "
                "would run than was saved; compare its config.json (architectures, num_hidden_layers, "
                "attention_bias) with the checkpoint, or download it again"
            )


def _mismatch(found: Any) -> str:
    """A tensor of transformers' report as "name [2, 3], not [4, 3]"."""
    if isinstance(found, tuple) and len(found) == 3:
        return f"{found[0]} {list(found[1])}, not {list(found[2])}"
    return str(found)


def _nf4(cfg: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'{setting_name(cfg, "quantisation")} = "nf4": needs bitsandbytes, which cannot be imported '
            f"({one_line(error)}); {install_hint('quant')}, or leave the setting out"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _count(number: int) -> str:
    for bound, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= bound:
            return f"{number / bound:.2f} {suffix}"
    return str(number)
