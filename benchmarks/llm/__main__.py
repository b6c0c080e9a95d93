"""python -m benchmarks.llm paper | small | tiny."""

from benchmarks.frame.driver import Driver, main
from benchmarks.llm.plots import plots
from benchmarks.llm.settings import Settings, check
from benchmarks.llm.stages import stages
from benchmarks.llm.tables import tables

DRIVER = Driver(
    name="llm", title="benchmarks/llm", settings=Settings, stages=stages, tables=tables, html=plots, prepare=check
)

if __name__ == "__main__":
    raise SystemExit(main(DRIVER))
