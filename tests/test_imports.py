"""What may import what: one way from the command to the cache, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Folders and modules of `pipeline`, from what everything uses up to the command. Each may import those before it.
ORDER = (
    *("environment", "errors", "credentials", "console", "files", "disk", "config", "quantised"),
    *("forward", "runs", "toy", "models", "text", "rounds", "distributed", "engines", "teachers", "streaming"),
    *("rollouts", "score", "train", "evaluate", "diagnose", "report", "plan", "interchange", "sft"),
    *("distill", "continual", "merge", "chat", "doctor", "api", "cli", "__main__"),
)
STAGES = {"rollouts", "score", "train", "evaluate", "diagnose", "report", "plan", "interchange", "sft"}
#: `redpen sft` is training on other data.
BORROWS = {("sft", "train")}
LIGHT = (
    "cache_schema",
    "pipeline",
    "pipeline.cli",
    "pipeline.config",
    "pipeline.diagnose.stage",
    "pipeline.console",
    "pipeline.text.answers",
    "pipeline.rounds.scored_block",
    "pipeline.text.detokenize",
    "pipeline.errors",
    "pipeline.rounds.metrics",
    "pipeline.text.prompts",
    "pipeline.config.schema",
    "pipeline.distributed.signals",
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
OPTIONAL = {"obstore", "huggingface_hub"}


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it when it runs, with absolute names."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    never_run = {id(node) for block in of_types for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in never_run:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """The folder or top module of `pipeline` that a module is in."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else None


@pytest.mark.parametrize("path", modules("cache_schema"), ids=lambda path: path.name)
def test_cache_schema_needs_little(path: Path) -> None:
    """numpy, xxhash, zarr, and what zarr decodes with."""
    roots = {name.partition(".")[0] for name in imports(path)}
    assert (
        roots
        <= sys.stdlib_module_names
        | {"cache_schema", "numpy", "xxhash", "zarr", "numcodecs", "google_crc32c"}
        | OPTIONAL
    )


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own in (None, "__init__"):
        return
    assert own in ORDER, "a new folder or module at the top has a place in the order"
    others = {name for name in map(room, imports(path)) if name in ORDER and name != own}
    assert not {name for name in others if ORDER.index(name) > ORDER.index(own)}
    if own in STAGES:
        assert not {(own, name) for name in others & STAGES} - BORROWS, "stages meet in the cache and the run alone"


@pytest.mark.parametrize("path", modules("tests"), ids=lambda path: path.name)
def test_no_test_module_imports_another(path: Path) -> None:
    others = {file.stem for file in (ROOT / "tests").glob("*.py")}
    assert not {name.partition(".")[0] for name in imports(path)} & others, "what tests share is in tests/helpers"


def test_the_top_is_short() -> None:
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= 14


def test_light_modules_load_nothing_heavy() -> None:
    """In one process, line by line: what is not loaded after all of them is not loaded by one."""
    code = f"""
import importlib, sys
for module in {LIGHT!r}:
    importlib.import_module(module)
    print(module, *sorted(set({HEAVY!r}) & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == list(LIGHT)


def test_help_loads_next_to_nothing() -> None:
    code = (
        "import sys; from pipeline.cli import main; code = main(['--help']); "
        f"loaded = set({(*HEAVY, 'zarr', 'numpy', 'pydantic')!r}) & sys.modules.keys(); sys.exit(code or len(loaded))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "rollouts" in run.stdout, run.stderr
