"""Tries every family, and every other type that transformers registers for text, and writes docs/models.md.

    cd tests && python -m helpers.every_family LOG [FAMILY or MODEL_TYPE ...]

LOG gets a line of JSON for each, and what has one there is not tried again. The page is written from it: the table of
`helpers.families.FAMILIES`, and the types besides. Nothing there may be "wrong" or fail.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, logging

from helpers.families import COLUMNS, FAMILIES, PAGE, RIGHT, Row, auto_class, config_of, line, rows_of_page, try_model
from helpers.tiny_configs import tiny_config

#: Of types that are no family of the table: what their configurations need besides tiny sizes.
SETTINGS: dict[str, dict[str, Any]] = {
    "diffllama": {"attention_dropout": 0.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hrm_text": {"num_layers_per_stack": None},  # made from num_hidden_layers
    "longcat_flash": {"head_dim": 4},
    "qwen4_exp_text": FAMILIES["Qwen4-Exp"][1],
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "zaya": {"num_experts_per_tok": 1},
}
_MOST_PARAMETERS = 20_000_000


def other_types() -> list[str]:
    """Registered model types that no family has."""
    families = {model_type for model_type, _ in FAMILIES.values()}
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING} - families)


def settings_of(model_type: str) -> dict[str, Any]:
    encodes = hasattr(CONFIG_MAPPING[model_type](), "is_decoder")  # BERT and its kin, unless they are decoders
    return SETTINGS.get(model_type, {}) | ({"is_decoder": True} if encodes else {})


def rows_of(log: Path) -> dict[str, Row]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return {name: Row(**row) for name, row in map(json.loads, lines)}


def check_size(config: PreTrainedConfig) -> None:
    """Refuse a configuration of which only some parts are tiny."""
    with torch.device("meta"):
        count = sum(p.numel() for p in auto_class(config).from_config(config).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"a tiny model of {count:,} parameters")


def run(log: Path, names: list[str]) -> None:
    for name in names:
        if name in rows_of(log):
            continue
        started, row = time.perf_counter(), Row()
        try:
            config = config_of(name) if name in FAMILIES else tiny_config(name, **settings_of(name))
            check_size(config)
            with tempfile.TemporaryDirectory() as directory:
                row = try_model(config, Path(directory))
        except Exception as error:  # of a configuration that needs more settings than these
            reason = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            row.cells = dict.fromkeys(COLUMNS, reason)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, asdict(row)]) + "\n")
        worst = ", ".join(f"{column} {value:.1e}" for column, value in row.worst.items())
        print(f"{line(name, row)}\n    {worst} ({time.perf_counter() - started:.1f} s)", flush=True)


def table(rows: dict[str, Row]) -> list[str]:
    """The table of the families; one that was not tried again keeps its line, and all keep what vLLM does."""
    known = rows_of_page()
    found = [f"| family | layout | {' | '.join(COLUMNS)} | vLLM |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name in FAMILIES:
        before, in_vllm = known.get(name, ("", "not tried"))
        found.append(f"{line(name, rows[name]) if name in rows else before} {in_vllm} |")
    return found


def others(rows: dict[str, Row]) -> list[str]:
    """The types besides, by what became of them."""
    tried = {name: rows[name].cells for name in other_types() if name in rows}
    right = [name for name, cells in tried.items() if set(cells.values()) == {RIGHT}]
    unmade = [name for name, cells in tried.items() if not rows[name].layout and cells["score"].startswith("fails")]
    found = ["", "## Other types that transformers registers", "", f"Right in every column: {', '.join(right)}.", ""]
    for name, cells in tried.items():
        if name not in {*right, *unmade}:
            kinds: dict[str, list[str]] = {}
            for column, cell in cells.items():
                kinds.setdefault(cell, []).append(column)
            parts = [f"{', '.join(columns)}: {cell}" for cell, columns in kinds.items() if cell != RIGHT]
            found.append(f"- {name}: {next(iter(kinds)) if len(kinds) == 1 else '; '.join(parts)}")
    return [*found, "", f"Not tried, for want of a tiny configuration: {', '.join(unmade)}."]


def write_page(log: Path) -> None:
    rows = rows_of(log)
    head = PAGE.read_text(encoding="utf-8").partition("| family |")[0]
    PAGE.write_text(head + "\n".join([*table(rows), *others(rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run(Path(sys.argv[1]), sys.argv[2:] or [*FAMILIES, *other_types()])
    write_page(Path(sys.argv[1]))
