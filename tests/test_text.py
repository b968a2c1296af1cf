"""Tokenizers of a cache's models: what may be done with a name that someone else wrote."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_code_beside_a_tokenizer_is_neither_run_nor_offered(tmp_path: Path) -> None:
    """On a terminal transformers would ask whether to run it."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Tokenizer: pass\n")
    auto = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None], "AutoConfig": "evil.Tokenizer"}}
    (model / "tokenizer_config.json").write_text(json.dumps(auto | {"tokenizer_class": "Tokenizer"}))
    (model / "config.json").write_text(json.dumps(auto | {"model_type": "evil"}))
    code = (
        f"from pipeline.text.detokenize import local_tokenizer; print('found', local_tokenizer({str(model)!r}, None))"
    )
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 3)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=theirs, capture_output=True, text=True, cwd=ROOT, timeout=120
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout == "found None\n", done.stdout + done.stderr
    assert "[y/N]" not in done.stdout + done.stderr and not ran.exists()
