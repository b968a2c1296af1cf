"""Tokenizers of a cache's models: what may be done with a name that someone else wrote."""

from __future__ import annotations

import json
import os
import pty
import sys
from pathlib import Path

from helpers import preloaded


def print_tokenizer(terminal: str, model: str) -> None:
    """What is found, with a terminal as standard input."""
    from pipeline.text.detokenize import local_tokenizer

    os.dup2(os.open(terminal, os.O_RDWR), 0)
    sys.stdin = open(0)  # noqa: SIM115
    print("found", local_tokenizer(model, None))


def test_code_beside_a_tokenizer_is_neither_run_nor_offered(tmp_path: Path) -> None:
    """On a terminal transformers would ask whether to run it."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Tokenizer: pass\n")
    auto = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None], "AutoConfig": "evil.Tokenizer"}}
    (model / "tokenizer_config.json").write_text(json.dumps(auto | {"tokenizer_class": "Tokenizer"}))
    (model / "config.json").write_text(json.dumps(auto | {"model_type": "evil"}))
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 3)
    try:
        out, err = preloaded.Process(print_tokenizer, os.ttyname(theirs), str(model)).communicate(timeout=120)
    finally:
        os.close(ours)
        os.close(theirs)
    assert out == "found None\n", out + err
    assert "[y/N]" not in out + err and not ran.exists()
