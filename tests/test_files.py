"""Files outside the Zarr stores: a kill loses nothing, nothing outside is written to, nothing endless is read."""

from __future__ import annotations

import ast
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from pipeline import files
from pipeline.errors import ConfigError, RedpenError

ROOT = Path(__file__).parent.parent


def left(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("content", ["text é\n", b"\x00\xff", ""])
def test_a_file_is_replaced_at_once(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "eval.json"
    path.write_text("old")
    files.write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    with pytest.raises(RuntimeError), files.atomic_file(path) as file:
        file.write(b"half")
        assert len(left(tmp_path)) == 2
        raise RuntimeError
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert left(tmp_path) == ["eval.json"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_is_replaced_at_once(tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    path = tmp_path / "sub" / "adapter"
    for content in ("one", "two"):
        with files.atomic_directory(path) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / content).write_text(content)
            (partial / "inner" / content).chmod(0o600)
        assert left(path / "inner") == [content]
        assert (path / "inner" / content).stat().st_mode & 0o044
    with pytest.raises(RuntimeError), files.atomic_directory(path) as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert left(path / "inner") == ["two"] and left(tmp_path / "sub") == ["adapter"]


def test_a_kill_between_two_names_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names cannot be exchanged, what was there is found again."""
    path = tmp_path / "adapter"
    with files.atomic_directory(path) as partial:
        (partial / "finished").touch()
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    renames: list[Path] = []

    def rename(self: Path, to: Path) -> None:
        renames.append(self)
        if len(renames) == 2:
            raise KeyboardInterrupt
        os.rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt), files.atomic_directory(path) as partial:
            pass
    assert not path.exists()
    with pytest.raises(RuntimeError), files.atomic_directory(path):
        assert left(path) == ["finished"]
        raise RuntimeError
    assert left(path) == ["finished"]


@pytest.mark.parametrize("is_dangling", [True, False])
def test_a_link_where_a_file_of_ours_belongs_is_refused(tmp_path: Path, is_dangling: bool) -> None:
    outside = tmp_path / "outside"
    if not is_dangling:
        outside.write_text("mine")
    link = tmp_path / "run.json"
    link.symlink_to(outside)
    for write in (
        lambda: files.write_atomically(link, "x"),
        lambda: files.append(link, "x"),
        lambda: files.open_lock(link),
        lambda: files.write_output(link, b"x"),
        lambda: files.atomic_directory(link).__enter__(),
        lambda: files.atomic_file(link).__enter__(),
    ):
        with pytest.raises(RedpenError, match=r"run\.json: .*symbolic link to .*outside") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert (not outside.exists()) if is_dangling else outside.read_text() == "mine"


def test_names_of_others_are_neither_followed_nor_reused(tmp_path: Path) -> None:
    """Whatever lies beside a file in a directory from somebody else."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json.partial", ".run.json.partial", f".run.json.{'0' * 16}.partial", ".run.json.x.partial"):
        (run / name).symlink_to(outside / "kept")
    (run / f".run.json.{'1' * 16}.partial").symlink_to(outside)
    (run / f".run.json.{'2' * 16}.replaced").symlink_to(outside)
    os.mkfifo(run / f".run.json.{'3' * 16}.partial")
    (run / ".run.json.mine.partial").write_text("no temporary name of ours")
    before = left(run)
    files.write_atomically(run / "run.json", "new")
    with files.atomic_directory(run / "adapter") as partial:
        (partial / "a").touch()
    assert (outside / "kept").read_text() == "mine" and left(outside) == ["kept"]
    assert (run / "run.json").read_text() == "new"
    assert set(before) - {f".run.json.{'3' * 16}.partial"} <= set(left(run))


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    code = "import os,sys;from pathlib import Path;from pipeline import files\n"
    code += "held = files.atomic_directory(Path(sys.argv[1])); held.__enter__(); os.kill(os.getpid(), 9)"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "adapter")], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    (abandoned,) = left(tmp_path)
    with files.atomic_directory(tmp_path / "adapter") as living:
        assert abandoned not in left(tmp_path)
        with files.atomic_directory(tmp_path / "adapter") as partial:
            (partial / "second").touch()
        assert living.is_dir() and left(tmp_path / "adapter") == ["second"]
        (living / "first").touch()
    assert left(tmp_path / "adapter") == ["first"] and left(tmp_path) == ["adapter"]


