"""The benchmark of data-free transfers: its tasks run, and its table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.export.checkpoints import make_adapter, make_base
from benchmarks.scale.__main__ import markdown
from benchmarks.scale.tasks import METHODS, plain_read, transfer
from xadapt import registry


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work = tmp_path_factory.mktemp("scale")
    return make_base("tiny", work / "base"), make_adapter("tiny", "parameter", "q,v", 4, work / "adapter")


@pytest.mark.parametrize("method", METHODS)
def test_every_task_runs(method: str, paths: tuple[Path, Path], tmp_path: Path) -> None:
    plain_read(*paths)()
    transfer(method, *paths, tmp_path / "journal")()
    kept = list((tmp_path / "journal").glob("*.safetensors"))
    assert len(kept) == (0 if method == "copy" else 4)
    times = [file.stat().st_mtime_ns for file in kept]
    transfer(method, *paths, tmp_path / "journal")()
    assert [file.stat().st_mtime_ns for file in kept] == times


def test_its_methods_need_no_data() -> None:
    for name, options in METHODS.items():
        assert hasattr(registry.get(name).build(**options), "transfer")


@pytest.mark.parametrize(
    "result", sorted((Path(__file__).parents[1] / "benchmarks/scale/results").glob("*.json")), ids=str
)
def test_the_committed_table_is_of_its_figures(result: Path) -> None:
    figures = json.loads(result.read_text())
    assert markdown(figures["row"]) in result.with_suffix(".md").read_text()
    assert figures["about"]["git"]
