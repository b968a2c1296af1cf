"""`python -m pipeline.toy`: regenerate the toy assets."""

import argparse
import os
from pathlib import Path

from pipeline.toy import ASSETS

if __name__ == "__main__":
    # Before torch is imported: threads that wait must not spin, or other work on the cores makes this take forever.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pipeline.toy.build import build, build_company, build_reader

    parser = argparse.ArgumentParser(prog="python -m pipeline.toy", description="Regenerate the toy assets.")
    parser.add_argument(
        "world", nargs="?", choices=["sums", "reader", "company"], default="sums", help="which (default: sums)"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="where to (default: over the shipped ones)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and prompts (default: 0)")
    arguments = parser.parse_args()
    if arguments.world == "company":
        build_company(arguments.out / "company", arguments.seed)
    elif arguments.world == "reader":
        build_reader(arguments.out / "reader", arguments.seed)
    else:
        build(arguments.out, arguments.seed)
