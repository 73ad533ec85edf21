"""`python -m mlp_backprop`: the same program as the console script `mlp-backprop`."""

import sys

from mlp_backprop.programs.cli import main

if __name__ == "__main__":
    sys.exit(main())
