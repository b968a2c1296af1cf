"""What commands print."""

from __future__ import annotations


def one_line(captured: str) -> str:
    """The one line of an error on stderr, warnings aside."""
    lines = [line for line in captured.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("redpen: "), captured
    return lines[0]
