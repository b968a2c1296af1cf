"""Manifests that an earlier run worked out, so that a finished stage need not load torch and digest weights again.

The manifest of a round, or of a model's scores, is a function of the recipe, the files of models and prompts, the
round that is scored, and the installed software. An entry in the user's cache directory is named by a digest of all
of these, files by device, inode, size and times as in git's index. So an entry is found only if nothing has changed,
and then it is compared with the cache's manifest as one made anew would be; if none is found, or it differs, the
stage works it out again and refuses what it always refuses.

A file that changed less than `RACY_SECONDS` before it was read may change again without a sign, so no entry is
written from it. Nor is one for models with code of their own, data sets of the Hub, or special files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe, TeacherConfig
from pipeline.environment import STARTED
from pipeline.errors import RedpenError
from pipeline.files import read_json, write_atomically
from pipeline.models.paths import find_directory, resolve_path
from pipeline.runs.files import RECIPE, RECORD, TRAINED, digest_of
from pipeline.text.prompts import local_file

#: A file's times have the granularity of its file system, 2 s at worst (FAT).
RACY_SECONDS = 2.0

# Sections that neither sampling nor scoring looks at.
_OF_OTHER_STAGES = {"train", "reward", "select", "distill", "eval", "sft", "continual", "track"}
# What reads the files of models, and how a directory of metadata is named.
_READERS, _METADATA = ("transformers", "tokenizers"), (".dist-info", ".egg-info")
_MOST_FILES, _MOST_ENTRIES = 10_000, 512
_PACKAGE = Path(__file__).resolve().parents[1]
_M = TypeVar("_M", cs.RoundManifest, cs.ScoresManifest)


class _Unknown(Exception):
    """Something that a manifest depends on cannot be identified without reading it."""


@dataclass(frozen=True)
class Sources:
    """All that a manifest is a function of.

    Attributes:
        key: digest of it.
        settled: no file changed less than `RACY_SECONDS` before it was read, code before it was loaded.
    """

    key: str
    settled: bool


def of_round(recipe: Recipe) -> Sources | None:
    """What the manifest of a sampled round depends on; None if that cannot be said without reading it, as of an
    environment's module.
    """
    if recipe.rollouts.environment is not None:
        return None
    return _sources(recipe, [recipe.student], {"round": True}, with_prompts=True)


def of_scores(recipe: Recipe, round_: cs.RoundManifest, scorer: ModelConfig) -> Sources | None:
    """The same for the scores of a round by the student, or by a teacher."""
    name = scorer.name if isinstance(scorer, TeacherConfig) else cs.STUDENT
    models = [recipe.student, scorer] if isinstance(scorer, TeacherConfig) else [recipe.student]
    return _sources(recipe, models, {"scores": name, "of": round_.to_json()}, with_prompts=False)


def recall(sources: Sources | None, kind: type[_M]) -> _M | None:
    """The manifest that was made from these sources; None if there is no entry, or it is damaged."""
    if sources is None:
        return None
    try:
        path = _directory() / f"{sources.key}.json"
        entry = read_json(path, follow_links=False)
        return kind.from_json(entry["manifest"], str(path)) if entry.get("digest") == digest_of(entry) else None
    except (OSError, KeyError, RedpenError, cs.CacheError, _Unknown):
        return None


def remember(before: Sources | None, after: Sources | None, manifest: cs.RoundManifest | cs.ScoresManifest) -> None:
    """Keep a manifest, if its sources stayed the same from before they were read until after.

    Does nothing if there is no directory to keep it in: the next run works it out again.
    """
    if before is None or before != after or not before.settled:
        return
    entry = {"manifest": manifest.to_json()}
    with contextlib.suppress(OSError, RedpenError, _Unknown):
        directory = _directory(create=True)
        write_atomically(directory / f"{before.key}.json", json.dumps(entry | {"digest": digest_of(entry)}))
        entries = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in entries[:-_MOST_ENTRIES]:
            path.unlink(missing_ok=True)


def _directory(*, create: bool = False) -> Path:
    """Where the entries are; of this user, and writable by nobody else."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(os.environ.get("REDPEN_CACHE_HOME") or f"{base}/redpen") / "manifests"
    if not directory.is_absolute():
        raise _Unknown
    if create:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise _Unknown
    return directory


