"""What may import what: one way from the command to the cache, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"rollouts", "score", "train", "evaluate", "report", "interchange", "diagnose"}
ENTRY_POINTS = {"cli", "verify_run", "__main__", "api", "distill", "merge", "plan", "sft", "continual"}
#: Evaluation samples and scores fresh rollouts in memory, with stage one's own sampler and scorer; training may watch
#: evaluation's accuracy; sampling looks for a student's weights as streamed scoring does.
BORROWS = {"evaluate": {"rollouts", "score"}, "train": {"evaluate"}, "rollouts": {"score"}}
LIGHT = (
    "cache_schema",
    "pipeline",
    "pipeline.cli",
    "pipeline.config",
    "pipeline.diagnose.stage",
    "pipeline.console",
    "pipeline.answers",
    "pipeline.marks",
    "pipeline.text",
    "pipeline.errors",
    "pipeline.metrics",
    "pipeline.prompts",
    "pipeline.settings",
    "pipeline.signals",
    "pipeline.toy",
    "pipeline.toy.world",
)
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "pyarrow",
    "tensorboard",
    "matplotlib",
    "lm_eval",
    "sympy",
    "obstore",
)
#: What a cache of some kind needs, imported where one is opened.
OPTIONAL = {"obstore"}


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, with absolute names."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def stage_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 and parts[1] in STAGES else None


@pytest.mark.parametrize("path", modules("cache_schema"), ids=lambda path: path.name)
def test_cache_schema_needs_numpy_and_zarr_alone(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(path)}
    assert roots <= sys.stdlib_module_names | {"cache_schema", "numpy", "zarr"} | OPTIONAL


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda path: str(path.relative_to(ROOT)))
def test_stages_meet_only_in_the_cache(path: Path) -> None:
    own = stage_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None and not ENTRY_POINTS.isdisjoint(path.with_suffix("").parts):
        return
    others = {name for name in imports(path) if stage_of(name) not in (None, own)}
    borrowed = {name for name in others if stage_of(name) in BORROWS.get(own or "", ()) and ".stage" not in name}
    assert others == borrowed, "stages do not import one another, and what they share does not import them"


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_help_loads_next_to_nothing() -> None:
    code = (
        "import sys; from pipeline.cli import main; code = main(['--help']); "
        f"loaded = set({(*HEAVY, 'zarr', 'numpy', 'pydantic')!r}) & sys.modules.keys(); sys.exit(code or len(loaded))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "rollouts" in run.stdout, run.stderr
