"""The driver of the tiny benchmark: interrupted runs, results and their page, the command line."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tiny.charts import png, sheet
from benchmarks.tiny.cli import main
from benchmarks.tiny.driver import plan, run
from benchmarks.tiny.progress import Silent
from benchmarks.tiny.report import html
from benchmarks.tiny.results import Cells, markdown, write_results, write_together
from benchmarks.tiny.settings import ALL, FULL, QV, SHORT, SPACES, LmSettings, Settings
from benchmarks.tiny.summary import Part, findings, table, verdict
from tests.test_bench_tiny_lm import EXACT_ON_QV, FEW_STEPS, RESULTS


class Stops(Silent):
    """Records what runs, and interrupts as Ctrl-C does when `at` begins for the n-th time."""

    def __init__(self, at: str = "", times: int = 1) -> None:
        self.at, self.times, self.seen = at, times, list[str]()

    def track(self, title: str, total: int) -> Iterator[int]:
        self.seen.append(title)
        if self.at and self.seen.count(self.at) == self.times:
            raise KeyboardInterrupt
        yield from range(total)


TWO_SEEDS = Settings(preset="demo", seeds=(0, 1), lm=FEW_STEPS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(TWO_SEEDS, Cells(tmp_path_factory.mktemp("cells")), Silent(), ["lm"])


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, results: dict[str, Any]) -> None:
    cells = Cells(tmp_path / "cells")
    with pytest.raises(KeyboardInterrupt):
        run(TWO_SEEDS, cells, Stops("pre-training the source", times=2), ["lm"])
    assert [path.name for path in cells.folder.iterdir()] == ["lm-seed0.json"]

    again = Stops()
    resumed = run(TWO_SEEDS, cells, again, ["lm"])
    assert again.seen.count("pre-training the source") == 1
    assert resumed["rows"] == results["rows"]


def test_cells_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    Cells(tmp_path).put("lm-seed0", {"steps": (1, 2)}, {"rows": []})
    assert Cells(tmp_path).get("lm-seed0", {"steps": (1, 2)}) == {"rows": []}
    assert Cells(tmp_path).get("lm-seed0", {"steps": (1, 3)}) is None
    assert Cells(tmp_path).get("lm-seed1", {"steps": (1, 2)}) is None


def test_every_sibling_has_every_column(results: dict[str, Any]) -> None:
    found = {(row["part"], row["seed"], row["sibling"], row["adapter"]) for row in results["rows"]}
    assert len(found) == len(results["rows"])
    adapters = ("bare", "copy", "input", "output", "choice", "retrained")
    assert found == {
        (QV.part, seed, sibling, adapter)
        for seed in (0, 1)
        for sibling in ("source", *FEW_STEPS.siblings)
        for adapter in (adapters[:4] if sibling == "source" else adapters)
    }
    assert all(0.0 <= row["score"] <= 1.0 for row in results["rows"])


def test_results_say_where_they_come_from(results: dict[str, Any]) -> None:
    loaded = json.loads(json.dumps(results))
    assert loaded["versions"].keys() >= {"python", "torch", "peft", "transformers", "xadapt"}
    assert loaded["hardware"].keys() >= {"processor", "cores", "threads_used"}
    assert loaded["git"].keys() == {"revision", "modified"}
    assert loaded["settings"]["lm"]["adapt_steps"] == FEW_STEPS.adapt_steps
    assert loaded["seconds"] > 0


def test_learning_rates_are_chosen_on_the_source(tmp_path: Path) -> None:
    settings = replace(TWO_SEEDS, seeds=(0,), lm=replace(FEW_STEPS, learning_rate_grid=(1e-9, 1e-2), adapt_steps=8))
    watch = Stops()
    results = run(settings, Cells(tmp_path), watch, ["lm"])
    assert plan(settings, ["lm"]) == ["lm-learning-rates", "lm-seed0"]
    chosen = {row["space"]: row["learning_rate"] for row in results["learning_rates"] if row["chosen"]}
    assert chosen == dict.fromkeys(SPACES, 1e-2)  # with the other nothing is learned
    assert results["settings"]["lm"]["placements"][0]["learning_rates"] == chosen
    tuning = watch.seen[: watch.seen.index("pre-training the source", 1)]
    assert len(tuning) == 1 + len(SPACES) * 2
    assert all(title.endswith("the source") for title in tuning)


def test_the_page_needs_nothing_but_itself(results: dict[str, Any]) -> None:
    grey = base64.b64encode(bytes(range(128))).decode()
    image = {"part": QV.part, "seed": 0, "adapter": "copy", "sibling": "light", "height": 8, "width": 16, "grey": grey}
    page = html({**results, "images": [image]})
    assert sheet(grey, 8, 16) in page
    for attribute in re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page):
        assert attribute.startswith("data:")
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)


def test_text_in_the_page_is_escaped(results: dict[str, Any]) -> None:
    page = html(
        {**results, "notes": ["<img src=x>"], "parts": [{**results["parts"][0], "headings": {"light": "<b>&"}}]}
    )
    assert "<img src=x>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_results_are_written_together(tmp_path: Path, results: dict[str, Any]) -> None:
    paths = write_results(results, tmp_path / "new", html)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"demo.json", "demo.md", "demo.html"}
    assert json.loads(paths["json"].read_text()) == json.loads(json.dumps(results))
    assert paths["md"].read_text() == markdown(results)


def test_nothing_is_written_if_one_file_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        write_together({tmp_path / "a.json": "{}", tmp_path / "file" / "b.json": "{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def rows(scores: dict[str, list[float]], sibling: str = "rot") -> list[dict[str, Any]]:
    return [
        {"part": "p", "seed": seed, "sibling": sibling, "adapter": adapter, "score": score}
        for adapter, values in scores.items()
        for seed, score in enumerate(values)
    ]


HIGH = Part(name="p", title="t", score="s")


@pytest.mark.parametrize(
    ("scores", "best", "says"),
    [
        ({"bare": [0.0], "copy": [0.9], "input": [0.6], "output": [0.7], "retrained": [1.0]}, {"copy"}, "copy"),
        ({"bare": [0.0], "copy": [0.0], "input": [1.0], "output": [0.0], "retrained": [1.0]}, {"input"}, "feature"),
        ({"bare": [0.0], "copy": [0.90], "input": [0.92], "retrained": [1.0]}, {"input"}, "even"),
        ({"bare": [0.0], "copy": [0.6, 1.0], "input": [0.9, 0.94], "retrained": [1.0, 1.0]}, {"input"}, "even"),
        ({"bare": [0.0], "copy": [0.1], "input": [0.3], "retrained": [1.0]}, {"input"}, "nothing"),
        ({"bare": [0.5], "copy": [0.1], "input": [0.3]}, set(), "feature"),
        ({"bare": [0.0], "copy": [0.0], "input": [0.02], "retrained": [1.0]}, set(), "nothing"),
        ({"bare": [0.0], "copy": [0.0], "input": [0.2], "choice": [1.0], "retrained": [1.0]}, {"choice"}, "feature"),
        ({"bare": [0.0], "copy": [0.801], "choice": [0.799], "input": [0.1]}, {"copy", "choice"}, "copy"),
    ],
)
def test_the_best_training_free_cell_is_marked_whoever_it_is(
    scores: dict[str, list[float]], best: set[str], says: str
) -> None:
    found = table(HIGH, rows(scores))
    assert {adapter for adapter, cell in found.rows["rot"].items() if cell.best} == best
    assert verdict(found, "rot") == says


def test_a_loss_is_better_when_it_is_lower() -> None:
    part = replace(HIGH, higher_is_better=False)
    found = table(part, rows({"bare": [3.0], "copy": [2.0], "input": [2.5]}))
    assert {adapter for adapter, cell in found.rows["rot"].items() if cell.best} == {"copy"}
    assert verdict(found, "rot") == "copy"


def test_a_check_is_measured_by_its_own_source() -> None:
    scores = rows({"bare": [0.1], "copy": [0.1], "tied": [0.2]}, "held out: indep")
    high = rows({"bare": [0.1], "copy": [0.9], "tied": [0.9]}, "held out: source")
    low = rows({"bare": [0.1], "copy": [0.1], "tied": [0.2]}, "held out: source")
    assert verdict(table(HIGH, [*high, *scores]), "held out: indep") == "nothing"
    assert verdict(table(HIGH, [*low, *scores]), "held out: indep") == "feature"


def test_png_is_read_back(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 80), dtype=np.uint8)
    content = base64.b64decode(png(pixels).removeprefix("data:image/png;base64,"))
    assert (np.asarray(image.open(io.BytesIO(content))) == pixels).all()


def test_a_sheet_sets_its_pictures_apart() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.uint8)
    drawn = sheet(base64.b64encode(pixels.tobytes()).decode(), 8, 16, zoom=1, gap=1)
    shown = np.asarray(image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2]))))
    assert shown.shape == (9, 18)
    assert (shown[:8, :8] == pixels[:, :8]).all()
    assert (shown[:8, 9:17] == pixels[:, 8:]).all()


def test_findings_tell_where_the_copy_wins() -> None:
    part = table(HIGH, rows({"bare": [0.0], "copy": [0.9], "input": [0.6], "retrained": [1.0]}))
    assert any("copied LoRA is ahead" in sentence and "0.90" in sentence for sentence in findings(part))


# ---- what is committed


def test_the_demo_uses_the_learning_rates_that_the_full_run_chose() -> None:
    committed = json.loads((RESULTS / "full.json").read_text(encoding="utf-8"))
    chosen: dict[str, dict[str, float]] = {}
    for row in committed["learning_rates"]:
        if row["chosen"] and row["part"] in (QV.part, ALL.part):
            chosen.setdefault(row["part"], {})[row["space"]] = row["learning_rate"]
    assert chosen == {placement.part: dict(placement.learning_rates) for placement in (QV, ALL)}


def test_the_committed_results_are_complete() -> None:
    committed = json.loads((RESULTS / "full.json").read_text(encoding="utf-8"))
    assert len({row["seed"] for row in committed["rows"] if row["part"] == QV.part}) >= 3
    assert (RESULTS / "full.md").read_text(encoding="utf-8") == markdown(committed)
    score = {
        (row["seed"], row["sibling"], row["adapter"]): row["score"]
        for row in committed["rows"]
        if row["part"] == QV.part
    }
    for seed in FULL.seeds:
        for name, space in EXACT_ON_QV:
            assert score[seed, name, space] == pytest.approx(score[seed, "source", space], abs=0.01)


def test_short_is_the_demo_in_fewer_steps() -> None:
    assert SHORT.lm.placements == (QV,)
    assert SHORT.lm.pretrain_steps < LmSettings().pretrain_steps


# ---- the command line


@pytest.mark.parametrize("command", [["demo", "--only", "lm"], ["--short", "--only", "lm"]])
def test_ctrl_c_leaves_no_results(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tiny.cli.Bars", lambda: Stops("pre-training the source"))
    assert main([*command, "--out", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


def test_render_writes_the_same_again(tmp_path: Path, results: dict[str, Any]) -> None:
    paths = write_results(results, tmp_path, html)
    before = {path: path.read_text(encoding="utf-8") for path in paths.values()}
    paths["md"].unlink()
    assert main(["render", str(paths["json"])]) == 0
    assert {path: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == before


def test_render_says_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert main(["render", str(tmp_path / "a.json")]) == 2
    assert "is not a result of this benchmark" in capsys.readouterr().err
    assert main(["render", str(tmp_path / "b.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_plan_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["full", "--plan", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in plan(FULL))
    assert not (tmp_path / "out").exists()
