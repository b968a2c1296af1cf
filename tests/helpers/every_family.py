"""What redpen makes of every architecture that transformers registers for text, each with a tiny configuration.

    cd tests && python -m helpers.every_family [MODEL_TYPE ...]

A long table on stdout, for developers: nothing in it may be "wrong" or a traceback. What is of interest becomes a row
of `helpers.families`, which the tests run.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, logging

from helpers.families import COLUMNS, FAMILIES, Row, try_model
from helpers.tiny_configs import tiny_config


def main(model_types: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    settings = {model_type: given for model_type, given in FAMILIES.values()}
    names = sorted(model_types or {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})
    for model_type in names:
        started, row = time.perf_counter(), Row()
        try:
            config = tiny_config(model_type, **settings.get(model_type, {}))
            with tempfile.TemporaryDirectory() as directory:
                row = try_model(config, Path(directory))
        except Exception as error:  # of a configuration that needs more settings than these, or of a defect
            row.cells = {
                column: f"{type(error).__name__}: {' '.join(str(error).split())[:160]}" for column in COLUMNS[:1]
            }
        cells = [f"{column} {cell}" for column, cell in row.cells.items() if cell != "right"]
        seconds = time.perf_counter() - started
        print(f"{model_type}: {row.layout}, {'; '.join(cells) or 'right'} ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
