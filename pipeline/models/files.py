"""The JSON files of a model, checked before transformers, tokenizers or peft read them.

Each kind of file has one pydantic model with the fields that redpen and the libraries rely on; other fields are kept
unchanged. Files of a Hub snapshot are links to blobs, so links are followed.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.errors import ModelError
from pipeline.files import parse_json, parse_model, read_bytes

#: Bytes of a JSON file; the largest tokenizer.json in use has about 35 MB.
_AT_MOST = 256 * 2**20
#: Ids of a vocabulary; the largest in use has 262,144.
_MOST_IDS = 2**24
# Endings of files beside the weights, which transformers, tokenizers and peft read whole.
_READ_WHOLE = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_T = TypeVar("_T", bound=BaseModel)


def _weights_name(name: str) -> str:
    if not re.fullmatch(r"[^/\\\x00]+\.safetensors", name):
        raise ValueError("expected the name of a safetensors file in the same directory")
    return name


Size = Annotated[int, Field(ge=1, le=2**24)]
# Layers; even on the meta device a model of more takes half a minute.
Count = Annotated[int, Field(ge=0, le=512)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# A few architectures give these by layer.
SizeByLayer = Size | list[Size]
CountByLayer = Annotated[int, Field(ge=0, le=100_000)] | list[Annotated[int, Field(ge=0, le=100_000)] | None]


def _is_finite(value: Any) -> bool:
    """Whether every number in a value of JSON is."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


class _File(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


class _Config(_File):
    """The settings that decoders have in common. None leaves a setting to the default of its class."""

    model_type: str | None = None
    vocab_size: Size | None = None
    hidden_size: SizeByLayer | None = None
    intermediate_size: SizeByLayer | None = None
    num_hidden_layers: Annotated[Count, Field(ge=1)] | None = None
    num_layers: Count | None = None  # as other architectures call them
    n_layers: Count | None = None
    n_layer: Count | None = None
    encoder_layers: Count | None = None
    decoder_layers: Count | None = None
    num_attention_heads: CountByLayer | None = None
    num_key_value_heads: CountByLayer | None = None
    head_dim: Size | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=1000)] | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str | None = None
    layer_types: list[str] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _numbers_are_finite(self) -> Self:
        """Also those of settings of one architecture, such as a rotary base: infinity makes another model of it."""
        for name, value in self:
            if name != "time_step_limit" and not _is_finite(value):  # Mamba's has no upper bound
                raise ValueError(f"{name}: expected finite numbers, got {value!r:.80}")
        return self


class ConfigFile(_Config):
    """config.json."""

    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    dtype: str | dict[str, Any] | None = None
    torch_dtype: str | dict[str, Any] | None = None
    transformers_version: str | None = None
    text_config: _Config | None = None
    vision_config: dict[str, Any] | None = None
    audio_config: dict[str, Any] | None = None
    transformers_weights: None = None  # other files than those that are hashed


class GenerationConfigFile(_File):
    """generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: int | list[int] | None = None
    bos_token_id: int | list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    do_sample: bool | None = None


class IndexFile(_File):
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, Annotated[str, AfterValidator(_weights_name)]] = Field(min_length=1)


class AdapterConfigFile(_File):
    """adapter_config.json of PEFT."""

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    lora_alpha: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    @property
    def largest_rank(self) -> int:
        """Of any module; 0 without ranks."""
        return max([self.r or 0, *(self.rank_pattern or {}).values()])

    @property
    def patterns(self) -> list[str]:
        """The regular expressions that peft matches with modules' names."""
        whole = [text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        return whole + [rf"(.*\.)?({key})$" for key in {**(self.rank_pattern or {}), **(self.alpha_pattern or {})}]


class TokenizerConfigFile(_File):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    auto_map: dict[str, Any] | list[Any] | None = None
    chat_template: str | list[dict[str, str]] | dict[str, str] | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    model_max_length: int | float | None = None


class _TokenizerFile(_File):
    """tokenizer.json; the tokenizers library checks its rules."""

    model: dict[str, Any]

    @field_validator("model")
    @classmethod
    def _ids_are_rows(cls, model: dict[str, Any]) -> dict[str, Any]:
        """The tokenizers library makes room for every id up to the highest."""
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            for token, number in vocab.items():
                if type(number) is not int or not 0 <= number < _MOST_IDS:
                    found = f"{number!r:.40} for {token!r:.40}"
                    raise ValueError(f"expected ids from 0 to {_MOST_IDS - 1:,}, found {found}")
        return model


def read_config(directory: Path) -> ConfigFile:
    """A model's config.json. Raises `ModelError`."""
    return _required(directory / "config.json", ConfigFile)


def read_generation_config(directory: Path) -> GenerationConfigFile:
    """A model's generation_config.json, empty if it has none. Raises `ModelError`."""
    return _read(directory / "generation_config.json", GenerationConfigFile) or GenerationConfigFile()


def read_index(directory: Path) -> IndexFile | None:
    """A model's model.safetensors.index.json, if it has one. Raises `ModelError`."""
    return _read(directory / "model.safetensors.index.json", IndexFile)


def read_adapter_config(directory: Path) -> AdapterConfigFile:
    """An adapter's adapter_config.json. Raises `ModelError`."""
    return _required(directory / "adapter_config.json", AdapterConfigFile)


def check_files(directory: Path) -> None:
    """Refuse files that a library would read for ever, or into all of the memory. Raises `ModelError`."""
    for path in sorted([*directory.iterdir(), *directory.glob("additional_chat_templates/*")]):
        if path.suffix not in _READ_WHOLE or not path.exists():
            continue
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path}: expected a regular file, found a directory, a pipe or a device; remove it")
        if found.st_size > _AT_MOST:
            raise ModelError(f"{path}: expected at most {_AT_MOST:,} bytes, found {found.st_size:,}")


