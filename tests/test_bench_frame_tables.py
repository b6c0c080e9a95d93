"""benchmarks/frame: presets and command lines, statistics, published numbers, tables, the driver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import pytest

from benchmarks import provenance
from benchmarks.frame import driver as driver_module
from benchmarks.frame.cell import Cell
from benchmarks.frame.charts import dots, lines
from benchmarks.frame.collect import mix_notes, parquet, rows
from benchmarks.frame.driver import Driver, Run, main
from benchmarks.frame.published import all_published, published
from benchmarks.frame.settings import from_plain, override, preset_path, read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.summary import Spread, paired, spread
from benchmarks.frame.sweep import Finished
from benchmarks.frame.tables import Table
from benchmarks.frame.trackers import check_trackers
from tests.bench_cells import Fails, Plus, Square


@dataclass(frozen=True)
class Inner:
    rank: int = 8
    rates: tuple[float, ...] = (1e-3,)
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Settings:
    source: str
    numbers: tuple[float, ...] = (1.0, 2.0)
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None
    fails: bool = False
    inner: Inner = field(default_factory=Inner)
    hours: dict[str, float] = field(default_factory=dict)


class TestSettings:
    def test_a_preset_fills_in_a_dataclass(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text('source = "a"\nnumbers = [1, 2.5]\nlimit = 3\n[inner]\nrank = 4\n[hours]\nx = 1')
        settings = read_preset(Settings, path)
        assert settings == Settings(source="a", numbers=(1.0, 2.5), limit=3, inner=Inner(rank=4), hours={"x": 1.0})
        assert isinstance(settings.numbers[0], float)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('source = "a"\nsede = [1]', "unknown key 'sede'; did you mean 'seeds'?"),
            ('source = "a"\n[inner]\nrang = 1', "unknown key 'rang' in inner; did you mean 'rank'?"),
            ("seeds = [1]", "source must be given"),
            ('source = "a"\nseeds = [1.5]', r"seeds\[0\] = 1.5 is float; give int"),
            ('source = "a"\nseeds = 1', "seeds = 1; give a list"),
            ('source = "a"\nlimit = true', "limit = True is bool; give int"),
            ('source = "a"\ninner = 1', "inner = 1; give a table"),
            ('source = "a"\n[inner]\ndtype = "float23"', "did you mean 'float32'"),
            ("source", "no TOML"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_preset(Settings, path)

    def test_an_unknown_preset(self, tmp_path: Path) -> None:
        (tmp_path / "paper.toml").write_text("")
        with pytest.raises(ValueError, match="did you mean 'paper'"):
            preset_path("papre", tmp_path)
        with pytest.raises(ValueError, match=r"no file my\.toml"):
            preset_path("my.toml", tmp_path)

    def test_flags_are_the_fields(self) -> None:
        given = ["--seeds", "[0, 1]", "--inner.rank", "2", "--limit", "5", "--engine", "local", "--workers", "3"]
        settings, options = override(Settings(source="a", inner=Inner(dtype="bfloat16")), {"run": Run}, given, "x")
        assert settings == Settings(source="a", seeds=(0, 1), limit=5, inner=Inner(rank=2, dtype="bfloat16"))
        assert options["run"] == Run(engine="local", workers=3)

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("--sede", r"no option --sede; did you mean '--seeds'\?"),
            ("--inner.rang", r"did you mean '--inner.rank'\?"),
            ("--strict-version", r"did you mean '--strict_versions'\?"),
            ("--numbers.0", "numbers is a list, so --numbers.0 names nothing: give --numbers whole"),
        ],
    )
    def test_an_unknown_flag_ends_it(self, flag: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            override(Settings(source="a"), {"run": Run}, [flag, "1"], "x")

    def test_json_gives_back_what_it_was(self) -> None:
        assert from_plain(Plus, {"of": {"number": 1.0}, "term": 2}) == Plus(of=Square(number=1.0), term=2.0)


class TestSummary:
    def test_mean_and_sample_deviation(self) -> None:
        assert spread([1.0, 2.0, 3.0]).text() == "2.00 ± 1.00"
        assert spread([1.0]).text(1) == "1.0"
        with pytest.raises(ValueError, match="no values"):
            spread([])

    def test_paired_differences(self) -> None:
        a, b = {0: 1.0, 1: 2.0, 2: 4.0, 9: 5.0}, {0: 0.5, 1: 1.0, 2: 2.0, 7: 1.0}
        found = paired(a, b)
        assert found is not None
        assert found.mean == pytest.approx(3.5 / 3)
        assert found.count == 3
        assert (found.low, found.high) == (0.5, 2.0)  # three units: the ends are the extremes
        assert paired(a, {}) is None
        assert paired({0: 1.0}, {0: 3.0}).text() == "-2.00"

    def test_units_of_one_group_are_drawn_together(self) -> None:
        # A question that all seeds answer alike is one observation, however many seeds there are.
        once = {(0, question): float(question % 2) for question in range(40)}
        thrice = {(seed, question): value for (_, question), value in once.items() for seed in range(3)}
        none = dict.fromkeys(thrice, 0.0)
        alone, together, apart = (
            paired(once, none),
            paired(thrice, none, group=itemgetter(1)),
            paired(thrice, none),
        )
        assert (together.mean, together.low, together.high) == (alone.mean, alone.low, alone.high)
        assert together.count == 120
        assert apart.high - apart.low < 0.7 * (together.high - together.low)
        assert paired(thrice, none, group=lambda unit: 0).low is None

    def test_the_interval_is_that_of_a_normal_mean(self) -> None:
        import numpy as np

        sample = np.random.default_rng(0).normal(0.3, 1.0, size=400)
        found = paired(dict(enumerate(sample)), dict.fromkeys(range(400), 0.0))
        half = 1.96 * sample.std(ddof=1) / 20
        assert found.low == pytest.approx(sample.mean() - half, abs=0.15 * half)
        assert found.high == pytest.approx(sample.mean() + half, abs=0.15 * half)


class TestCharts:
    @staticmethod
    def parsed(figure: str) -> Any:
        return ElementTree.fromstring(figure)

    def test_dots_lie_where_their_means_are(self) -> None:
        figure = self.parsed(dots("a < b", [("one", Spread(1.0, 0.5, 3)), ("two & more", Spread(2.0, None, 1))]))
        across = [float(dot.get("cx")) for dot in figure.iter("circle")]
        ticks = {float(text.text): float(text.get("x")) for text in figure.iter("text") if text.text[0].isdigit()}
        (first, left), *_, (last, right) = sorted(ticks.items())
        expected = [left + (value - first) / (last - first) * (right - left) for value in (1.0, 2.0)]
        assert across == pytest.approx(expected, abs=3)  # ticks are rounded to three digits
        whiskers = [line for line in figure.iter("line") if line.get("y1") == line.get("y2")]
        assert len(whiskers) == 1, "one value has no spread"
        middle = (float(whiskers[0].get("x1")) + float(whiskers[0].get("x2"))) / 2
        assert middle == pytest.approx(across[0], abs=0.1)
        assert "two & more: 2.000" in "".join(figure.itertext())

    def test_lines_go_up_where_the_means_do(self) -> None:
        curve = [(0.0, Spread(0.3, 0.1, 3)), (1.0, Spread(0.5, 0.1, 3)), (4.0, Spread(0.4, 0.1, 3))]
        figure = self.parsed(lines("t", "x", {"a": curve}))
        points = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in figure.iter("circle")]
        (left, low), (middle, top), (right, between) = points
        assert top < between < low, "an SVG counts from above"
        assert (middle - left) / (right - left) == pytest.approx(0.25, abs=1e-3)

    def test_nothing_measured_is_no_chart(self) -> None:
        assert dots("t", []) == lines("t", "x", {}) == ""


class TestTrackers:
    def test_one_that_is_not_there_is_no_silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("accelerate.tracking._available_trackers", ["tensorboard"])
        check_trackers([])
        check_trackers(["tensorboard"])
        with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
            check_trackers(["tensorboard", "wandb"])
        with pytest.raises(ValueError, match=r"did you mean 'tensorboard'\?"):
            check_trackers(["tensorbord"])


class TestPublished:
    def test_all_are_there(self) -> None:
        assert len(all_published()) == 690
        (found,) = published("6", side="target", adaptation="input", metric="acc_pct/gsm8k")
        assert found.value == 16.07

    def test_an_unknown_table(self) -> None:
        with pytest.raises(ValueError, match="A4A-1"):
            published("12")


class TestTables:
    TABLE = Table("Score & more", ["x_1", "±"], [["a|b", "**1.0 ± 0.1**"], ["50 %", "→ <b>"]], ["a note"])

    def test_markdown(self) -> None:
        assert self.TABLE.markdown() == (
            "## Score & more\n\n| x_1 | ± |\n|---|---|\n| a\\|b | **1.0 ± 0.1** |\n| 50 % | → <b> |\n\n* a note"
        )

    def test_latex(self) -> None:
        text = self.TABLE.latex()
        assert r"\caption{Score \& more. a note}" in text
        assert r"a$|$b & \textbf{1.0 $\pm$ 0.1} \\" in text
        assert r"50 \% & $\rightarrow$ $<$b$>$ \\" in text

    def test_html(self) -> None:
        assert "<td><b>1.0 ± 0.1</b></td>" in self.TABLE.html()
        assert "→ &lt;b&gt;" in self.TABLE.html()

    def test_rows_must_fit(self) -> None:
        with pytest.raises(ValueError, match="1 cells, and there are 2"):
            Table("t", ["a", "b"], [["1"]])


def stages(settings: Settings, finished: Finished) -> Iterator[Sequence[Cell]]:
    squares = [Square(number=number) for number in settings.numbers]
    yield squares
    best = finished.best(squares, lambda result: result["square"])
    if best:
        yield [Plus(of=best, term=10.0)]
    if settings.fails:
        yield [Fails(number=0.0)]


def tables(settings: Settings, records: Sequence[dict[str, Any]]) -> list[Table]:
    return [Table("squares", ["value"], [[f"{row['value']:g}"] for row in rows(records) if row.get("metric")])]


class TestDriver:
    @pytest.fixture
    def sample(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
        presets = tmp_path / "benchmarks" / "sample" / "presets"
        presets.mkdir(parents=True)
        (presets / "tiny.toml").write_text('source = "a"\nnumbers = [3, 2]')
        monkeypatch.setattr(driver_module, "ROOT", tmp_path)
        return Driver(name="sample", title="A sample", settings=Settings, stages=stages, tables=tables)

    def test_a_plan_runs_nothing(self, sample: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(sample, ["tiny", "--plan"]) == 0
        assert "3 cells to run: about 1 h 00 min" in capsys.readouterr().out
        assert not (tmp_path / "runs").exists()

    def test_a_run_writes_tables_and_a_second_one_does_nothing_again(
        self, sample: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(sample, ["tiny"]) == 0
        out = tmp_path / "runs" / "sample"
        text = (out / "tiny.md").read_text()
        assert "| 9 |\n| 4 |" in text or "| 4 |\n| 9 |" in text
        assert "3 cells, the last at" in text
        assert provenance.versions()["torch"] in text
        assert {path.name for path in out.iterdir() if path.is_file()} == {
            f"tiny.{s}" for s in ("md", "tex", "html", "parquet")
        }
        capsys.readouterr()
        assert main(sample, ["tiny", "--collect"]) == 0
        assert main(sample, ["tiny", "--engine", "here"]) == 0
        assert "done" not in capsys.readouterr().out

    def test_a_failed_cell_is_in_the_exit_status(self, sample: Driver, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(sample, ["tiny", "--fails", "true"]) == 1
        output = capsys.readouterr().out
        assert "3 of 4 cells are finished" in output
        assert "does not please" in output

    def test_other_versions_are_noted_or_refused(
        self, sample: Driver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        main(sample, ["tiny"])
        real = provenance.versions()
        monkeypatch.setattr(provenance, "versions", lambda: real | {"torch": "9.9"})
        assert main(sample, ["tiny", "--strict-versions"]) == 2
        assert "9.9" in capsys.readouterr().err
        assert main(sample, ["tiny", "--numbers", "[3, 2, 1]"]) == 0
        assert "note: finished cells" in capsys.readouterr().out
        assert (
            "Warning: these cells were made with different versions: torch"
            in (tmp_path / "runs" / "sample" / "tiny.md").read_text()
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["tniy"], "did you mean 'tiny'"), (["tiny", "--workers", "2"], "--engine local")],
    )
    def test_bad_input(
        self, sample: Driver, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        assert main(sample, arguments) == 2
        assert message in capsys.readouterr().err

    def test_help_lists_presets(self, sample: Driver, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(sample, ["--help"]) == 0
        assert "presets: tiny" in capsys.readouterr().out


def test_rows_of_different_cells_share_one_parquet(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(Square(number=1.0), {"rows": [{"metric": "m", "value": 1}, {"metric": "n", "value": 2.5}]}, 1.0)
    store.put(Square(number=2.0), {"value": "many"}, 1.0)
    table = parquet(store.records())
    assert table.num_rows == 3
    assert sorted(table.column("value").to_pylist()) == ["1", "2.5", "many"]
    assert {"settings.number", "versions.torch", "seconds"} <= set(table.column_names)
    assert mix_notes(list(store.records())) == []
