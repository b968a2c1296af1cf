"""`python -m pipeline`: the `redpen` command, e.g. for torchrun."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
