"""Reading and writing files, for everything outside the Zarr stores.

Writes are atomic: after a kill there is the old content or the new one. Temporary names are new, exclusive and
unpredictable, and a symbolic link in the place of one of our files is refused, so that a run directory or a cache
from somebody else cannot redirect a write. Reads are bounded, and only ever of regular files.

Everything in `pipeline` that opens a file goes through here; tests/test_files.py walks the code for exceptions.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pipeline.errors import RedpenError

if TYPE_CHECKING:
    from pydantic import BaseModel

    _M = TypeVar("_M", bound=BaseModel)

#: End of the name of a temporary file or directory.
PARTIAL = ".partial"
#: The most that a file of settings, metadata or results may hold, in bytes; above it a file is not what it should be.
AT_MOST = 2**26
_SHOWN = 200
_RANDOM_BYTES = 8
_REPLACED = ".replaced"


# ------------------------------------------------------------------------------------------------------------ writing


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """An empty directory to fill, which replaces `path` once the body has succeeded and all of it is on disk.

    What was at `path` stays until then. Raises `RedpenError` if `path` is a symbolic link.
    """
    refuse_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial, handle = _claim(path, is_directory=True)
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666  # by the umask; safetensors makes its files readable by the owner alone
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
    """A new file to write to, which replaces `path` once the body has succeeded and all of it is on disk.

    What was at `path` stays until then. Raises `RedpenError` if `path` is a symbolic link.
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
    """Replace a file's content at once. Text is written as UTF-8.

    Raises `RedpenError` if `path` is a symbolic link.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def staged_file(path: Path, content: str | bytes) -> Iterator[None]:
    """Write a file beside `path` now, and put it in its place once the body has succeeded.

    Several of these, and of `atomic_directory`, on one `ExitStack` take up all the room that they need before the
    first of them replaces anything. Raises `RedpenError` if `path` is a symbolic link.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
        yield


def remove(path: Path) -> None:
    """Remove a file or directory of ours at once, and what killed processes left of earlier writes to it.

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
    """Write what a user has asked for to where they said: a file is replaced at once, a pipe or a device takes it and
    stays what it is. Raises `RedpenError` if `path` is a symbolic link, but for those of the system, as /dev/stdout.
    """
    check_output(path)
    if path.exists() and (_is_of_the_system(path) or not path.is_file()):
        path.write_bytes(content)
    else:
        write_atomically(path, content)


def check_output(path: Path) -> None:
    """What `write_output` would refuse, before there is anything to write."""
    if not _is_of_the_system(path):
        refuse_link(path)


def _is_of_the_system(path: Path) -> bool:
    return path.is_relative_to("/dev") or path.is_relative_to("/proc")


def append(path: Path, text: str) -> None:
    """Add text to a file of ours, which is made if it is missing.

    Raises `RedpenError` if it is a symbolic link, or no regular file.
    """
    handle = _open_ours(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, which is made if it is missing.

    Raises `RedpenError` if it is a symbolic link, or no regular file.
    """
    return _open_ours(path, os.O_RDWR | os.O_CREAT, 0o644)


def _open_ours(path: Path, flags: int, mode: int) -> int:
    refuse_link(path)
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as problem:
        if problem.errno == errno.ENXIO:  # a pipe that nobody reads
            raise RedpenError(f"{path}: expected a regular file made by redpen, found a pipe; remove it") from None
        raise
    if not stat.S_ISREG(found := os.fstat(handle).st_mode):
        os.close(handle)
        raise RedpenError(f"{path}: expected a regular file made by redpen, found {_kind(found)}; remove it")
    return handle


