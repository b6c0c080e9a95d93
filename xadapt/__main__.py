"""`python -m xadapt`."""

import sys

from xadapt.cli import main

sys.exit(main())
