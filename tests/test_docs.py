"""The documentation: generated pages are fresh, links resolve, commands parse, and what is quoted is there."""

from __future__ import annotations

import ast
import difflib
import math
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import cache_schema as cs
from pipeline.cli import cli
from pipeline.config import Recipe, load_recipe
from pipeline.config.schema import find_setting
from pipeline.report import inspect
from pipeline.text.detokenize import load_decoder

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cache_schema/SPEC.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """`(language, text)` of every fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


# -- generated pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), runpy.run_path(str(ROOT / "docs/reference.py"))["pages"]().items())
def test_generated_page_is_fresh(name: str, text: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    if written != text:
        lines = difflib.unified_diff(written.splitlines(), text.splitlines(), "written", "now", n=0, lineterm="")
        pytest.fail(f"docs/{name} is out of date, run `make docs`:\n" + "\n".join(list(lines)[:8]), pytrace=False)


# -- links ---------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        assert where.exists(), f"{page.name}: {target} is not there"
        assert not anchor or anchor in anchors(where), f"{page.name}: {target} names no heading of {where.name}"


# -- commands ------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command line in shell blocks, fenced or indented, and in `code` that starts with one."""
    lines = [
        line.strip()
        for language, text in blocks(page)
        if language in ("bash", "sh")
        for line in text.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"^    ((?:redpen|make|torchrun|python) .+)$", prose(page), re.M)
    lines += [
        " ".join(code.split()) for code in re.findall(r"`((?:redpen|make|torchrun|python) [^`]+)`", prose(page))
    ]
    for line in lines:
        words = shlex.split(re.split(r" (?:[|>]|&&|\|\|) ", line)[0], comments=True)
        while words and re.fullmatch(r"\w+=.*|export", words[0]):
            words = words[1:]
        if words:
            yield words


def redpen(words: list[str]) -> None:
    """Parse the arguments of `redpen`; raises click's UsageError."""
    command, context = cli, click.Context(cli, info_name="redpen")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, words = words[0], words[1:]
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no command {name!r}")
        command, context = found, click.Context(found, parent=context, info_name=name)
    parsed, extra, _ = command.make_parser(context).parse_args(words)
    if extra:
        raise click.UsageError(f"arguments too many: {extra}")
    for override in parsed.get("overrides") or ():
        known_setting(override)


def known_setting(override: str) -> None:
    path, equals, _ = override.partition("=")
    if not equals or find_setting(Recipe, path.split(".")) is None:
        raise click.UsageError(f"no setting {override!r}")


def make(words: list[str]) -> None:
    for word in words:
        name, assigns, value = word.partition("=")
        if assigns:
            assert re.search(rf"^{name} *[?:]?=", MAKEFILE, re.M), f"no variable {name} in the Makefile"
            for override in value.split() if name == "SET" else ():
                known_setting(override)
        else:
            assert re.search(rf"^{word}:", MAKEFILE, re.M), f"no target {word} in the Makefile"


def python(words: list[str]) -> None:
    """A script of the repository exists and knows its options."""
    if words[0].endswith(".py"):
        text = (ROOT / words[0]).read_text(encoding="utf-8")
        unknown = [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in text]
        assert not unknown, f"{words[0]} has no {unknown}"


@each_page
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        program, line = Path(words[0]).name, " ".join(words)
        try:
            if "-m" in words and "pipeline" in words:  # python or torchrun
                redpen([word for word in words[words.index("pipeline") + 1 :] if word not in ("--", "...")])
            elif program == "redpen":
                redpen([word for word in words[1:] if word != "..."])
            elif program == "make":
                make(words[1:])
            elif program == "python":
                python(words[1:])
        except (AssertionError, click.UsageError) as error:
            pytest.fail(f"{page.name}: `{line}`: {error}")


@each_page
def test_recipes_in_the_text_hold_known_settings(page: Path) -> None:
    for language, text in blocks(page):
        if language == "toml":
            for section, table in tomllib.loads(text).items():
                for one in table if isinstance(table, list) else [table]:
                    unknown = [key for key in one if find_setting(Recipe, [section, key]) is None]
                    assert not unknown, f"{page.name}: [{section}] has no {unknown}"


def test_python_in_the_text_runs(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.zarr").symlink_to(toy_cache)
    monkeypatch.chdir(tmp_path)
    code = [text for language, text in blocks(ROOT / "docs/cache.md") if language == "python" and "toy.zarr" in text]
    assert code
    for text in code:
        exec(compile(text, "cache.md", "exec"), {})
        assert capsys.readouterr().out.strip()


# -- quotations ----------------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Every text in the sources, with … for what is filled in."""
    found = []
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "cache_schema").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_are_in_the_sources() -> None:
    """The first column of the tables of errors; … stands for what differs."""
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    errors = page[page.index("## Error messages") :]
    quoted = re.findall(r"^\| `([^`]+)`", errors, re.M)
    sources = messages()
    assert len(quoted) > 30
    missing = [
        quote
        for quote in quoted
        if not any(re.search(".*".join(map(re.escape, quote.split("…"))), text, re.S) for text in sources)
    ]
    assert not missing


def test_the_walkthrough_shows_the_rollout_that_is_sampled(toy_cache: Path) -> None:
    """Rollout 4 of the toy's default seed, which is the same however many prompts a round has."""
    page = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
    assert load_recipe("toy").rollouts.seed == 0
    round_ = cs.open(toy_cache).round()
    rollout = inspect.rollout(round_, 4, None, lambda: load_decoder(round_.manifest))
    assert f"prompt    {rollout['prompt']}\n" in page
    rows = re.findall(
        r"^\| (\d+) \| `(.*)` \| ([\d.]+) % \| ([\d.]+) % \| `(.*)` \| ([\d.]+) \| ([\d.]+) \|$", page, re.M
    )
    assert len(rows) == len(rollout["tokens"]) == 16
    for (position, text, student, teacher, preferred, entropy, kl), token in zip(
        rows, rollout["tokens"], strict=True
    ):
        best = max(token["candidates"], key=lambda candidate: candidate["teacher_logprob"])
        assert int(position) == token["position"]
        assert [text.replace("\\|", "|"), preferred.replace("\\|", "|")] == [token["text"], best["text"]]
        assert float(student) == pytest.approx(100 * math.exp(token["student_logprob"]), abs=0.02)
        assert float(teacher) == pytest.approx(100 * math.exp(token["teacher_logprob"]), abs=0.02)
        assert float(entropy) == pytest.approx(token["entropy"], abs=2e-3)
        assert float(kl) == pytest.approx(token["reverse_kl"], abs=2e-3)
