"""benchmarks/frame: several processes, workers that are killed, Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.frame.driver import Run, engine
from benchmarks.frame.engines import InProcess, LocalProcesses
from benchmarks.frame.files import DiskFull
from benchmarks.frame.store import Store
from benchmarks.frame.worker import Worker, execute
from tests.bench_cells import Dies, Fails, Square


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def two(store: Store) -> Iterator[LocalProcesses]:
    processes = LocalProcesses(store, keep=2, workers=2)
    yield processes
    processes.close()


class TestLocalProcesses:
    def test_all_cells_run_and_a_killed_worker_takes_nothing_along(
        self, store: Store, two: LocalProcesses, tmp_path: Path
    ) -> None:
        cells = [
            Square(number=1.0, notes=str(tmp_path), family="a"),
            Dies(number=2.0, notes=str(tmp_path)),
            Fails(number=3.0),
            Dies(number=4.0, notes=str(tmp_path), always=True),
            Square(number=5.0, notes=str(tmp_path), family="a"),
        ]
        states = {outcome.name: outcome.state for outcome in two.run(cells)}
        assert [states[cell.name] for cell in cells] == ["done", "done", "failed", "failed", "done"]
        assert store.result(cells[1])["square"] == 4.0
        failure = store.failure(cells[3])
        assert failure is not None
        assert "died twice" in failure["message"]
        assert "micro_batch" in failure["advice"]
        again = {outcome.name: outcome.state for outcome in two.run([cells[0], cells[1]])}
        assert set(again.values()) == {"kept"}
        ran = [line.split() for line in (tmp_path / "runs.txt").read_text().splitlines()]
        assert sorted(number for number, _ in ran) == ["1", "2", "5"]

    def test_a_full_disk_reaches_the_one_who_asked(self, two: LocalProcesses) -> None:
        with pytest.raises(DiskFull, match="free some"):
            list(two.run([Fails(number=1.0, error="disk")]))

    def test_the_figures_are_those_of_one_process(self, store: Store, two: LocalProcesses, tmp_path: Path) -> None:
        cells = [Square(number=number) for number in (0.1, 0.7)]
        list(two.run(cells))
        alone = Store(tmp_path / "alone")
        list(InProcess(alone, keep=1).run(cells))
        assert [store.result(cell) for cell in cells] == [alone.result(cell) for cell in cells]


def test_a_cell_whose_worker_was_killed_is_taken_over_by_the_next_run(store: Store, tmp_path: Path) -> None:
    cell = Dies(number=6.0, notes=str(tmp_path))
    hands = LocalProcesses(store, keep=1, workers=1)
    answers = hands.run([cell])
    outcome = next(answers)  # the engine's second worker found the first one's claim and half-written folder
    hands.close()
    assert outcome.state == "done"
    assert execute(cell, Worker(store)).state == "kept"


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="--engine local"):
        engine(Store(Path("nowhere")), Run(workers=2))
    with pytest.raises(ValueError, match="1 or more"):
        engine(Store(Path("nowhere")), Run(workers=0))


class TestRay:
    def test_all_cells_run_and_a_killed_actor_takes_nothing_along(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'xadapt[sweep]'")
        from benchmarks.frame.ray_engine import Ray

        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cells = [
            Square(number=1.0, notes=str(tmp_path), family="a"),
            Dies(number=2.0, notes=str(tmp_path)),
            Fails(number=3.0),
        ]
        actors = Ray(store, keep=2, workers=2)
        try:
            states = {outcome.name: outcome.state for outcome in actors.run(cells)}
            assert [states[cell.name] for cell in cells] == ["done", "done", "failed"]
            assert store.result(cells[1])["square"] == 4.0
            with pytest.raises(DiskFull):
                list(actors.run([Fails(number=9.0, error="disk")]))
        finally:
            actors.close()
            ray.shutdown()

    def test_without_ray_it_says_what_to_install(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ValueError, match=r"pip install 'xadapt\[sweep\]'"):
            engine(store, Run(engine="ray"))
