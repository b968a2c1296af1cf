"""Credentials in settings and arguments: refused on input, masked on output.

Settings and arguments end up in files that are shared: recipes, manifests of caches, pages, model cards, trackers. So
a URL that contains a credential is refused, with the environment variable to use instead. Credentials in older files
are masked wherever they are shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import ConfigError

MASK = "***"

_NAMES = (
    r"[\w.-]*key(?:[-_]?id)?|[\w-]*token|auth|authorization|[\w-]*(?:password|passwd|passphrase|pwd)|pass|"
    r"[\w-]*secret|sig|[\w-]*signature|[\w-]*credentials?|jwt|bearer"
)
# Also as URLs encode them.
_AT, _IS, _BEFORE = r"(?:@|%40)", r"(?:=|%3d)", r"(?:[?&;#]|%3f|%26|%3b|%23)"
_END = r"[^\s&;#\"'<>\\]{1,4096}"
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # user and password of a URL; a password may contain @, and / unless a port precedes it
        rf"(?i)(?P<before>\b[a-z][a-z0-9+.-]{{0,30}}://)(?P<secret>[^\s/?#\"'<>\\]{{1,4096}})(?={_AT}[^\s@])",
        r"(?i)(?P<before>\b[a-z][a-z0-9+.-]{0,30}:/{1,2})"
        rf"(?P<secret>[^\s/?#@:\"'<>\\]{{1,200}}:(?!\d{{1,5}}[/?#])[^\s\"'<>\\]{{1,4096}})(?={_AT}[^\s@])",
        rf"(?i)(?P<before>{_BEFORE}(?:{_NAMES}){_IS})(?!\*\*\*)(?P<secret>{_END})",
        r"(?i)(?P<before>\bbearer\s+)(?P<secret>(?=\S*\d)[a-z0-9._~+/-]{12,4096}=*)",
        # keys with a known prefix: Hugging Face, OpenAI and compatible, AWS, GitHub, Google, Slack
        r"(?P<before>(?<![A-Za-z0-9_-]))(?P<secret>hf_[A-Za-z0-9]{30,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
        r"|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
        r"|AIza[\w-]{35}|xox[a-z]-[A-Za-z0-9-]{10,})",
    )
)
# Of a base URL nothing else is of use, and keys are passed there under any name.
_BESIDE_HOST_AND_PATH = re.compile(r"(?i)[@?#]|%40|%3f|%23")
#: Every match of a pattern contains one of these; most lines contain none, so this is tried first.
_SIGNS = re.compile(rf"(?i:{_AT}|{_BEFORE}[\w.-]+{_IS}|bearer)|hf_|sk-|AKIA|ASIA|gh[pousr]_|github_pat_|AIza|xox")
#: Environment variables with credentials; a value shorter than _SHORTEST is taken for a placeholder.
_VARIABLES = (
    *("REDPEN_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
_SHORTEST = 8
_AWS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def contains(text: str, name: str = "") -> bool:
    """Whether `text`, the value of the setting `name`, contains something that looks like a credential."""
    if _is_url(name) and _BESIDE_HOST_AND_PATH.search(text):
        return True
    return bool(_SIGNS.search(text)) and any(pattern.search(text) for pattern in _PATTERNS)


def _is_url(name: str) -> bool:
    """Whether a setting is the base URL of a server: host, port and path, to which redpen appends paths."""
    return name.endswith("url")


def mask(text: str) -> str:
    """`text` with `***` for what looks like a credential or is one of the environment's."""
    for name in _VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST and value in text:
            text = text.replace(value, MASK)
    if _SIGNS.search(text):
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\g<before>{MASK}", text)
    return text


def masked(value: Any) -> Any:
    """A JSON or TOML value with every text in it masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {masked(key): masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return value


def refuse(text: str, name: str) -> None:
    """Raise `ConfigError` if `text`, the value of the setting or argument `name`, contains a credential."""
    if contains(text, name):
        raise ConfigError(f"{name}: {message(text, name)}")


def message(text: str, name: str) -> str:
    """The problem with a setting or argument that contains a credential, without the credential."""
    what = "holds a user, a query or a fragment" if _is_url(name) else "holds what looks like a credential"
    return (
        f"{what}, which would be stored and shown with the settings; remove it and set the environment "
        f"variable {_variable(text, name)}"
    )


def in_settings(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and text of every setting that contains a credential."""
    if isinstance(data, str):
        if contains(data, path):
            yield path, data
    elif isinstance(data, dict):
        for key, value in data.items():
            if isinstance(key, str) and contains(key):
                yield f"{path}.{MASK}".lstrip("."), key
            yield from in_settings(value, f"{path}.{mask(str(key))}".lstrip("."))
    elif isinstance(data, list | tuple):
        for item in data:
            named = item.get("name") if isinstance(item, dict) and len(data) > 1 else None
            yield from in_settings(item, f"{path}.{mask(named)}" if isinstance(named, str) else path)


def in_arguments(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield every command-line argument that contains a credential, after its option or the setting it overrides."""
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if not (equals and option.startswith("-")):
            option, value = args[place - 1] if place and args[place - 1].startswith("-") else "", arg
        if option == "--set" and "=" in value and not contains(value.partition("=")[0]):
            setting, _, value = value.partition("=")
            option = f"--set {setting.strip()}"
        if contains(value, option) or contains(arg):
            is_name = re.fullmatch(r"--?[A-Za-z][\w-]*( [\w.-]+)?", option)
            yield (option if is_name and not contains(option) else "an argument"), arg


def _variable(text: str, name: str) -> str:
    lowered = text.lower()
    if lowered.startswith("s3:") or "s3://" in lowered or "x-amz-" in lowered or "AKIA" in text:
        return _AWS
    if "hf_" in text or "huggingface.co" in lowered or name.endswith((".model", ".adapter", ".revision")):
        return "HF_TOKEN"
    if "track" in name:
        return "WANDB_API_KEY (trackio: HF_TOKEN)"
    if name.endswith(("prompts.path", "eval.path", "--prompts", "--teacher", "--base")):
        return "HF_TOKEN"
    if "--cache" in name:
        return _AWS
    return "REDPEN_API_KEY"
