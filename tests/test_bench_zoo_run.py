"""benchmarks/zoo: the short preset by the same path as the full one, resumed, and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.zoo.carry import ROWS
from benchmarks.zoo.cli import main
from benchmarks.zoo.driver import plan
from benchmarks.zoo.results import examples_of, read_results, records_of
from benchmarks.zoo.settings import SHORT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def command(folder: Path, *more: str) -> list[str]:
    return ["short", "--cells", f"{folder}/cells", "--shelf", f"{folder}/shelf", "--out", f"{folder}/results", *more]


@pytest.fixture(scope="module")
def in_two_runs(folder: Path) -> dict[Path, int]:
    """The preset, run in two goes; when each cell of the first was written."""
    assert main(command(folder, "--only", "home", "bare", "copy")) == 0
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert main(command(folder)) == 0
    return kept


def test_a_plan_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--plan")) == 0
    assert f"{len(plan(SHORT))} cells to run" in capsys.readouterr().out
    assert not (tmp_path / "cells").exists()


def test_an_unknown_row_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--only", "cpoy")) == 2
    assert "there are home, bare, measures, copy" in " ".join(capsys.readouterr().err.split())


def test_the_short_preset_in_two_runs(
    folder: Path, in_two_runs: dict[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(list((folder / "cells").iterdir())) == len(plan(SHORT))
    assert all(path.stat().st_mtime_ns == when for path, when in in_two_runs.items())  # not run again
    capsys.readouterr()
    assert main(command(folder, "--plan")) == 0
    assert "; 0 cells to run" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("in_two_runs")
def test_its_results_are_whole(folder: Path) -> None:
    results = read_results(folder / "results" / "short.json")
    assert results["cells"] == {"finished": len(plan(SHORT)), "planned": len(plan(SHORT))}
    records, examples = records_of(results), examples_of(results)
    per_part = {"lm": 2 * 1 * 2, "denoiser": 1 * 1 * 1}  # siblings, tasks, spaces
    for part, count in per_part.items():
        assert sum(one.part == part for one in examples) == count
    for record in records:
        assert "refused" in record or 0 <= record["score"] <= 1
        if record["row"] in ROWS and "score" in record and record["sibling"] != "source":
            assert {"trust", "trust_bare", "kept", "seconds"} <= record.keys()
    wider = [record for record in records if (record["sibling"], record["row"]) == ("wider", "copy")]
    assert all("None of the adapter's" in record["refused"] for record in wider)
    assert len(wider) == 2
    assert {len(one.layers) for one in examples if one.part == "lm"} == {6}
    assert [row["learning_rate"] for row in results["learning_rates"]] == [0.01, 0.01]
    page = (folder / "results" / "short.html").read_text(encoding="utf-8")
    assert "Its scores mean nothing" in page
    assert page.count("<svg") >= 3


@pytest.mark.usefixtures("in_two_runs")
def test_what_was_trained_is_taken_from_the_shelf(folder: Path) -> None:
    """Another run from the same shelf, without the cells: the same scores, and nothing trained anew."""
    trained = {path: path.stat().st_mtime_ns for path in (folder / "shelf").rglob("*.safetensors")}
    before = json.loads((folder / "cells" / "lm-seed0-vlight-copy.json").read_text())["content"]["records"]
    only = ["--parts", "lm", "--only", "copy", "--again"]
    assert main(command(folder, *only)) == 0
    after = json.loads((folder / "cells" / "lm-seed0-vlight-copy.json").read_text())["content"]["records"]
    assert [{**one, "seconds": 0} for one in after] == [{**one, "seconds": 0} for one in before]
    assert {path: path.stat().st_mtime_ns for path in (folder / "shelf").rglob("*.safetensors")} == trained