def _sources(
    recipe: Recipe, models: Sequence[ModelConfig], about: dict[str, Any], *, with_prompts: bool
) -> Sources | None:
    now = time.time_ns()
    try:
        files = [entry for model in models for entry in _model_files(model)]
        if with_prompts:
            if (path := local_file(recipe.prompts)) is None:
                return None
            files.append(_file(path))
        files.sort()
        software = [*_source_files(), *sorted(_installed())]
    except (_Unknown, OSError, ValueError):  # RedpenError too: the stage raises it again
        return None
    settled = _newest(files) < now - RACY_SECONDS * 1e9 and _newest(software) < STARTED - RACY_SECONDS * 1e9
    settings = recipe.model_dump(mode="json", exclude=_OF_OTHER_STAGES)
    value = {"recipe": settings, "about": about, "files": files, "software": [sys.version, software]}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=24).hexdigest()
    return Sources(key, settled)


def _newest(entries: Sequence[list[Any]]) -> int:
    return max(int(time_ns) for *_, times in entries for time_ns in times)


def _model_files(model: ModelConfig) -> Iterator[list[Any]]:
    """Every file in the directories of a model and its adapter."""
    if model.trust_remote_code:
        raise _Unknown
    for name, revision in ((model.model, model.revision), (model.adapter, None)):
        if name is None:
            continue
        found = resolve_path(name)
        directory = Path(found).expanduser()
        if not directory.is_dir():  # asks the Hub, as the stage does, and downloads no weights
            directory = find_directory(found, name, revision=revision, weights=False)
        directory = directory.resolve()
        yield from _tree(directory)
        if directory.name in TRAINED:  # a run's result, checked against its record
            yield from (
                _file(path) for path in (directory.parent / RECORD, directory.parent / RECIPE) if path.exists()
            )


def _tree(directory: Path) -> Iterator[list[Any]]:
    def fail(error: OSError) -> None:
        raise error

    count = 0
    for here, directories, names in os.walk(directory, onerror=fail):
        if any(os.path.islink(os.path.join(here, name)) for name in directories):
            raise _Unknown
        count += len(names)
        if count > _MOST_FILES:
            raise _Unknown
        yield from (_file(Path(here, name)) for name in names)


def _file(path: Path) -> list[Any]:
    """A file by what changes with its content; the times, ns, are last."""
    target = os.readlink(path) if path.is_symlink() else ""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opened, since NFS may stat from its cache
    try:
        found = os.fstat(handle)
    finally:
        os.close(handle)
    if not stat.S_ISREG(found.st_mode):
        raise _Unknown
    identity = [found.st_dev, found.st_ino, found.st_size]
    return [os.path.abspath(path), target, *identity, [found.st_mtime_ns, found.st_ctime_ns]]


def _source_files() -> Iterator[list[Any]]:
    """redpen's own code, since a checkout changes without its version."""
    for package in (_PACKAGE, Path(cs.__file__).resolve().parent):
        for here, directories, names in os.walk(package):
            directories[:] = [name for name in directories if name not in ("__pycache__", "assets")]
            yield from (_file(Path(here, name)) for name in sorted(names) if name.endswith(".py"))


def _installed() -> Iterator[list[Any]]:
    """Every installed distribution with its version, as its directory of metadata is named."""
    for folder in sorted({os.path.abspath(folder) for folder in sys.path}):
        for entry in os.scandir(folder) if os.path.isdir(folder) else ():
            if entry.name.endswith(_METADATA):
                found = entry.stat()
                yield [entry.path, [found.st_mtime_ns, found.st_ctime_ns]]
    for name in _READERS:
        spec = importlib.util.find_spec(name)
        beside = Path(spec.origin).parents[1] if spec is not None and spec.origin else None
        if beside is None or not any(path.name.endswith(_METADATA) for path in beside.glob(f"{name}-*")):
            raise _Unknown  # a checkout, whose code changes without its version
