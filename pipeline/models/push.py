"""Publish what a run trained, or a merged model, on the Hub: `redpen push RUN_OR_MODEL HUB_ID`.

One commit holds the adapter or model, its card, and of a run the recipe, the curve and the evaluation. The files are
checked against the run's record first. The repository is private unless `--public` is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.console import show, suggest
from pipeline.errors import ConfigError, ModelError, RedpenError, shorten
from pipeline.files import read_json, read_text, refuse_link
from pipeline.models.files import read_adapter_config
from pipeline.models.model_card import serve_command
from pipeline.runs.files import (
    EVAL_FIGURES,
    LEDGER,
    METRICS,
    RECIPE,
    TRAINED,
    check,
    fault,
    is_run,
    read_recipe,
    read_record,
)

_CARD = "README.md"
_HERE = "THIS_DIRECTORY"  # in cards, where the model is loaded from


def run(target: str, hub_id: str, *, base: str | None = None, public: bool = False) -> int:
    """Upload in one commit, and print where to; returns exit code 0.

    Args:
        target: a finished run, or the directory of an adapter or model.
        hub_id: "OWNER/NAME"; the repository is made if it does not exist.
        base: the Hub id of the base model, if that was a local directory.

    Raises:
        ConfigError: `hub_id` or `base` is no Hub id. ModelError: `target` holds no model, or names a base that others
            do not have. DamagedRunError: a file is not what the run recorded. RedpenError: the Hub refuses, or cannot
            be reached.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    for name, value in (("HUB_ID", hub_id), ("--base", base)):
        try:
            if value is not None:
                validate_repo_id(value)
        except HFValidationError as error:
            raise ConfigError(f"{name}: expected OWNER/NAME of the Hub, got {value!r} ({shorten(error)})") from error
    directory = Path(target)
    files = _files(directory)
    contents = {name: str(path) for name, path in files.items()} | _of_base(files, hub_id, base)
    upload(hub_id, contents, public=public)
    if (directory / RECIPE).is_file():
        recipe = read_recipe(directory)
        if base is not None:
            recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": base})})
        if (command := serve_command(recipe, hub_id)) is not None:
            suggest(f"`{command}`")
    return 0


def upload(
    repository: str,
    contents: Mapping[str, str | bytes],
    *,
    public: bool,
    repo_type: str = "model",
    replacing: str | None = None,
) -> str:
    """Upload files in one commit, print where to, and return the first digits of the commit's hash.

    Args:
        repository: "OWNER/NAME"; made if it does not exist, as private unless `public`.
        contents: paths of local files, or bytes, by their path in the repository.
        replacing: a folder of the repository: what else is in it is deleted.

    Raises `RedpenError` if the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, repo_type=repo_type, private=not public, exist_ok=True)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
        there = [] if replacing is None else api.list_repo_files(repository, repo_type=repo_type)
        unwanted = [name for name in there if name.startswith(f"{replacing}/") and name not in contents]
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [*added]
        operations += [CommitOperationDelete(name) for name in unwanted]
        commit = api.create_commit(repository, operations, commit_message="Upload by redpen", repo_type=repo_type)
    except Exception as error:  # network, authorisation: the Hub client's errors have no common root
        name = repository if repo_type == "model" else f"hf://datasets/{repository}"
        raise RedpenError(
            f"HUB_ID = {name!r}: {api.endpoint} did not take it ({shorten(error)}); check the name, the "
            "network, and that the token in HF_TOKEN or of `hf auth login` may write there"
        ) from error
    what = "public" if public else "private, if it is new"
    deleted = f", {len(unwanted):,} of an earlier one deleted" if unwanted else ""
    show(f"{len(added):,} files in one commit{deleted}: {url} ({what}), revision {commit.oid[:8]}")
    return commit.oid[:8]


def _files(directory: Path) -> dict[str, Path]:
    """What is uploaded, by its path in the repository."""
    found: dict[str, Path] = {}
    if is_run(directory):
        record = read_record(directory)
        if record is None or record.result is None:
            raise RedpenError(f"run {directory}: has not ended; repeat the command that started it")
        model = next((directory / name for name in TRAINED if (directory / name).is_dir()), None)
        if model is None:
            raise RedpenError(
                f"run {directory}: {record.result.sentence}, so there is no adapter or model to publish"
            )
        check(directory, model.name, RECIPE, METRICS, LEDGER, record=record)
        found = {name: directory / name for name in (RECIPE, METRICS, LEDGER) if (directory / name).is_file()}
        if (directory / EVAL_FIGURES).is_file() and fault(directory, EVAL_FIGURES) is None:
            found[EVAL_FIGURES] = directory / EVAL_FIGURES
    else:
        model = directory
    if not any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        if (directory / "zarr.json").is_file():
            raise ModelError(
                f"{directory}: expected a run or a model for this HUB_ID, found a cache; publish it as "
                "hf://datasets/OWNER/NAME"
            )
        raise ModelError(
            f"{directory}: expected a run, or a directory with config.json or adapter_config.json, found neither"
        )
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model).as_posix()
        if not path.is_dir() and not any(part.startswith(".") for part in name.split("/")):
            refuse_link(path)
            found[name] = path
    return found


def _of_base(files: dict[str, Path], hub_id: str, base: str | None) -> dict[str, bytes]:
    """The card and the adapter's configuration, as they are published: loaded from the Hub, on a base from there."""
    found: dict[str, bytes] = {}
    named = None
    if "adapter_config.json" in files:
        named = read_adapter_config(files["adapter_config.json"].parent).base_model_name_or_path
        settings: dict[str, Any] = read_json(files["adapter_config.json"], error=ModelError)
        found["adapter_config.json"] = json.dumps(settings | {"base_model_name_or_path": base or named}).encode()
    card = read_text(files[_CARD]) if _CARD in files else ""
    if named is None and (line := re.search(r'^base_model: "?([^"\n]+)"?$', card, re.MULTILINE)):
        named = line[1]
    if named is not None and base is None and (Path(named).is_absolute() or Path(named).exists() or ":" in named):
        raise ModelError(
            f"{named}: the base model is a local directory, which others do not have; give --base the Hub id that it "
            "has there"
        )
    if named is not None and base is not None:
        card = card.replace(named, base)
    if card:
        found[_CARD] = card.replace(_HERE, hub_id).encode()
    return found
