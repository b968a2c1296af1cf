"""The embedded default: a teacher, a student with one misconception, and the sums they disagree on.

The reader is such a student that can use a solution which it is shown.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def asset_path(name: str) -> Path:
    """Where a shipped asset lies: `student`, `teacher`, `prompts/train.jsonl`, ... (`asset_names`)."""
    path = ASSETS / name
    if not path.exists():
        raise FileNotFoundError(f"toy asset: expected one of {', '.join(asset_names())}, got {name!r}")
    return path


def asset_names() -> list[str]:
    """The names `asset_path` knows."""
    company = ("documents", "chats", "prompts", "questions", "formats")
    return [
        *("student", "teacher", "reader", "prompts/train.jsonl", "prompts/heldout.jsonl"),
        *("company", *(f"company/{name}.jsonl" for name in company)),
        *("prompts/questions.jsonl", "prompts/questions-heldout.jsonl"),  # everyday ones, for a real chat model
    ]
