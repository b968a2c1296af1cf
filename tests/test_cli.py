"""The command: every mistake is one line and the right exit code, and a signal ends it cleanly."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cache_schema as cs
from helpers import cache_factory as factory
from helpers.commands import one_line
from pipeline import cli, console, environment, errors
from pipeline.engines.sampling import DecodingProgress
from pipeline.environment import ENVIRONMENT

ROOT = Path(__file__).parent.parent
PIPE = subprocess.PIPE


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def redpen(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *args], capture_output=True, text=True, env=env, **options
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("rollouts nothing --cache c", "recipe nothing: no such file; expected a TOML file or one of"),
        ("rollouts my.toml --cache c", "recipe my.toml: train.learning_rat is not a setting; did you mean"),
        ("score toy --cache c --set train.steps=x", '--set train.steps must be an integer >= 1, got "x"'),
        ("train toy --cache c --run r --set steps=1", "did you mean train.steps?"),
        ("verify nothing", "cache nothing: nothing is there"),
        ("verify file", "cache file: expected a directory, found a file"),
        ("verify directory", "cache directory: this is not a redpen cache"),
        ("inspect newer", "cache newer: expected format version 2 at most, found 3; upgrade redpen"),
        ("inspect nothing", "`redpen rollouts RECIPE --cache nothing` creates it"),
        ("inspect empty --rollout 0", "cache empty: holds no rollouts yet"),
        ("inspect full --round 3", "cache full: there is no round 3; it has 0"),
        ("inspect full --rollout 30", "round 0 has rollouts 0 to 29, got 30"),
        ("inspect full --rollout 3 --teacher x", "--teacher: expected one of teacher in round 0, got 'x'"),
        (
            "recipes show to",
            "recipe to: expected one of company, context-distillation, qwen3-8b-from-32b, qwen3-8b-source, "
            "self-distillation, toy, toy-ensemble, toy-grpo, toy-self; did you mean toy",
        ),
    ],
)
def test_mistake_is_one_line(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.toml").write_text("[train]\nlearning_rat = 1\n")
    Path("file").touch()
    Path("directory").mkdir()
    Path("directory/file").touch()
    factory.filled("full")
    cs.create("empty")
    cs.create("newer")._root.attrs["redpen"] = {"format": "redpen", "version": 3}
    assert cli.main(args.split()) == 1
    captured = capsys.readouterr()
    assert message in one_line(captured.err) and captured.out == ""


@pytest.mark.parametrize(
    "args",
    [
        "bogus",
        "rollouts",
        "rollouts toy --cache=",
        "train toy --run=",
        "verify",
        "inspect c --rollout x",
        "inspect c --rollout -1",
        "plan toy --gpu-memory nan",
        "plan toy --device-tflops inf",
        "plan toy --utilisation nan",
        f"plan toy --gpus {'9' * 400}",
        "train toy --cache c --run s3://bucket/run",
        "merge run -o file://host/m",
        "report run -o HTTP://host/r.html",
        "export-cache c -o s3://bucket/x.parquet",
        "eval run --out file:///tmp/x.json",
    ],
)
def test_usage(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Usage: redpen") and "Error: " in captured.err and captured.out == ""
    assert not Path("s3:").exists() and not Path("file:").exists()


@pytest.mark.parametrize("args", ["report c -o a\0b", "distill toy --cache c --run a\0b", "eval a\0b", "a\0b"])
def test_a_nul_is_one_line(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args.split(" ")) == 1
    assert "NUL" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["", *cli.cli.commands, "recipes show"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    assert "Usage: redpen" in capsys.readouterr().out


def test_dry_run_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.config import load_recipe

    args = ["--set", "train.steps=7", "--set", "rollouts.temperature=0.3"]
    for command in ("rollouts", "score", "train"):
        assert cli.main([command, "toy", "--dry-run", *args]) == 0
        captured = capsys.readouterr()
        Path("resolved.toml").write_text(captured.out)
        assert load_recipe("resolved.toml") == load_recipe("toy", args[1::2])
        assert "warning: rollouts.temperature = 0.3" in captured.err.replace("\n", " ")
    assert [path.name for path in Path().iterdir()] == ["resolved.toml"]


def test_cache_and_run_have_the_names_that_make_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.train.stage

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        pipeline.train.stage, "run", lambda recipe, cache, run, round_index: asked.append((cache, run))
    )
    assert cli.main(["recipes", "show", "toy"]) == 0
    for args in (["toy"], ["./sub/my.toml"], ["toy", "--run", "r"], ["toy", "--cache", "c"]):
        if args[0] != "toy":
            Path("sub").mkdir()
            shutil.copy(ROOT / "pipeline/recipes/toy.toml", args[0])
        assert cli.main(["train", *args]) == 0
    assert asked == [
        ("cache/toy.zarr", "runs/toy"),
        ("cache/my.zarr", "runs/my"),
        ("cache/toy.zarr", "r"),
        ("c", "runs/toy"),
    ]


def test_a_run_is_no_cache(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r").mkdir()
    Path("r/recipe.toml").touch()
    for command in ("inspect", "diagnose", "export-cache -o x"):
        assert cli.main([*command.split(), "r"]) == 1
        assert "r is a run" in one_line(capsys.readouterr().err)


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "company",
        "context-distillation",
        "qwen3-8b-from-32b",
        "qwen3-8b-source",
        "self-distillation",
        "toy",
        "toy-ensemble",
        "toy-grpo",
        "toy-self",
    ]
    assert cli.main(["recipes", "show", "toy"]) == 0
    Path("my.toml").write_text(capsys.readouterr().out)
    assert cli.main(["rollouts", "my.toml", "--dry-run"]) == 0


@pytest.mark.parametrize("command", ["rollouts", "score", "train"])
def test_stage_gets_what_was_asked_for(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(recipe: Any, *args: Any, **options: Any) -> int:
        seen.update(recipe=recipe, args=args, options=options)
        return 3

    stage = ModuleType("stage")
    stage.run = run  # type: ignore[attr-defined]
    package = ModuleType(f"pipeline.{command}")
    package.stage = stage  # type: ignore[attr-defined]
    package.__path__ = [str(Path(cli.__file__).parents[1] / command)]  # so that other modules of it are found
    monkeypatch.setitem(sys.modules, f"pipeline.{command}", package)
    extra = {"rollouts": [], "score": ["--only", "student"], "train": ["--run", "r"]}[command]
    assert cli.main([command, "toy", "--cache", "c", "--round", "2", "--set", "train.steps=7", *extra]) == 3
    options = {"rollouts": {}, "score": {"only": "student"}, "train": {}}[command]
    options |= {} if command == "train" else {"launcher": None, "n_workers": None}
    assert seen["recipe"].train.steps == 7 and seen["options"] == {"round_index": 2} | options
    assert seen["args"] == (("c", "r") if command == "train" else ("c",))


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def run(*_: Any) -> None:
        raise error

    from pipeline.report import terminal

    monkeypatch.setattr(terminal, "run", run)
    return cli.main(["inspect", "c"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.RedpenError("a\nb\x1b[31m"), 1, "redpen: a\\nb\\x1b[31m"),
        (cs.CacheError("c"), 1, "redpen: c"),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), 1, "redpen: run/x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "run/x"), 1, "redpen: run/x: Permission denied"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 1, "redpen: the GPU's memory is full"),
        (errors.Interrupted(signal.SIGTERM, "1 of 2 blocks are committed"), 143,
         "redpen: stopped by SIGTERM: 1 of 2 blocks are committed; the same command continues"),
        (errors.Interrupted(signal.SIGINT), 130, "redpen: stopped by SIGINT; the same command continues"),
    ],
)  # fmt: skip
def test_expected_errors_have_no_traceback(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(monkeypatch, error) == code
    assert one_line(capsys.readouterr().err).startswith(message)


def test_a_regular_expression_of_a_tokenizer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One made to take for ever ends in a panic of the tokenizers library, which is no `Exception`."""
    from tokenizers import Regex, pre_tokenizers

    from pipeline.report import terminal

    splits = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    monkeypatch.setattr(terminal, "run", lambda *_: splits.pre_tokenize_str("a" * 40 + "!"))
    assert cli.main(["inspect", "c"]) == 1
    assert "tokenizer.json" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug"), FileNotFoundError(2, "bug", "x")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error), match="bug"):
        failing(monkeypatch, error)


