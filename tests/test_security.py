"""What came from outside neither steers the terminal nor ends finished work, and no credential is kept or shown."""

from __future__ import annotations

import ast
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import cache_schema as cs
from helpers.caches import small_recipe
from helpers.commands import one_line
from pipeline import api, cli, console, credentials
from pipeline.config import Recipe, load_recipe, messages
from pipeline.errors import ConfigError
from pipeline.models import identity as provenance
from pipeline.models.model_card import run_card
from pipeline.runs import tracking
from pipeline.runs.directory import Result, open_run

ROOT = Path(__file__).parent.parent
SECRET = "hunter2hunter2"
URLS = (
    f"http://user:{SECRET}@host:8000/v1",
    f"https://{SECRET}@host/v1",
    f"HTTP://user:{SECRET}/x@host",
    f"http://user:pa@{SECRET}@host",
    f"http://host/v1?api_key={SECRET}",
    f"http://host/v1?a=1&token={SECRET}&b=2",
    f"https://host/x?X-Amz-Signature={SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"s3://KEY:{SECRET}/abc+d@bucket/toy.zarr",
    f"s3:/KEY:{SECRET}@bucket/toy.zarr",
    f"s3://bucket/toy.zarr?secret={SECRET}",
    f"http://user%3A{SECRET}%40host/v1",
    f"http://host/v1?api_key%3D{SECRET}",
    f"http://host/v1%3Fx-goog-api-key%3d{SECRET}",
    f"http://host/v1?subscription-key={SECRET}",
    f"http://host/v1?x=1&openai_api_key={SECRET}",
    f"http://host/v1?passphrase={SECRET}",
    f"s3://KEY%3A{SECRET}%40bucket/toy.zarr",
)
HARMLESS = (
    *("http://localhost:8000/v1", "https://host/v1/?version=3", "s3://bucket/caches/toy@2.zarr", "Qwen/Qwen3-8B@x"),
    *("runs/a:/b", "file:///home/me@work/c.zarr", "http://host:8000/v1/@x", "sk-learn-is-a-library-of-learning"),
    *("a" * 40, "a bearer of bad news", "C:/data", "what?key = value", "mail me@host.org", "https://[::1]:8000/v1"),
)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -------------------------------------------------------------------------------------------------------- credentials


@pytest.mark.parametrize("url", URLS)
def test_a_credential_is_found_and_masked(url: str) -> None:
    assert credentials.contains(url) and SECRET not in credentials.mask(f"cannot reach {url}: no")
    assert credentials.MASK in credentials.mask(url)
    for shown in (messages.show_value(url), console.escape_control(json.dumps({"url": url}))):
        assert SECRET not in shown
    assert json.loads(console.escape_control(json.dumps({"url": url, "n": 1})))["n"] == 1


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_resembles_one_stays(text: str) -> None:
    assert not credentials.contains(text) and credentials.mask(text) == text


@pytest.mark.parametrize(
    "key", ["hf_" + "aB3" * 12, "sk-proj-" + "aB3" * 9, "AKIA" + "A2" * 8, "ghp_" + "a1" * 18, "Bearer abc123def456g"]
)
def test_a_key_that_names_its_kind_is_one(key: str) -> None:
    assert credentials.contains(key) and key not in credentials.mask(f"a {key} b")


def test_what_the_environment_keeps_secret_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDPEN_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    console.show(f"the server said {SECRET}, EMPTY")
    console.warn(f"the server said {SECRET}")
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err and "EMPTY" in captured.out


SETTINGS = {
    "teacher.url": "REDPEN_API_KEY",
    "teacher.model": "HF_TOKEN",
    "student.adapter": "HF_TOKEN",
    "prompts.path": "HF_TOKEN",
    "eval.path": "HF_TOKEN",
    "track.project": "WANDB_API_KEY",
    "prompts.system": "",
}


