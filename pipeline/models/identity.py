"""Digests of weights, adapters and tokenizers, the same for a Hub snapshot and a local copy of it.

A model's digest covers the settings of its `config.json` that affect what it computes and the content of the
safetensors files that transformers would load. Files are hashed in threads (about 1 GB/s each); a file of a
Hub snapshot is a link to a blob that the Hub client named by its SHA-256 and checked while downloading, so
its name is used instead of hashing 64 GB.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cache_schema as cs
from pipeline import __version__
from pipeline.errors import ModelError
from pipeline.models.files import read_index, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Engine of rollouts and scores that `redpen import` read from a file.
IMPORTED = "import"
#: Engine of a round of text that nobody sampled: documents and chats of `redpen sft`.
DATA = "data"

# Settings that change with the software that saved a model, not with what it computes. The dtype is recorded
# by itself: it is the one the model was loaded with.
_INCIDENTAL = frozenset({"transformers_version", "torch_dtype", "dtype", "use_cache"})
_INCIDENTAL_ADAPTER = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"}
)


def model_digest(directory: Path) -> str:
    """Digest of the model in `directory`, 32 hexadecimal digits. Raises `ModelError` if it is not one."""
    config = _semantic(read_settings(directory / "config.json"), _INCIDENTAL)
    return _digest({"config": config, "weights": _contents(weight_files(directory))})


def served_digest(directory: Path, served_name: str) -> str:
    """Digest of a model that a server runs: its configuration, and its name there. Raises `ModelError`."""
    config = _semantic(read_settings(directory / "config.json"), _INCIDENTAL)
    return _digest({"config": config, "served_name": served_name})


def adapter_digest(directory: Path) -> str:
    """Digest of the PEFT adapter in `directory`, 32 hexadecimal digits.

    Raises `ModelError` if it is not one.
    """
    config = _semantic(read_settings(directory / "adapter_config.json"), _INCIDENTAL_ADAPTER)
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{directory}: expected adapter_model.safetensors, found none; only safetensors are read")
    # peft writes target_modules as the list of a set, in any order
    config = {key: sorted(value) if _is_names(value) else value for key, value in config.items()}
    return _digest({"config": config, "weights": _contents([weights])})


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the token->id map, added tokens included, and of the special tokens, without the chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest({"tokens": sorted(tokenizer.get_vocab().items()), "special": special})


def created_by() -> str:
    """This software and its version, for people who read a cache's attributes."""
    return f"redpen {__version__}"


def hub_commit(directory: Path) -> str | None:
    """The commit that a directory of the Hub's cache is a snapshot of; None for any other directory."""
    is_snapshot = directory.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", directory.name)
    return directory.name if is_snapshot else None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers reads, sorted by name. Raises `ModelError` if there are none."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    if (index := read_index(directory)) is None:
        raise ModelError(
            f"{directory}: expected model.safetensors or model.safetensors.index.json, found neither; "
            "only safetensors are read, convert other formats with save_pretrained()"
        )
    files = [directory / name for name in sorted(set(index.weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(
                f"{file}: named by model.safetensors.index.json, but not there; download or copy the model again"
            )
    return files


def _semantic(config: dict[str, Any], incidental: frozenset[str]) -> dict[str, Any]:
    return {
        key: _semantic(value, incidental) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in incidental and not key.startswith("_")
    }


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _contents(files: list[Path]) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(max_workers=8) as threads:
        return [(file.name, sha256) for file, sha256 in zip(files, threads.map(_sha256, files), strict=True)]


def _sha256(file: Path) -> str:
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def own_prompt(round_: cs.Round, teacher: str) -> str | None:
    """How a teacher read the prompts, e.g. `system message "Be brief."`; None if it read what the student did."""
    scores = round_.scores(teacher).manifest
    assert isinstance(scores, cs.ScoresManifest)
    return other_prompt(scores, round_.manifest)


def other_prompt(scores: cs.ScoresManifest, sampled: cs.RoundManifest) -> str | None:
    """The same, from the manifests."""
    theirs, ours = scores.template, sampled.template
    if not theirs or theirs == ours:
        return None
    found = []
    if theirs.get("kind") == "none" and ours.get("kind") != "none":
        found.append("plain text, without the chat template")
    elif ours.get("kind") == "none" and theirs.get("kind") == "chat":
        found.append("its chat template")
    elif theirs.get("sha256") != ours.get("sha256"):
        found.append("another chat template")
    if theirs.get("system") != ours.get("system"):
        system = theirs.get("system")
        found.append("no system message" if system is None else f"system message {_quoted(system)}")
    if theirs.get("prompt") is not None:
        found.append(f"in place of every prompt {_quoted(theirs['prompt'])}")
    elif theirs.get("columns"):
        found.append(f"in place of prompts {' and '.join(map(str, theirs['columns']))} of the rows")
    if theirs.get("prefix") is not None:
        found.append(f"before every prompt {_quoted(theirs['prefix'])}")
    if theirs.get("args", {}) != ours.get("args", {}):
        found.append(f"template arguments {json.dumps(theirs.get('args'), ensure_ascii=False)}")
    return ", ".join(found) or None


def _quoted(text: object) -> str:
    return json.dumps(str(text), ensure_ascii=False)
