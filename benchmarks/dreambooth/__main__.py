"""python -m benchmarks.dreambooth PRESET: run it, and write its tables."""

import sys

from benchmarks.dreambooth.driver import DRIVER
from benchmarks.frame.driver import main

if __name__ == "__main__":
    sys.exit(main(DRIVER))