def test_verify_reports_and_repairs(capsys: pytest.CaptureFixture[str]) -> None:
    cache = factory.filled("c.zarr", n_prompts=10)
    assert cli.main(["verify", "c.zarr"]) == 0
    assert "9 of 9 blocks are committed, no errors found" in capsys.readouterr().out
    shard = next(path for path in Path("c.zarr").rglob("rollouts/token_ids/c/1/*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert cli.main(["verify", "c.zarr"]) == 1
    found = capsys.readouterr().out
    assert "round 0 rollouts block 1, array token_ids" in found and "`redpen verify c.zarr --repair`" in found
    assert cli.main(["verify", "c.zarr", "--repair"]) == 0
    assert "invalidated blocks: 1;" in capsys.readouterr().out
    assert cache.round().rollouts.committed().tolist() == [True, False, True]
    assert cli.main(["verify", "c.zarr"]) == 0
    Path("c.zarr/rounds/00000/rollouts/commit/zarr.json").unlink()
    capsys.readouterr()
    assert cli.main(["verify", "c.zarr"]) == 1
    assert "--repair" not in capsys.readouterr().out  # which would mend nothing


def test_verify_repair_waits_for_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    with factory.filled("c.zarr").lock("redpen rollouts"):
        assert cli.main(["verify", "c.zarr"]) == 0
        capsys.readouterr()
        assert cli.main(["verify", "c.zarr", "--repair"]) == 1
    assert "is being written by `redpen rollouts`" in one_line(capsys.readouterr().err)


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m pipeline recipes show toy | true; echo ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.strip() in ("0", "1") and run.stderr == ""


def test_module_runs_as_the_command() -> None:
    run = redpen("recipes", "show", "nothing")
    assert run.returncode == 1 and one_line(run.stderr) and run.stdout == ""


def test_no_library_reports_home_and_waiting_threads_sleep() -> None:
    """However redpen is entered, and before torch can read its environment; what the user has set stays."""
    code = f"""
import os, sys
def show():
    print([os.environ.get(name) for name in {[*ENVIRONMENT]!r}], flush=True)
    os._exit(0)
class Torch:
    def find_spec(self, name, path=None, target=None):
        return show() if name == "torch" else None
sys.meta_path.insert(0, Torch())
import pipeline.MODULE
show()"""
    bare = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    for module in ("cli", "api"):
        env = bare | {"TOKENIZERS_PARALLELISM": "true"}
        run = subprocess.run(
            [sys.executable, "-c", code.replace("MODULE", module)], cwd=ROOT, env=env, capture_output=True, text=True
        )
        expected = [*(ENVIRONMENT | {"TOKENIZERS_PARALLELISM": "true"}).values()]
        assert run.stdout.strip() == str(expected), run.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("goals", "suggested"),
    [("rollouts", ["rollouts"]), ("score", ["score"]), ("train", ["eval"]), ("train report", ["report"])],
)
def test_make_suggests_no_command_that_it_runs_itself(goals: str, suggested: list[str], tmp_path: Path) -> None:
    """With a `redpen` that only suggests, in place of the installed one."""
    command = tmp_path / "bin/redpen"
    command.parent.mkdir()
    code = "import sys; from pipeline.console import suggest; suggest(sys.argv[1])"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' $1\n")
    command.chmod(0o755)
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / ".installed").touch()  # newer than pyproject.toml: nothing to install
    made = subprocess.run(
        [
            "make",
            *goals.split(),
            f"PYTHON={sys.executable}",
            f"VENV={tmp_path}",
            f"RUN={tmp_path}/runs/toy",
            f"CACHE={tmp_path}/c.zarr",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0 and made.stderr.splitlines() == [f"next: {name}" for name in suggested]


def test_an_extra_is_installed_by_the_command_that_works_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(ROOT)
    assert environment.install_hint("vllm") == f"{sys.executable} -m pip install -e '.[vllm]'"
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.chdir(tmp_path)
    assert environment.install_hint("vllm") == shlex.join(["pip", "install", "-e", f"{ROOT}[vllm]"])
    # of an installed wheel: what the extra requires, since the index has no such distribution
    monkeypatch.setattr(environment, "_ROOT", tmp_path / "site-packages")
    lines = [
        "torch>=2",
        'lm-eval>=0.4; extra == "eval"',
        'math-verify>=0.8; extra == "eval"',
        'vllm<1; extra == "vllm"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines if name == "redpen-opd" else None)
    assert environment.install_hint("eval") == "pip install 'lm-eval>=0.4' 'math-verify>=0.8'"


def test_every_extra_that_a_message_names_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        found
        for file in (ROOT / "pipeline").rglob("*.py")
        for found in re.findall(r"install_hint\([\"'](\w+)[\"']\)", file.read_text())
    }
    assert {"vllm", "eval", "quant", "ray"} <= named <= extras.keys() and {"wandb", "trackio"} <= extras.keys()


def test_progress_in_a_log_is_a_few_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress("train", total=100, unit="steps", done=20) as bar:
        for step in range(80):
            now += 0.5
            bar.advance(note=f"KL {step}\x1b[2J")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 30%, 30/100 steps, 2.0 steps/s, 0:35 left, KL 9\\x1b[2J"
    assert lines[-1] == "train: 100%, 100/100 steps, 2.0 steps/s, KL 79\\x1b[2J" and len(lines) == 8
    with console.progress("train", total=100, unit="steps", done=100):
        pass
    with console.progress("rollouts", total=10, unit="rollouts") as bar:
        shown = DecodingProgress(bar, 10, 100)
        for _ in range(20):  # none ends before the limit: half of the tokens take as long again
            now += 1
            shown(0, 25)
        assert bar.line() == "rollouts: 0%, 0/10 rollouts, 0:20 left, 25.0 tokens/s"
        now += 1
        shown(8, 25)  # most stop early
        assert bar.line() == "rollouts: 80%, 8/10 rollouts, 0.38 rollouts/s, 0:05 left, 25.0 tokens/s"
        shown(2, 1)
    capsys.readouterr()
    with console.progress("short", total=3) as bar:
        now += 0.5
        bar.advance(3)
    assert capsys.readouterr().err.splitlines() == ["short: 100%, 3/3 blocks, 6.0 blocks/s"]


# ----------------------------------------------------------------------------------------------------------- signals

WORK = textwrap.dedent("""
    import sys, time
    from pipeline import cli
    from pipeline.distributed import signals
    from pipeline.report import terminal

    def run(*_):
        with signals.graceful() as stop:
            print("working", flush=True)
            for step in range(200):
                if {polite}:
                    stop.check(f"{{min(step, 1)}} blocks are committed")
                time.sleep(0.05)
        print("done")

    terminal.run = run
    sys.exit(cli.main(["inspect", "c"]))
""")


def start(polite: bool) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = WORK.format(polite=polite)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_first_signal_ends_the_work_cleanly(signum: signal.Signals, code: int) -> None:
    process = start(polite=True)
    time.sleep(0.2)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and out == ""
    asked, ended = err.strip().splitlines()
    assert asked.startswith(f"{signum.name}: ") and asked.endswith(" again to force quit")
    assert ended == f"redpen: stopped by {signum.name}: 1 blocks are committed; the same command continues"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_kills(second: signal.Signals) -> None:
    process = start(polite=False)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(second)
    process.communicate(timeout=30)
    assert process.returncode == -second


def test_signal_before_a_stage_begins() -> None:
    code = WORK.format(polite=True).replace("with signals.graceful() as stop:", "if True:")
    code = code.replace("if True:", "if True:\n        stop = None", 1).replace("stop.check", "str")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and err == "redpen: stopped by SIGTERM; the same command continues\n"


def test_handlers_are_restored() -> None:
    from pipeline.distributed.signals import graceful

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(errors.Interrupted) as error, graceful() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        stop.check("3 of 4 blocks are committed")
    assert error.value.exit_code == 143 and "3 of 4" in str(error.value)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_directory_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run, here = tmp_path / "run", tmp_path / "here"
    run.mkdir()
    (run / "run.json").write_text("{}")
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    assert cli.main(["eval", str(run), "--out", "new.json"]) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("redpen: the current directory does not exist any more")
    )