@pytest.mark.parametrize(("setting", "variable"), SETTINGS.items())
@pytest.mark.parametrize("url", URLS[:1] + URLS[4:5])
def test_no_setting_takes_a_credential(
    setting: str, variable: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section, key = setting.split(".")
    data: dict[str, Any] = {"student": {"model": "a"}, "teacher": {"model": "b"}, "prompts": {"path": "c"}}
    data.setdefault(section, {})[key] = url
    for make in (lambda: Recipe.from_dict(data), lambda: load_recipe("toy", [f"{setting}={url}"])):
        with pytest.raises(ConfigError, match=setting) as caught:
            make()
        assert SECRET not in str(caught.value) and variable in str(caught.value) and "\n" not in str(caught.value)
    Path("my.toml").write_text(f"[{section}]\n{key} = {json.dumps(url)}\n")
    for args in (["my.toml"], ["toy", "--set", f"{setting}={url}"], ["toy", f"--set={setting}={url}"]):
        assert cli.main(["rollouts", *args, "--cache", "c", "--dry-run"]) == 1
        captured = capsys.readouterr()
        assert setting in one_line(captured.err) and SECRET not in captured.out + captured.err
    assert [path.name for path in Path().iterdir()] == ["my.toml"]


@pytest.mark.parametrize("ends", ["?code=", "?k=", "/v1?", "#", "/v1%3Fcode%3D", ";@"])
def test_the_url_of_a_server_has_no_user_query_or_fragment(ends: str) -> None:
    """Keys are passed under any name, and redpen appends paths to the URL."""
    with pytest.raises(ConfigError, match=r"teacher\.url.* a user, a query or a fragment.*REDPEN_API_KEY") as caught:
        load_recipe("toy", [f"teacher.url=http://host{ends}{SECRET}"])
    assert SECRET not in str(caught.value)
    load_recipe("toy", ["teacher.url=https://[::1]:8000/v1;version=3/a%20b"])


def test_settings_within_settings_take_none_either() -> None:
    url = URLS[0]
    for overrides, name in (
        (['teacher.template_args={a = ["%s"]}' % url], "teacher.template_args.a"),  # noqa: UP031
        ([f"sft.data=['{url}']"], "sft.data"),
        ([f"teacher.url=user:{SECRET}@host:8000/v1"], "teacher.url"),
    ):
        with pytest.raises(ConfigError, match=name) as caught:
            load_recipe("toy", overrides)
        assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match="model") as caught:
        api.Student(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("rollouts toy --cache URL", "--cache"),
        ("train toy --cache=URL --run r", "--cache"),
        ("inspect URL", "argument"),
        ("verify URL", "argument"),
        ("eval URL", "argument"),
        ("eval runs/a --teacher URL", "--teacher"),
        ("eval runs/a --prompts URL", "--prompts"),
        ("merge runs/a -o o --base URL", "--base"),
        ("report runs/a -o URL", "-o"),
        ("URL", "argument"),
        ("rollouts URL --cache c", "argument"),
        ("rollouts toy --URL x", "argument"),
        ("inspect c --round URL", "--round"),
    ],
)
@pytest.mark.parametrize("url", URLS)
def test_no_argument_takes_a_credential(
    command: str, name: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([part.replace("URL", url) for part in command.split()]) == 1
    captured = capsys.readouterr()
    assert name in one_line(captured.err) and SECRET not in captured.out + captured.err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("url", [url for url in URLS if url.startswith("s3")])
def test_no_cache_is_opened_with_a_credential(url: str) -> None:
    for use in (cs.open, cs.create):
        with pytest.raises(cs.CacheError, match="AWS_ACCESS_KEY_ID") as caught:
            use(url)
        assert SECRET not in str(caught.value)


def test_what_old_files_hold_is_masked_wherever_it_is_shown(
    toy_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache and two runs of before, with a URL in whatever is a text."""
    cache = Path(shutil.copytree(toy_cache, tmp_path / "toy.zarr"))
    for path in cache.rglob("zarr.json"):
        text = path.read_text().replace("toy:teacher", URLS[0]).replace("toy:student", URLS[4])
        path.write_text(text)
    for name in ("a", "b"):
        run = tmp_path / name
        run.mkdir()
        ended = {"sentence": f"ended at {URLS[4]}", "exit_code": 0, "step": 1}
        where = {"url": URLS[8], "round": 0, "teacher": "teacher"}
        (run / "run.json").write_text(json.dumps({"result": ended, "cache": where}))
        (run / "recipe.toml").write_text(
            f"[[teacher]]\nname = 'a'\nurl = '{URLS[0]}'\n[[teacher]]\nname = 'b'\nurl = '{URLS[1]}{name}'\n"
            f"[eval]\npath = '{URLS[5]}'\n"
        )
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "reverse_kl": 1.0}\n')
    shown = ""
    for args in (
        ["inspect", str(cache)],
        ["inspect", str(cache), "--json"],
        ["inspect", str(cache), "--rollout", "0"],
        ["diagnose", str(cache)],
        ["diagnose", str(cache), "--json"],
        ["verify", str(cache)],
        ["report", str(cache), "-o", "cache.html"],
        ["report", "a", "b", "-o", "runs.html"],
        ["eval", "a", "--prompts", "toy:heldout"],
        ["export-cache", str(cache), "-o", "out.parquet"],
    ):
        cli.main(args)
        captured = capsys.readouterr()
        shown += captured.out + captured.err
    assert credentials.MASK in shown and SECRET not in shown
    for page in ("cache.html", "runs.html"):
        text = Path(page).read_text()
        assert SECRET not in text and credentials.MASK in text


def test_trackers_and_cards_get_no_credential(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is passed to them of a cache's address, and of a sentence, of before."""
    recipe = small_recipe('track.trackers=["wandb", "trackio"]')
    for name in recipe.track.trackers:
        monkeypatch.setitem(sys.modules, name, library := mock.MagicMock())
        with open_run(tmp_path / name, recipe, {"url": URLS[8]}) as run:
            run.start()
            tracking.Recorder(run, 1).close(None)
        calls = repr(library.mock_calls)
        assert "init(" in calls and credentials.MASK in calls and SECRET not in calls
    round_ = cs.open(toy_cache).round()
    card = run_card(recipe, round_, ("teacher",), Result(1, f"ended at {URLS[4]}", 0))
    assert credentials.MASK in card and SECRET not in card
    assert SECRET not in repr(credentials.masked({"a": [URLS[0], {URLS[4]: 1}], "b": (URLS[2],)}))


# ------------------------------------------------------------------------------------------------------------- output

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\x00"
RAW = ("\x1b", "\x07", "\x9b", "\u202e", "\x00")


def test_nothing_of_a_run_or_a_cache_steers_the_terminal(
    toy_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Path(shutil.copytree(toy_cache, tmp_path / f"toy{ESCAPES[:-1]}.zarr"))
    for path in cache.rglob("zarr.json"):
        path.write_text(path.read_text().replace("toy:teacher", json.dumps(ESCAPES)[1:-1]))
    run = tmp_path / f"run{ESCAPES[:-1]}"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"result": {"sentence": ESCAPES, "exit_code": 0}, "cache": {}}))
    (run / "recipe.toml").write_text(f"[eval]\npath = {json.dumps(ESCAPES)}\n")
    shown = ""
    for args in (
        ["inspect", str(cache)],
        ["inspect", str(cache), "--json"],
        ["inspect", str(cache), "--rollout", "0"],
        ["diagnose", str(cache)],
        ["verify", str(cache)],
        ["report", str(run), str(cache), "-o", "r.html"],
        ["export-cache", str(cache), "-o", "o.parquet"],
        ["eval", str(run)],
        ["merge", str(run), "-o", f"m{ESCAPES[:-1]}"],
        [f"bogus{ESCAPES}"],
        ["inspect", f"--bogus{ESCAPES}"],
        ["inspect", "c", "--round", ESCAPES],
        ["rollouts", f"recipe{ESCAPES[:-1]}", "--cache", "c"],
        ["rollouts", "toy", "--cache", "c", "--set", f"train.steps={ESCAPES}"],
        ["rollouts", "toy", "--dry-run", "--set", f'prompts.system="{json.dumps(ESCAPES)[1:-1]}"'],
    ):
        cli.main(args)
        captured = capsys.readouterr()
        shown += captured.out + captured.err
    assert not [letter for letter in RAW if letter in shown] and "\\x1b" in shown


