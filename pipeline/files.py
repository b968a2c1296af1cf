"""Reading and writing files, except those inside Zarr stores.

Writes are atomic: a killed process leaves the old content or the new. Temporary names are exclusive and
unpredictable, and writing to a symbolic link is refused, so that a run directory or cache from somebody else cannot
redirect a write. Only regular files are read, up to a size limit.

All of `pipeline` opens files through this module; tests/test_files.py lists the exceptions.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pipeline.errors import RedpenError

if TYPE_CHECKING:
    from pydantic import BaseModel

    _M = TypeVar("_M", bound=BaseModel)

#: Suffix of temporary files and directories.
PARTIAL = ".partial"
#: Default size limit, in bytes, of files with settings, metadata or results.
AT_MOST = 2**26
_SHOWN = 200
_PIPE_TRIES = 60
_RANDOM_BYTES = 8
_REPLACED = ".replaced"


# ------------------------------------------------------------------------------------------------------------ writing


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces `path` when the body succeeds, after everything in it is synced to disk.

    Until then `path` keeps its content. Raises `RedpenError` if `path` is a symbolic link.
    """
    refuse_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial, handle = _claim(path, is_directory=True)
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666  # follow the umask; safetensors creates files with mode 600
        for file in sorted(partial.rglob("*")):
            if file.is_symlink():
                continue
            if file.is_file():
                file.chmod(mode)
            sync(file)
        sync(partial)
        _move(partial, path)
        sync(path.parent)
    except BaseException:
        _remove(partial)
        raise
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces `path` when the body succeeds, after its content is synced to disk.

    Until then `path` keeps its content. Raises `RedpenError` if `path` is a symbolic link.
    """
    refuse_link(path)
    _remove_abandoned(path)
    partial, handle = _claim(path, is_directory=False)
    try:
        with open(handle, "wb", closefd=False) as file:
            yield file
        os.fsync(handle)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content atomically. Text is written as UTF-8.

    Raises `RedpenError` if `path` is a symbolic link.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def staged_file(path: Path, content: str | bytes) -> Iterator[None]:
    """Write a temporary file now, and move it to `path` when the body succeeds.

    Several of these and of `atomic_directory` on one `ExitStack` use all their disk space before the first of them
    replaces anything. Raises `RedpenError` if `path` is a symbolic link.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
        yield


def remove(path: Path) -> None:
    """Remove a file or directory atomically, and temporary files that killed processes left beside it.

    Raises `RedpenError` if `path` is a symbolic link.
    """
    refuse_link(path)
    _remove_abandoned(path)
    if path.is_dir():
        old = _temporary(path)
        path.rename(old)
        _remove(old)
    else:
        path.unlink(missing_ok=True)


def write_output(path: Path, content: bytes) -> None:
    """Write to a path that the user chose: replace a file atomically, write into a pipe or device.

    Raises `RedpenError` at a symbolic link, except in /dev and /proc (e.g. /dev/stdout), or a pipe without a reader.
    """
    check_output(path)
    if path.is_fifo() and not _is_of_the_system(path):
        with open(_open_pipe(path), "wb") as pipe:
            pipe.write(content)
    elif path.exists() and (_is_of_the_system(path) or not path.is_file()):
        path.write_bytes(content)
    else:
        write_atomically(path, content)


def _open_pipe(path: Path) -> int:
    """A descriptor to write into a pipe that a process reads; an ordinary open would wait for ever."""
    for _ in range(_PIPE_TRIES):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(handle, True)
            return handle
        time.sleep(0.05)
    raise RedpenError(f"{path}: a pipe that no process reads; start its reader first, or choose another file")


def check_output(path: Path, replaces: bytes = b"", what: str = "") -> None:
    """Raise now what `write_output` would raise later, or if it would replace a file that does not begin with
    `replaces`, as every `what` does.
    """
    if _is_of_the_system(path):
        return
    refuse_link(path)
    if replaces and path.is_file():
        with open(path, "rb") as file:
            found = file.read(len(replaces))
        if found and found != replaces:
            raise RedpenError(f"{path}: exists and is not {what}; choose another file, or remove it first")


def _is_of_the_system(path: Path) -> bool:
    return path.is_relative_to("/dev") or path.is_relative_to("/proc")


def append(path: Path, text: str) -> None:
    """Append text to a file; create it if it does not exist.

    Raises `RedpenError` if it is a symbolic link or not a regular file.
    """
    handle = _open_ours(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)


def open_lock(path: Path) -> int:
    """Open a lock file and return its descriptor; create it if it does not exist.

    Raises `RedpenError` if it is a symbolic link or not a regular file.
    """
    return _open_ours(path, os.O_RDWR | os.O_CREAT, 0o644)


def _open_ours(path: Path, flags: int, mode: int) -> int:
    refuse_link(path)
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as problem:
        if problem.errno == errno.ENXIO:  # a pipe without a reader
            raise RedpenError(f"{path}: expected a regular file made by redpen, found a pipe; remove it") from None
        raise
    if not stat.S_ISREG(found := os.fstat(handle).st_mode):
        os.close(handle)
        raise RedpenError(f"{path}: expected a regular file made by redpen, found {_kind(found)}; remove it")
    return handle


