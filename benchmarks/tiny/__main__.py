"""python -m benchmarks.tiny demo | full | pair."""

from benchmarks.tiny.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