def test_a_dry_run_reads_back_equal_with_letters_that_cannot_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    made = load_recipe("toy", ["prompts.template=auto", f"prompts.system={ESCAPES[:-1]}\U000e0041é😀\u200d"])
    overrides = ["--set", "prompts.template=auto", "--set", f"prompts.system={made.prompts.system}"]
    assert cli.main(["rollouts", "toy", "--dry-run", *overrides]) == 0
    Path("my.toml").write_text(printed := capsys.readouterr().out)
    assert load_recipe("my.toml") == made and "é😀" in printed


def test_a_terminal_gets_text_and_colours_only(capsys: pytest.CaptureFixture[str]) -> None:
    out = console.results()
    out.print(f"[bold]{ESCAPES}[/bold]")
    assert not [letter for letter in RAW if letter in capsys.readouterr().out]


def test_what_libraries_warn_of_and_log_is_made_visible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.report import terminal

    def run(*_: Any) -> None:
        logging.getLogger("library").warning("said %s", ESCAPES)
        sys.stderr.write(warnings.formatwarning(ESCAPES, UserWarning, "file.py", 1))

    monkeypatch.setattr(terminal, "run", run)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("library").addHandler(handler)
    before = warnings.formatwarning, logging.getLogRecordFactory()
    try:
        assert cli.main(["inspect", "c"]) == 0
    finally:
        logging.getLogger("library").removeHandler(handler)
    shown = capsys.readouterr().err
    assert shown.count("\\x1b[2J") == 2 and not [letter for letter in RAW if letter in shown]
    assert (warnings.formatwarning, logging.getLogRecordFactory()) == before