def sync(path: Path) -> None:
    """Have what was written to a file, or renamed in a directory, on the disk itself."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_link(path: Path) -> None:
    """Raise `RedpenError` if a symbolic link is where a file or directory of ours belongs."""
    if path.is_symlink():
        raise RedpenError(
            f"{path}: expected a file or directory made by redpen, found a symbolic link to "
            f"{os.readlink(path)}; remove the link and run the same command again"
        )


def _stem(path: Path) -> str:
    """What temporary names for `path` begin with: few enough bytes for any file system."""
    return f".{path.name.encode(errors='surrogateescape')[:150].decode(errors='ignore')}."


def _temporary(path: Path, end: str = PARTIAL) -> Path:
    return path.with_name(f"{_stem(path)}{secrets.token_hex(_RANDOM_BYTES)}{end}")


def _claim(path: Path, is_directory: bool) -> tuple[Path, int]:
    """A new temporary file or directory beside `path`, and a descriptor that marks it as in use while it is open."""
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
            if is_directory:  # taken for abandoned
                continue
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = partial.exists()
        except BlockingIOError:
            is_ours = False
        except OSError:  # a file system without locks: then nothing is ever taken for abandoned
            is_ours = True
        if is_ours:
            return partial, handle
        os.close(handle)  # another process found it before it was locked, and removes it


def _move(partial: Path, path: Path) -> None:
    """Put a directory in the place of what is at `path`, at once where the system can exchange names."""
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
    """Whether two names now stand for each other's content: Linux's renameat2, on most local file systems."""
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
    """Remove what killed processes left of earlier writes to `path`; what a live process writes now is locked.

    Content that a kill caught between two names gets its own back.
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
        at_most: bytes; a larger file is refused before it is read.
        error: class of what is raised.
        follow_links: False for files of our own, which are never links.

    Raises:
        FileNotFoundError: there is no such file.
        RedpenError: of class `error`; the file is no regular file, is too large, or cannot be read.
    """
    if not follow_links and path.is_symlink():
        target = os.readlink(path)
        raise error(f"{path}: expected a file made by redpen, found a symbolic link to {target}; remove it")
    no_follow = 0 if follow_links else os.O_NOFOLLOW
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | no_follow)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path}: expected a regular file, found {_kind(found.st_mode)}")
            if found.st_size > at_most:
                raise error(f"{path}: expected at most {at_most:,} bytes, found {found.st_size:,}")
            with open(handle, "rb", closefd=False) as file:
                content = file.read(at_most + 1)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except ValueError:  # what Python makes of a NUL in a path, which no file's has
        if "\0" not in os.fspath(path):
            raise
        raise error(f"{os.fspath(path)!r}: expected a path, found one with a NUL in it") from None
    if len(content) > at_most:  # it grew, or its file system does not know its size
        raise error(f"{path}: expected at most {at_most:,} bytes, found more")
    return content


def read_text(
    path: Path, *, at_most: int = AT_MOST, error: type[RedpenError] = RedpenError, follow_links: bool = True
) -> str:
    """A UTF-8 file's text, without a byte order mark. Arguments and errors as for `read_bytes`."""
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
    """The JSON object in a file. Arguments and errors as for `read_bytes`."""
    text = read_text(path, at_most=at_most, error=error, follow_links=follow_links)
    value = parse_json(text, str(path), error=error)
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {_json_type(value)}")
    return value


def read_model(
    path: Path,
    model: type[_M],
    *,
    at_most: int = AT_MOST,
    error: type[RedpenError] = RedpenError,
    follow_links: bool = True,
) -> _M:
    """The JSON object in a file as a pydantic model. Arguments and errors as for `read_bytes`."""
    found = read_json(path, at_most=at_most, error=error, follow_links=follow_links)
    return parse_model(found, model, str(path), error=error)


def file_digest(path: Path, *, error: type[RedpenError] = RedpenError) -> str:
    """blake2b of a file of ours, of any size, as 32 hexadecimal digits. No link; errors as for `read_bytes`."""
    if path.is_symlink():
        raise error(
            f"{path}: expected a file made by redpen, found a symbolic link to {os.readlink(path)}; remove it"
        )
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise error(f"{path}: expected a regular file, found {_kind(mode)}")
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None


def parse_json(text: str | bytes, name: str, *, error: type[RedpenError] = RedpenError) -> Any:
    """A JSON value from outside. Raises `error`, naming its source `name`, whatever is wrong with the text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{name}: not valid JSON (nested too deeply)") from None
    except ValueError as problem:  # also bytes that are no text, and integers of thousands of digits
        raise error(f"{name}: not valid JSON ({_clipped(str(problem))})") from None


def parse_model(value: Any, model: type[_M], name: str, *, error: type[RedpenError] = RedpenError) -> _M:
    """A value from outside as a pydantic model. Raises `error` that names the source `name` and the first field that
    is wrong, with what was expected and what was found.
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