def sync(path: Path) -> None:
    """Sync a file's content, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_link(path: Path) -> None:
    """Raise `RedpenError` if `path`, where redpen writes a file or directory, is a symbolic link."""
    if path.is_symlink():
        raise RedpenError(
            f"{path}: expected a file or directory made by redpen, found a symbolic link to "
            f"{os.readlink(path)}; remove the link and run the same command again"
        )


def _stem(path: Path) -> str:
    """Prefix of temporary names for `path`, short enough for any file system."""
    return f".{path.name.encode(errors='surrogateescape')[:150].decode(errors='ignore')}."


def _temporary(path: Path, end: str = PARTIAL) -> Path:
    return path.with_name(f"{_stem(path)}{secrets.token_hex(_RANDOM_BYTES)}{end}")


def _claim(path: Path, is_directory: bool) -> tuple[Path, int]:
    """Create a temporary file or directory beside `path`; the returned descriptor's lock marks it as in use."""
    while True:
        partial = _temporary(path)
        if is_directory:
            partial.mkdir()
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = os.open(partial, flags, 0o666)
        except FileNotFoundError:
            if is_directory:  # another process removed it as abandoned
                continue
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = partial.exists()
        except BlockingIOError:
            is_ours = False
        except OSError:  # no locks on this file system: nothing is ever removed as abandoned
            is_ours = True
        if is_ours:
            return partial, handle
        os.close(handle)  # another process found it before it was locked and removes it


def _move(partial: Path, path: Path) -> None:
    """Replace `path` by a directory, atomically if the file system can exchange names."""
    if not path.exists():
        partial.rename(path)
    elif _exchange(partial, path):
        _remove(partial)
    else:
        old = _temporary(path, _REPLACED)
        path.rename(old)
        partial.rename(path)
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names by renameat2 (Linux, most local file systems) and return whether that succeeded."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files that killed processes left beside `path`; those of live processes are locked.

    Content that was moved aside and not yet replaced is moved back.
    """
    name = re.compile(re.escape(_stem(path)) + f"[0-9a-f]{{{2 * _RANDOM_BYTES}}}({PARTIAL}|{_REPLACED})")
    try:
        entries = [path.with_name(entry) for entry in os.listdir(path.parent) if name.fullmatch(entry)]
    except OSError:
        return
    for found in sorted(entries, key=lambda entry: entry.name.endswith(PARTIAL)):
        if found.name.endswith(_REPLACED) and not path.exists() and not found.is_symlink():
            with contextlib.suppress(OSError):
                found.rename(path)
            continue
        try:
            handle = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(found)
        except OSError:
            continue
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------------------------ reading


def read_bytes(
    path: Path, *, at_most: int = AT_MOST, error: type[RedpenError] = RedpenError, follow_links: bool = True
) -> bytes:
    """A regular file's content.

    Args:
        at_most: size limit in bytes; a larger file is refused before it is read.
        error: class of the error to raise.
        follow_links: False for files that redpen wrote, which are never links.

    Raises:
        FileNotFoundError: the file does not exist.
        RedpenError: of class `error`; not a regular file, too large, or unreadable.
    """
    with _open_regular(path, error, follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most:
            raise error(f"{path}: expected at most {at_most:,} bytes, found {size:,}")
        content = file.read(at_most + 1)
    if len(content) > at_most:  # it grew, or the file system reports no size
        raise error(f"{path}: expected at most {at_most:,} bytes, found more")
    return content


@contextmanager
def _open_regular(path: Path, error: type[RedpenError], follow_links: bool) -> Iterator[BufferedReader]:
    """A regular file open for reading. Raises `FileNotFoundError`, or `error` for any other problem."""
    if not follow_links and path.is_symlink():
        target = os.readlink(path)
        raise error(f"{path}: expected a file made by redpen, found a symbolic link to {target}; remove it")
    no_follow = 0 if follow_links else os.O_NOFOLLOW
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | no_follow)
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                raise error(f"{path}: expected a regular file, found {_kind(mode)}")
            with open(handle, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except ValueError:  # raised for a NUL in a path
        if "\0" not in os.fspath(path):
            raise
        raise error(f"{os.fspath(path)!r}: expected a path, found one with a NUL in it") from None


def read_text(
    path: Path, *, at_most: int = AT_MOST, error: type[RedpenError] = RedpenError, follow_links: bool = True
) -> str:
    """Read a UTF-8 file, without its byte order mark. Arguments and errors as for `read_bytes`."""
    content = read_bytes(path, at_most=at_most, error=error, follow_links=follow_links)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"{path}: expected UTF-8 text, found byte {problem.object[problem.start]:#04x} at {problem.start}"
        ) from None


def read_json(
    path: Path, *, at_most: int = AT_MOST, error: type[RedpenError] = RedpenError, follow_links: bool = True
) -> dict[str, Any]:
    """Read a JSON object. Arguments and errors as for `read_bytes`."""
    text = read_text(path, at_most=at_most, error=error, follow_links=follow_links)
    value = parse_json(text, str(path), error=error)
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {_json_type(value)}")
    return value


def file_digest(path: Path, *, error: type[RedpenError] = RedpenError) -> str:
    """blake2b of a file of any size, as 32 hexadecimal digits. Links are refused; errors as for `read_bytes`."""
    with _open_regular(path, error, follow_links=False) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def parse_json(text: str | bytes, name: str, *, error: type[RedpenError] = RedpenError) -> Any:
    """Parse untrusted JSON. Raises `error`, naming the source `name`, if it is invalid."""
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{name}: not valid JSON (nested too deeply)") from None
    except ValueError as problem:  # also bytes that are not UTF-8, and integers with thousands of digits
        raise error(f"{name}: not valid JSON ({_clipped(str(problem))})") from None


def parse_model(value: Any, model: type[_M], name: str, *, error: type[RedpenError] = RedpenError) -> _M:
    """Validate an untrusted value as a pydantic model.

    Raises `error`, naming the source `name`, the first invalid field, what was expected and what was found.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(value)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", found {_clipped(repr(first['input']))}"
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise error(f"{name}: {_clipped(field) + ': ' if field else ''}{message}{found}") from None
    except RecursionError:
        raise error(f"{name}: nested too deeply") from None


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
