"""benchmarks/frame: cells, the store, claims, sweeps in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import provenance
from benchmarks.frame import claims, files, sweep
from benchmarks.frame.advice import GATED, MEMORY, advice_for
from benchmarks.frame.cell import Cell, canonical, levels, plain
from benchmarks.frame.claims import Claim, Owner, claim
from benchmarks.frame.engines import InProcess
from benchmarks.frame.files import DiskFull, is_disk_full
from benchmarks.frame.progress import Board, duration
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import Finished, changed_versions
from benchmarks.frame.worker import Outcome, Worker, execute
from tests.bench_cells import Fails, Plus, Slow, Square, Together


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def run_all(store: Store, *groups: Sequence[Cell]) -> dict[str, str]:
    """The state of every cell after a sweep in this process."""

    def stages(settings: None, finished: Finished) -> Iterator[Sequence[Cell]]:
        yield from groups

    summary = sweep.sweep(stages, None, store, InProcess(store, keep=2), Board(quiet=True))
    return {name: outcome.state for name, outcome in summary.outcomes.items()}


def runs(folder: Path) -> list[str]:
    path = folder / "runs.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


class TestNames:
    def test_equal_settings_are_one_cell(self) -> None:
        assert Square(number=2).name == Square(number=2.0).name
        assert Square(number=0.1).name == Square(number=0.1, family="").name
        assert Square(number=0.1).name != Square(number=0.2).name

    def test_how_it_is_computed_is_no_part_of_the_name(self) -> None:
        assert Square(number=1.0, notes="here").name == Square(number=1.0).name
        assert Together(processes=2).name == Together().name

    def test_the_name_of_a_known_cell_stays(self) -> None:
        # A change here makes every stored result an orphan.
        assert canonical(Square(number=0.5)) == '{"kind":"square","settings":{"family":"","number":0.5}}'
        assert Square(number=0.5).name == "square-4470a6f0a81bf7b9"

    def test_what_it_needs_is_part_of_the_name(self) -> None:
        assert Plus(of=Square(number=1.0), term=1.0).name != Plus(of=Square(number=2.0), term=1.0).name

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, {1: "a"}, object()])
    def test_settings_without_one_form_are_refused(self, value: Any) -> None:
        with pytest.raises((ValueError, TypeError), match="settings"):
            plain({"a": value} if not isinstance(value, dict) else value)

    def test_levels_put_first_what_is_needed_and_keep_bases_together(self) -> None:
        a, b, c = (Square(number=n, family=f) for n, f in ((1.0, "x"), (2.0, "y"), (3.0, "x")))
        sums = [Plus(of=cell, term=1.0) for cell in (a, b)]
        assert levels([*sums, c, a]) == [[a, c, b], sums]


class TestStore:
    def test_a_finished_cell_is_never_done_again(self, store: Store, tmp_path: Path) -> None:
        cell = Square(number=3.0, notes=str(tmp_path))
        assert run_all(store, [cell]) == {cell.name: "done"}
        assert run_all(store, [cell]) == {cell.name: "kept"}
        assert runs(tmp_path) == ["3"]

    def test_a_record_says_where_it_comes_from(self, store: Store) -> None:
        cell = Square(number=3.0)
        run_all(store, [cell])
        record = store.record(cell)
        assert record is not None
        assert record["settings"] == {"number": 3.0, "notes": "", "family": ""}
        assert record["result"]["square"] == 9.0
        assert {"torch", "xadapt", "python"} <= record["versions"].keys()
        assert {"hardware", "git", "when", "seconds"} <= record.keys()
        assert (store.artifacts(cell) / "square.txt").read_text() == "9.0"

    def test_a_result_of_another_schema_is_not_taken(self, store: Store) -> None:
        cell = Square(number=3.0)
        run_all(store, [cell])
        (path,) = (store.folder / "cells").glob("*.json")
        path.write_text(json.dumps({"schema": 99}))
        with pytest.raises(ValueError, match="schema 1"):
            store.record(cell)
        path.write_text("{")
        with pytest.raises(ValueError, match="no JSON"):
            store.record(cell)

    def test_a_later_stage_looks_at_the_results_of_the_earlier(self, store: Store) -> None:
        grid = [Square(number=n) for n in (3.0, -1.0, 2.0)]

        def stages(settings: None, finished: Finished) -> Iterator[Sequence[Cell]]:
            yield grid
            best = finished.best(grid, lambda result: result["square"])
            assert best is not None
            yield [Plus(of=best, term=1.0)]

        planned = sweep.plan(stages, None, store)
        assert [cell.kind for cell in planned.cells] == ["square", "square", "square", "plus"]
        assert planned.estimate().hours == 1.5
        sweep.sweep(stages, None, store, InProcess(store, keep=1), Board(quiet=True))
        assert store.result(Plus(of=grid[1], term=1.0)) == {"sum": 2.0, "stored": 1.0}
        assert sweep.plan(stages, None, store).kept == 4

    def test_where_all_have_failed_there_is_nothing_to_choose(self, store: Store) -> None:
        grid = [Square(number=1.0), Square(number=2.0)]
        assert Finished(store).best(grid, lambda result: result["square"]) is None
        assert Finished(store, planning=True).best(grid, lambda result: result["square"]) == grid[0]
        run_all(store, grid[1:])
        assert Finished(store).best(grid, lambda result: result["square"]) == grid[1]


class TestFailures:
    def test_a_failed_cell_is_recorded_and_stops_only_what_needs_it(self, store: Store, tmp_path: Path) -> None:
        bad, good = Fails(number=1.0), Square(number=2.0)
        needs_bad = Plus(of=bad, term=1.0)
        states = run_all(store, [bad, good, needs_bad])
        assert states == {bad.name: "failed", good.name: "done", needs_bad.name: "blocked"}
        failure = store.failure(bad)
        assert failure is not None
        assert failure["error"] == "ValueError"
        assert "does not please" in failure["message"]
        assert "in run" in failure["traceback"]
        assert not store.artifacts(bad).exists()
        assert list((store.folder / "artifacts").glob(".*")) == []
        assert list((store.folder / "claims").iterdir()) == []

    def test_it_is_tried_again_and_the_record_goes_when_it_works(self, store: Store) -> None:
        cell = Square(number=1.0)
        store.put_failure(cell, ValueError("once"), "")
        assert run_all(store, [cell]) == {cell.name: "done"}
        assert store.failure(cell) is None

    def test_out_of_memory_comes_with_advice(self, store: Store) -> None:
        cell = Fails(number=1.0, error="memory")
        run_all(store, [cell])
        failure = store.failure(cell)
        assert failure is not None
        assert failure["advice"] == MEMORY
        assert MEMORY in execute(cell, Worker(store)).message, "on the terminal as well"
        assert "micro_batch" in MEMORY
        short = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80000000000 bytes.")
        assert advice_for(short) == MEMORY

    def test_a_gated_model_comes_with_what_to_accept(self) -> None:
        text = (
            "You are trying to access a gated repo. Make sure to have access to it at "
            "https://huggingface.co/meta-llama/Llama-3.2-1B. 401 Client Error."
        )
        assert advice_for(OSError(text)) == GATED.format(name="meta-llama/Llama-3.2-1B")

    def test_a_full_disk_stops_the_run_and_keeps_what_is_finished(self, store: Store) -> None:
        good, bad, later = Square(number=1.0), Fails(number=2.0, error="disk"), Square(number=3.0)
        with pytest.raises(DiskFull, match="free some"):
            run_all(store, [good], [bad], [later])
        assert store.is_finished(good)
        assert not store.is_finished(later)
        assert store.failure(bad) is None
        assert list((store.folder / "claims").iterdir()) == []
        assert run_all(store, [good], [later]) == {good.name: "kept", later.name: "done"}

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk without room, is Linux's")
    def test_a_disk_that_is_full_as_other_writers_say_it(self) -> None:
        from safetensors import SafetensorError

        assert is_disk_full(SafetensorError("I/O error: No space left on device (os error 28)"))
        assert not is_disk_full(SafetensorError("I/O error: Is a directory (os error 21)"))

    def test_a_disk_that_is_full_while_writing(self, tmp_path: Path) -> None:
        path = tmp_path / "result.json"
        path.write_text("old")
        (tmp_path / f".result.json.{os.getpid()}.tmp").symlink_to("/dev/full")
        with pytest.raises(DiskFull):
            files.write_whole(path, "new" * 10_000)
        assert [each.name for each in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"

    def test_ctrl_c_leaves_nothing_half_done(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(self: Square, worker: Worker) -> dict[str, Any]:
            (worker.out / "half.txt").write_text("half")
            raise KeyboardInterrupt

        cell = Square(number=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(Square, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_all(store, [cell])
        assert store.failure(cell) is None
        assert run_all(store, [cell]) == {cell.name: "done"}


class TestClaims:
    def test_one_owner_at_a_time(self, tmp_path: Path) -> None:
        path = tmp_path / "cell.json"
        first = claim(path)
        assert isinstance(first, Claim)
        second = claim(path)
        assert isinstance(second, Owner)
        assert second.pid == os.getpid()
        first.release()
        third = claim(path)
        assert isinstance(third, Claim)
        third.release()
        assert list(tmp_path.iterdir()) == []

    def test_many_at_once_have_one_winner(self, tmp_path: Path) -> None:
        path, won = tmp_path / "cell.json", []
        dead = Owner("dead", "localhost", 1, "0")
        path.write_text(json.dumps(vars(dead) | {"host": claims.socket.gethostname()}))
        start = threading.Barrier(8)

        def one() -> None:
            start.wait()
            if isinstance(found := claim(path), Claim):
                won.append(found)

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(found.still_mine() for found in won) == 1
        for found in won:
            found.release()

    def test_a_dead_owner_on_this_machine_loses_it_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "cell.json"
        code = f"import os, pathlib\nfrom benchmarks.frame.claims import claim\nclaim(pathlib.Path({str(path)!r}))\nos._exit(9)"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
        assert path.exists()
        taken = claim(path)
        assert isinstance(taken, Claim)
        taken.release()

    def test_a_silent_owner_elsewhere_loses_it_after_a_while(self, tmp_path: Path) -> None:
        path = tmp_path / "cell.json"
        path.write_text(json.dumps(vars(Owner("t", "another-machine", 1, "1"))))
        assert isinstance(claim(path), Owner)
        long_ago = time.time() - 2 * claims.COLD
        os.utime(path, (long_ago, long_ago))
        taken = claim(path)
        assert isinstance(taken, Claim)
        taken.release()

    def test_the_heart_beats(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claims, "BEAT", 0.02)
        path = tmp_path / "cell.json"
        held = claim(path)
        assert isinstance(held, Claim)
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0
        held.release()

    def test_who_lost_a_claim_does_not_write(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        cell = Square(number=4.0)
        monkeypatch.setattr(Claim, "still_mine", lambda self: False)
        assert execute(cell, Worker(store)).state == "busy"
        assert not store.is_finished(cell)

    def test_two_runs_share_a_cell(self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sweep, "POLL", 0.05)
        cell = Slow(number=5.0, notes=str(tmp_path))
        first: dict[str, str] = {}
        other = threading.Thread(target=lambda: first.update(run_all(store, [cell])))
        other.start()
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        (tmp_path / "begun").unlink()
        assert execute(cell, Worker(store)).state == "busy"
        threading.Timer(0.2, (tmp_path / "go").write_text, [""]).start()
        assert run_all(store, [cell]) == {cell.name: "kept"}
        other.join()
        assert first == {cell.name: "done"}
        assert runs(tmp_path) == ["5"]


class TestWorker:
    def test_bases_stay_loaded_and_the_oldest_goes(self, store: Store) -> None:
        loaded: list[str] = []

        def load(key: str) -> str:
            loaded.append(key)
            return key

        worker = Worker(store, keep=2)
        for key in ("a", "b", "a", "c", "a", "b"):
            worker.base(key, partial(load, key))
        assert loaded == ["a", "b", "c", "b"]

    def test_several_processes_work_on_one_cell(self, store: Store) -> None:
        cell = Together(processes=2)
        assert run_all(store, [cell]) == {cell.name: "done"}
        assert store.result(cell) == {"processes": 2, "ranks": [0.0, 1.0]}
        assert not store.artifacts(cell).exists()


class TestVersions:
    def test_a_change_is_seen(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        cells = [Square(number=1.0), Square(number=2.0)]
        run_all(store, cells)
        planned = sweep.plan(lambda settings, finished: iter([cells]), None, store)
        assert changed_versions(planned, store) == {}
        real = provenance.versions()
        monkeypatch.setattr(provenance, "versions", lambda: real | {"torch": "9.9"})
        assert changed_versions(planned, store) == {"torch": {str(real["torch"]): 2, "9.9": 1}}

    def test_a_kind_of_cell_names_further_packages(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Square, "packages", ("pytest", "no-such-package"))
        run_all(store, [Square(number=1.0)])
        record = store.record(Square(number=1.0))
        assert record is not None
        assert record["versions"]["pytest"] == pytest.__version__
        assert record["versions"]["no-such-package"] is None

    def test_a_cell_that_was_planned_under_another_name_counts(self, store: Store) -> None:
        said: list[str] = []
        board = Board(quiet=True)
        board.say = said.append  # type: ignore[assignment, method-assign]
        cells = [Square(number=1.0), Plus(of=Square(number=1.0), term=1.0)]
        planned = sweep.plan(lambda settings, finished: iter([cells]), None, store)
        with board.run(planned):
            board.ended(Outcome(Plus(of=Square(number=2.0), term=1.0).name, "done", 1.0), store)
            board.ended(Outcome(cells[0].name, "done", 2.0), store)
        assert [line[:5] for line in said] == ["[1/2]", "[2/2]"]
        assert said[1].endswith("0 s left")

    def test_how_run_is_said_briefly(self) -> None:
        assert [duration(s) for s in (41.6, 200, 18_420)] == ["42 s", "3 min 20 s", "5 h 07 min"]
        assert replace(Square(number=1.0), family="x").base() == "x"
