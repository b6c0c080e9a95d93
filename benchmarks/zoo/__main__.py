"""python -m benchmarks.zoo"""

from benchmarks.zoo.cli import main

raise SystemExit(main())