def test_long_words_are_clipped(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (
        ["inspect", "x" * 100_000],
        ["inspect", "a b " * 50_000],
        ["x" * 100_000],
        ["rollouts", "x" * 100_000, "--cache", "c"],
        ["inspect", "c" * 300],
    ):
        assert cli.main(args) in (1, 2)
        err = capsys.readouterr().err
        assert len(err) < 6000 and len(err.splitlines()) <= 4 and "Traceback" not in err


def test_an_early_end_of_input_is_no_abortion(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.report import terminal

    def run(*_: Any) -> None:
        raise EOFError("bug")

    monkeypatch.setattr(terminal, "run", run)
    with pytest.raises(EOFError, match="bug"):
        cli.main(["inspect", "c"])


#: Where standard streams are written to.
WRITERS = {"console.py", "cli/streams.py"}


def test_standard_streams_are_written_by_one_module() -> None:
    found = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        if (name := str(path.relative_to(ROOT / "pipeline"))) in WRITERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("print", "click.echo", "click.secho", "rich.print", "Console") or (
                called.startswith(("sys.stdout.write", "sys.stderr.write", "warnings.warn"))
            ):
                found.append(f"{name}: {called}")
    assert found == []


# ------------------------------------------------------------------------------------------------------------ streams

WORK = """
import sys
from pipeline import cli, console
from pipeline.report import terminal

def run(*_):
    open("before", "w").write("x")
    with console.progress("rollouts", 3) as bar:
        for _ in range(3):
            bar.advance(1, note="\\U0001f600")
        console.warn("a warning \\U0001f600")
    console.show("result \\U0001f600 \\u2587")
    console.results().print("table \\U0001f600 \\u2587")
    open("done", "w").write("x")

terminal.run = run
sys.exit(cli.main(["inspect", "c"]))
"""


@pytest.mark.parametrize(
    ("redirection", "encoding", "code", "out"),
    [
        (">&-", "utf-8", 0, ""),
        ("2>&-", "utf-8", 0, "result 😀 ▇\ntable 😀 ▇\n"),
        (">&- 2>&- <&-", "utf-8", 0, ""),
        ("2>/dev/full", "utf-8", 0, "result 😀 ▇\ntable 😀 ▇\n"),
        (">/dev/full", "utf-8", 1, ""),
        ("", "ascii", 0, "result \\U0001f600 \\u2587\ntable \\U0001f600 \\u2587\n"),
        ("", "latin-1", 0, "result \\U0001f600 \\u2587\ntable \\U0001f600 \\u2587\n"),
    ],
)
def test_streams_that_are_closed_full_or_of_another_encoding(
    redirection: str, encoding: str, code: int, out: str
) -> None:
    Path("work.py").write_text(WORK)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = f"exec {sys.executable} work.py {redirection}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8", env=env)
    assert (run.returncode, run.stdout) == (code, out), run.stderr
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr
    assert Path("before").read_text() == "x" and Path("done").exists() == (code == 0)


def test_a_clock_before_1970(
    toy_cache: Path, tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.rollouts import stage

    monkeypatch.setattr(time, "time", lambda: -1e6)
    monkeypatch.setattr(time, "time_ns", lambda: -(10**15))
    assert stage.run(recipe("prompts.limit=4"), str(tmp_path / "c.zarr")) == 0
    assert not list(cs.verify(cs.open(tmp_path / "c.zarr")))
    assert cli.main(["inspect", str(tmp_path / "c.zarr")]) == 0
    assert provenance.created_by()