def check_model_files(directory: Path) -> None:
    """Refuse settings that transformers fails on or understands differently from redpen. Raises `ModelError`."""
    read_config(directory)
    read_generation_config(directory)
    read_index(directory)
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory}: expected a model or an adapter, found config.json and adapter_config.json, which "
            "transformers would apply silently; move the adapter's files to another directory"
        )


def check_tokenizer_files(directory: Path) -> None:
    """Refuse a tokenizer with damaged files. Raises `ModelError`."""
    read_config(directory)  # names the tokenizer's class for transformers
    _read(directory / "tokenizer_config.json", TokenizerConfigFile)
    _read(directory / "tokenizer.json", _TokenizerFile)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a model's file, unchecked. Raises `ModelError`."""
    try:
        content = read_bytes(path, at_most=_AT_MOST, error=ModelError)
    except FileNotFoundError:
        raise ModelError(f"{path}: cannot be read: there is no such file") from None
    if content.startswith(_BYTE_ORDER_MARK):
        raise ModelError(f"{path}: begins with a byte order mark, which transformers does not read; save it without")
    found = parse_json(content, str(path), error=ModelError)
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _required(path: Path, kind: type[_T]) -> _T:
    return parse_model(read_settings(path), kind, str(path), error=ModelError)


def _read(path: Path, kind: type[_T]) -> _T | None:
    return _required(path, kind) if path.exists() or path.is_symlink() else None


# -- misplaced tensors ------ ---------------------------------------------------------------------------------

# Tensors that a checkpoint may have and a causal language model does not need: heads that predict further tokens,
# rotary frequencies and masks, which are computed, and scales of a quantised key-value cache.
_HARMLESS = re.compile(
    r"(^|\.)mtp(_block|_layers)?\.|(^|\.)rotary_emb\.|\.masked_bias$|\.attn\.bias$|(^|\.)position_ids$|\.[kv]_scale$"
)
# Parts of multimodal wrappers that are not text.
_NOT_TEXT = re.compile(
    r"(^|\.)(visual|vision_\w+|audio_\w+|embed_vision|embed_audio|multi_modal_projector|mm_projector|image_newline)(\.|$)"
)


def misplaced_tensors(unexpected: Iterable[str], config: ConfigFile) -> list[str]:
    """The checkpoint's tensors that have no place in its model, and without which it is a different model."""
    text = config.text_config or config
    n_layers, n_heads = text.num_hidden_layers, text.num_nextn_predict_layers or 0
    wrapper = config.vision_config is not None or config.audio_config is not None

    def harmless(name: str) -> bool:
        if _HARMLESS.search(name) or (wrapper and _NOT_TEXT.search(name)):
            return True
        layer = re.search(r"(^|\.)layers\.(\d{1,6})\.", name)
        # Heads for further tokens are stored after the last layer (DeepSeek-V3, GLM-4.5).
        return layer is not None and n_layers is not None and n_layers <= int(layer[2]) < n_layers + n_heads

    return sorted(name for name in unexpected if not harmless(name))


def shortened(names: Collection[str], shown: int = 3) -> str:
    """The first few of many names, for a message."""
    some = ", ".join(sorted(names)[:shown])
    return f"{some} and {len(names) - shown} more" if len(names) > shown else some
