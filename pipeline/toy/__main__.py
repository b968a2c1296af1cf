"""`python -m pipeline.toy`: regenerate the toy assets."""

import argparse
from pathlib import Path

from pipeline.toy import ASSETS
from pipeline.toy.build import build

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipeline.toy", description="Regenerate the toy assets.")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where to (default: over the shipped ones)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and prompts (default: 0)")
    arguments = parser.parse_args()
    build(arguments.out, arguments.seed)
