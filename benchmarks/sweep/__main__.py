"""python -m benchmarks.sweep my-sweep.toml [--run.engine ray …]; presets/example.toml shows what a file says."""

from benchmarks.frame.driver import Driver, main
from benchmarks.sweep.settings import Settings, check, stages
from benchmarks.sweep.tables import tables

DRIVER = Driver(name="sweep", title="benchmarks/sweep", settings=Settings, stages=stages, tables=tables, prepare=check)

if __name__ == "__main__":
    raise SystemExit(main(DRIVER))
