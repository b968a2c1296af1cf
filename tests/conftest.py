"""What more than one test file needs: a small scored cache of the toy, made once by the real stages."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Recipe, load_recipe

# Read when torch is first imported: threads that wait must not spin while other work wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

#: The files that take longest, longest first: `make test` deals whole files to two workers, who then end together.
LONGEST = (
    *("workers", "distill", "s3", "prompt_logprobs", "distributed", "continual", "evaluate", "diagnose", "score"),
    *("train_resume", "cache", "stage_one_resume", "reward", "alignment", "streamed", "train", "plan", "interchange"),
)

#: 24 prompts x 4 rollouts in 6 blocks, 6 steps an epoch, several micro-batches a step
SMALL = (
    "prompts.limit=24",
    "rollouts.prompts_per_block=4",
    "train.prompts_per_step=4",
    "train.tokens_per_microbatch=100",
    "train.shuffle_window_blocks=3",
    "train.checkpoint_every=2",
    "train.lora_rank=4",
    "train.stop_reverse_kl=0",
    "train.steps=5",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def small_recipe(*overrides: str) -> Recipe:
    """The toy recipe at a size for tests."""
    return load_recipe("toy", [*SMALL, *overrides])


def make_cache(path: Path, recipe: Recipe) -> Path:
    """A finished cache of `recipe` at `path`."""
    import pipeline.rollouts.stage
    import pipeline.score.stage

    assert pipeline.rollouts.stage.run(recipe, str(path)) == 0
    assert pipeline.score.stage.run(recipe, str(path)) == 0
    return path


def tree_digest(path: Path) -> str:
    """Digest of every file below `path`, names included."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored toy cache, for reading only; `shutil.copytree` it to change anything."""
    return make_cache(tmp_path_factory.mktemp("toy") / "cache.zarr", small_recipe())


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """`recipe(*overrides)`: the recipe of `toy_cache`."""
    return small_recipe
