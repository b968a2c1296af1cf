"""Fixtures of more than one test file: small scored caches of the toy, made once by the stages themselves."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.caches import MANY_BLOCKS, make_cache, small_recipe
from pipeline.config import Recipe, load_recipe

# Read when torch is first imported: threads that wait must not spin while other work wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As in the processes that tests start: other thread counts give other last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Imports and collection leave no garbage, only half a million objects; stages collect after each of their models.
gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Iterator[None]:
    """From here on garbage is looked for, but not in what is there already."""
    gc.freeze()
    gc.enable()
    try:
        return (yield)
    finally:
        gc.unfreeze()  # else libraries take it for leaked at the end of the process


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests keep what redpen remembers of models, and not in the developer's home."""
    path = tmp_path_factory.mktemp("cache-home")
    os.environ["REDPEN_CACHE_HOME"] = str(path)
    return path


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored toy cache, for reading only; `shutil.copytree` it to change anything."""
    return make_cache(tmp_path_factory.mktemp("toy") / "cache.zarr", small_recipe())


@pytest.fixture(scope="session")
def undisturbed_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored cache of `MANY_BLOCKS`, for reading only."""
    return make_cache(tmp_path_factory.mktemp("undisturbed") / "toy.zarr", load_recipe("toy", MANY_BLOCKS))


@pytest.fixture
def unscored(toy_cache: Path, tmp_path: Path) -> Path:
    """A copy of the toy cache without the teacher's scores."""
    path = Path(shutil.copytree(toy_cache, tmp_path / "toy.zarr"))
    shutil.rmtree(path / "rounds/00000/scores/teacher")
    return path


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """`recipe(*overrides)`: the recipe of `toy_cache`."""
    return small_recipe
