"""python -m benchmarks.a4a tiny | short | small | paper."""

from benchmarks.a4a.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