def test_many_writers_of_one_name(tmp_path: Path) -> None:
    """Each takes the others' temporary names for what they are, and none fails."""
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(40):
                files.write_atomically(tmp_path / "ledger.json", f"{number}" * 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and left(tmp_path) == ["ledger.json"]
    assert len(set((tmp_path / "ledger.json").read_text())) == 1


def test_a_temporary_name_found_before_it_is_locked_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process holds the lock, and removes it a moment later."""
    real, taken = fcntl.flock, []

    def flock(handle: int, operation: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            raise BlockingIOError
        real(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.atomic_file(tmp_path / "run.json") as file:
        for path in taken:
            path.unlink()
        file.write(b"whole")
    assert (tmp_path / "run.json").read_text() == "whole" and len(taken) == 1


def test_lines_are_added_to_regular_files_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    files.append(path, "a\n")
    files.append(path, "é\n")
    assert path.read_text() == "a\né\n"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        with pytest.raises((RedpenError, IsADirectoryError)):
            files.append(tmp_path / name, "x")
        with pytest.raises((RedpenError, IsADirectoryError)):
            files.open_lock(tmp_path / name)


def test_output_goes_into_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    files.write_output(tmp_path / "pipe", b"page")
    reader.join()
    files.write_output(Path("/dev/null"), b"page")
    assert found == [b"page"] and (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    monkeypatch.setattr(files, "_PIPE_TRIES", 2)
    with pytest.raises(RedpenError, match="pipe that no process reads"):
        files.write_output(tmp_path / "pipe", b"page")


def test_long_names_have_temporary_ones(tmp_path: Path) -> None:
    for name in ("x" * 250, "é" * 120):
        files.write_atomically(tmp_path / name, "x")
        assert left(tmp_path) == [name]
        (tmp_path / name).unlink()


# ------------------------------------------------------------------------------------------------------------ reading


class Model(BaseModel):
    model_config = ConfigDict(strict=True)
    step: int


@pytest.mark.parametrize("read", [files.read_bytes, files.read_text, files.read_json])
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path, read: object) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b" " * 101)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "directory", "zero", "large", "sparse", "loop", "nul\0", "x" * 300):
        with pytest.raises(ConfigError) as caught:
            read(tmp_path / name, at_most=100, error=ConfigError)  # type: ignore[operator]
        assert name.strip("\0") in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")  # type: ignore[operator]
    (tmp_path / "run.json").write_text('{"step": 1}')
    (tmp_path / "link").symlink_to("run.json")
    assert read(tmp_path / "link")  # type: ignore[operator]
    with pytest.raises(RedpenError, match="symbolic link"):
        read(tmp_path / "link", follow_links=False)  # type: ignore[operator]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[1]", b"3", b'"text"', b"null", b"true", b"{", b"\xff\xfe", b"[" * 100_000, b'{"step": ' + b"9" * 5000,
        b'{"a": ' * 5000,
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.json: ") as caught:
        files.read_json(tmp_path / "run.json", error=ConfigError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    ["{}", '{"step": "3"}', '{"step": 1.5}', '{"step": null}', '{"step": [1]}', f'{{"step": "{"x" * 9999}"}}'],
)
def test_a_wrong_field_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json: step: ") as caught:
        files.parse_model(files.read_json(tmp_path / "run.json"), Model, "run.json", error=ConfigError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b'\xef\xbb\xbf{"step": 3}')
    assert files.read_json(tmp_path / "run.json") == {"step": 3}


# ----------------------------------------------------------------------------------------------------------- the code

#: Modules that open or remove files by other means than `pipeline.files`, and what they do with them.
ELSEWHERE = {
    "cli/streams.py": "opens the standard streams",
    "config/recipe.py": "reads a shipped recipe",
    "continual.py": "copies into a directory that replaces another",
    "distill.py": "copies into a directory that replaces another, and removes an adapter",
    "engines/vllm.py": "silences a standard stream",
    "environment.py": "reads the checkout's own pyproject.toml",
    "files.py": "is that module",
    "interchange/importing.py": "streams a table",
    "models/_transformers_compat.py": "removes a generated file from a directory that it fills",
    "models/identity.py": "streams weights",
    "models/lora.py": "fills a directory that replaces another",
    "rounds/known_manifests.py": "looks at open files, and removes its oldest entries",
    "runs/checkpoint.py": "fills a directory that replaces another, and removes old checkpoints",
    "runs/lock.py": "locks a directory",
    "streaming/weights.py": "reads tensors by position",
    "text/environment_worker.py": "opens the standard streams",
    "text/math_worker.py": "opens a standard stream",
    "text/prompts.py": "streams prompts",
    "text/template_worker.py": "opens a standard stream",
}
METHODS = {"read_text", "write_text", "read_bytes", "write_bytes", "unlink", "rename", "replace", "touch", "rmdir"}
FUNCTIONS = {
    *("open", "io.open", "os.open", "os.fdopen", "os.remove", "os.unlink", "os.rename", "os.replace", "os.truncate"),
    *("json.load", "tomllib.load", "shutil.rmtree", "shutil.move", "shutil.copy", "shutil.copytree"),
    *("tempfile.mkdtemp", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"),
}


def opened(tree: ast.AST) -> Iterator[str]:
    """Calls that open, replace or remove a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, method = called.rpartition(".")
        if called in FUNCTIONS:
            yield called
        elif isinstance(node.func, ast.Attribute) and method in METHODS:
            # str.replace has two arguments, Path.replace one; dataclasses.replace has keywords
            if method != "replace" or (len(node.args) == 1 and not node.keywords):
                yield called
        elif method == "open" and owner and isinstance(node.args[0] if node.args else None, ast.Constant):
            yield called  # Path.open("rb")


def test_files_are_opened_by_one_module() -> None:
    found = {}
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        name = path.relative_to(ROOT / "pipeline").as_posix()
        if calls := [call for call in opened(ast.parse(path.read_text())) if not call.startswith("files.")]:
            found[name] = calls
    assert {name: calls for name, calls in found.items() if name not in ELSEWHERE} == {}
    assert ELSEWHERE.keys() <= found.keys(), "what is no exception any more is not listed"


#: Modules that parse JSON themselves, and of what; all other JSON goes through `files.parse_json`.
JSON_ELSEWHERE = {
    "files.py": "is that module",
    "interchange/restoring.py": "an export's metadata; whatever is wrong with them, it is no export",
    "models/lora.py": "an adapter's settings that peft has just written",
    "runs/lock.py": "a lock file of 1,000 bytes; whatever is wrong with it, its owner is unknown",
    "streaming/weights.py": "a header within its file; whatever is wrong with it, the checkpoint is damaged",
    "teachers/alignment.py": "what the tokenizers library writes",
    "text/answers.py": "a response, whether it is JSON",
    "text/environment_worker.py": "questions of redpen",
    "text/math_verify.py": "answers of its worker",
    "text/math_worker.py": "questions of redpen",
    "text/prompts.py": "a line of a file, with its keys once",
    "text/records.py": "a column that holds JSON, with its keys once",
    "text/rendering.py": "arguments of a call, with their keys once",
    "text/template_worker.py": "questions of redpen",
    "text/token_length.py": "what the tokenizers library writes",
    "text/worker.py": "answers of redpen's workers",
}


def test_json_from_outside_is_parsed_by_one_module() -> None:
    found = set()
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.rpartition(".")[2] in ("loads", "JSONDecoder", "raw_decode") and called.startswith("json"):
                found.add(path.relative_to(ROOT / "pipeline").as_posix())
            elif called.endswith(".json") and isinstance(node, ast.Call) and not node.args:
                found.add(path.relative_to(ROOT / "pipeline").as_posix())  # that of a response, of any size
    assert found == JSON_ELSEWHERE.keys()
