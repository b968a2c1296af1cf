"""Where a model's files are: a local directory, an embedded toy model, or a snapshot of a Hub repository."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from pipeline.config import ModelConfig
from pipeline.errors import ModelError, ModelNotFoundError, one_line
from pipeline.models.identity import weight_files
from pipeline.runs.files import check_trained
from pipeline.toy import asset_names, asset_path

#: Files beside a model's weights that belong to it: tokenizer, chat template, generation settings.
COMPANIONS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# What a model needs from its Hub repository, without the same weights in other layouts.
_HUB_FILES = [*COMPANIONS, "*.safetensors"]
_HUB_DUPLICATES = ["original/*", "onnx/*", "metal/*", "consolidated*"]
# How many characters of a name a message repeats. A Hub id has fewer.
_SHOWN = 120


def resolve_path(model: str) -> str:
    """`toy:NAME` as the directory of the embedded model; any other path or Hub id unchanged. Raises `ModelError`."""
    if not model.startswith("toy:"):
        return model
    try:
        return str(asset_path(model.removeprefix("toy:")))
    except (OSError, ValueError):  # also a name that the file system refuses
        raise ModelError(
            f"model {_shortened(model)}: expected one of {', '.join(asset_names()[:3])} after toy:"
        ) from None


def base_name(cfg: ModelConfig) -> str:
    """The name by which an adapter refers to its base model: a Hub id, or an absolute path."""
    model = resolve_path(cfg.model)
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def is_available(cfg: ModelConfig) -> bool:
    """Whether the model with its weights can be loaded without a download."""
    try:
        directory = Path(resolve_path(cfg.model)).expanduser()
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            directory = Path(
                snapshot_download(cfg.model, revision=cfg.revision, allow_patterns=_HUB_FILES, local_files_only=True)
            )
        return bool(weight_files(directory))
    except (ModelError, OSError, ValueError):  # not in the Hub's cache, or not a Hub id
        return False


@functools.cache  # asks the Hub, and hashes what a run of redpen made
def find_directory(
    model: str, setting: str, *, revision: str | None = None, with_code: bool = False, weights: bool = True
) -> Path:
    """The local directory of a model or adapter, downloaded from the Hub if need be.

    Args:
        model: a path or Hub id, as `resolve_path` returns it.
        setting: its name in the recipe, for messages.
        with_code: download the repository's Python code too.
        weights: False leaves them out of a download.

    Raises:
        ModelNotFoundError: names the setting, what was found, and what to do.
        DamagedRunError: it was made by a run, and is not what the run ended with.
    """
    if "\0" in model or "://" in model:
        found = "this is a URL" if "://" in model else "this is not a path"
        raise ModelNotFoundError(f"{setting} = {_shortened(model)}: {found}; give a model's directory or a Hub id")
    path = Path(model).expanduser()
    if os.path.isdir(path):  # False, where Path's raise, for a name that the file system refuses
        check_trained(path)
        return path
    exists = os.path.exists(path)
    if exists or model.startswith(("/", ".", "~")) or model.count("/") > 1 or len(model) > _SHOWN:
        found = "this is a file" if exists else "there is no such directory"
        raise ModelNotFoundError(f"{setting} = {_shortened(model)}: {found}; give a model's directory or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        files = [*_HUB_FILES, "*.py"] if with_code else _HUB_FILES
        unwanted = _HUB_DUPLICATES if weights else [*_HUB_DUPLICATES, "*.safetensors"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=files, ignore_patterns=unwanted))
    except Exception as error:  # network, authorisation, disk: the Hub client's errors have no common root
        at = f" at revision {revision!r}" if revision else ""
        raise ModelNotFoundError(
            f"{setting} = {_shortened(model)}: not a local directory, and could not be fetched from the Hub{at} "
            f"({one_line(error)}); check the name, the network and `hf auth login`, or give a local path"
        ) from error


def _shortened(name: str) -> str:
    return repr(name) if len(name) <= _SHOWN else f"{name[:_SHOWN]!r}... ({len(name):,} characters)"
