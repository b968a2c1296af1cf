"""Fixtures of more than one test file: small scored caches of the toy, made once by the stages themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.caches import MANY_BLOCKS, make_cache, small_recipe
from pipeline.config import Recipe, load_recipe

# Read when torch is first imported: threads that wait must not spin while other work wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored toy cache, for reading only; `shutil.copytree` it to change anything."""
    return make_cache(tmp_path_factory.mktemp("toy") / "cache.zarr", small_recipe())


@pytest.fixture(scope="session")
def undisturbed_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of `MANY_BLOCKS`, made on one thread: more threads change the last bits."""
    import torch

    import pipeline.rollouts.stage
    import pipeline.score.stage

    path, threads = tmp_path_factory.mktemp("undisturbed") / "toy.zarr", torch.get_num_threads()
    torch.set_num_threads(1)
    pipeline.rollouts.stage.run(load_recipe("toy", MANY_BLOCKS), str(path))
    pipeline.score.stage.run(load_recipe("toy", MANY_BLOCKS), str(path))
    torch.set_num_threads(threads)
    return path


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """`recipe(*overrides)`: the recipe of `toy_cache`."""
    return small_recipe
