"""What check, transfer and verify print for people: readable in 80 columns, whatever the size of the model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tests.conftest import make_llama
from tests.verb_models import drifted, lora_folder, unet_lora_folder
from xadapt.cli import check, main, verify
from xadapt.cli.tables import Names, narrowed, numbers, table_of
from xadapt.layer_names import differing, merged, needless_parts, pattern_of, plainly, together, wording_of
from xadapt.verifying.behaviour import Agreement
from xadapt.verifying.report import Verified, VerifyReport

BLOCKS = 16
SEVEN = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("tables")
    source = make_llama(layers=BLOCKS)
    source.save_pretrained(work / "source")
    drifted(source).save_pretrained(work / "drifted")
    make_llama(seed=1, layers=12).save_pretrained(work / "shallow")
    lora_folder(work / "lora", make_llama(layers=BLOCKS), tuple(name.split(".")[1] for name in SEVEN))
    return work


class TestNames:
    def test_layers_that_differ_in_numbers(self) -> None:
        paths = [f"model.layers.{n}.mlp.up_proj" for n in (0, 1, 2, 5)]
        assert together(paths) == "model.layers.0–2,5.mlp.up_proj"
        assert together(paths, ["model", "layers", "up_proj"]) == "0–2,5.mlp.up_proj"
        assert together(["net.3"]) == "net.3"

    def test_what_tells_nothing(self) -> None:
        paths = [f"model.layers.0.{name}" for name in SEVEN]
        assert needless_parts(paths) == ["model", "layers", "self_attn", "mlp"]
        assert needless_parts(["h.0.attn.c_proj", "h.0.mlp.c_proj"]) == ["h"]
        assert needless_parts(paths[:1]) == []

    def test_a_last_part_stays(self) -> None:
        names = [f"down.0.attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_out.0")]
        assert needless_parts(names) == ["down"]
        assert together([names[-1]], ["down"]) == "0.attn2.to_out.0"

    def test_targets_are_told_by_what_differs(self) -> None:
        here, there = ["m.layers.0.q", "m.layers.2.q"], ["m.layers.0.q", "m.layers.1.q"]
        assert differing(here, there) == "0–1"
        assert differing(here, ["h.0.c_attn", "h.1.c_attn"]) == "h.0–1.c_attn"
        assert differing(here, here) == ""

    @pytest.mark.parametrize(
        ("moves", "parts"),
        [
            ({"a.0": "a.0", "a.1": "a.1"}, 1),
            ({"a.0": "a.0", "a.2": "a.1"}, 1),  # "0,2" to "0–1", in order
            ({"a.0": "b.1", "a.1": "b.2"}, 1),
            ({"a.0": None, "a.1": None}, 1),
            ({"a.0": "a.1", "a.1": "a.0", "a.2": "a.2", "a.3": "a.3"}, 3),
            ({"a.0": "b.1", "a.1": "b.0"}, 2),
            ({"a.0": "a.3", "a.1": "a.2"}, 2),  # "0–1" to "2–3", which is not in order
            ({"a.0.b.0": "a.0.b.1", "a.1.b.1": "a.1.b.0"}, 2),
            ({"a.0.b.0": "c.0", "a.0.b.1": "c.1", "a.1.b.0": "c.2"}, 1),
            ({"a.0.b.0": "c.1", "a.0.b.1": "c.0"}, 2),
            ({"a": "b.0"}, 1),
            ({"a.0.q": "a.0.q", "a.0.v.1": "a.0.v.1", "a.1.q": "a.1.q"}, 1),  # of several patterns
            ({"a.0.q": "a.1.q", "a.0.v.1": "a.0.v.1", "a.1.q": "a.0.q"}, 3),
            # more spans than are listed, which would look alike: "0,…,10"
            ({f"a.{n}": f"a.{7 if n == 6 else n}" for n in range(0, 12, 2)}, 2),
        ],
    )
    def test_what_goes_where_is_seen(self, moves: dict[str, str | None], parts: int) -> None:
        found = plainly(list(moves.items()), lambda move: move)
        assert len(found) == parts
        assert sorted(move for part in found for move in part) == sorted(moves.items())

    def test_sentences(self) -> None:
        texts = ["drift (-0.02 of it)", "drift (0.10 of it)"]
        assert wording_of(texts[0]) == wording_of(texts[1])
        assert merged(texts) == "drift (-0.02–0.10 of it)"
        assert merged(["block 1", "block 2", "block 7"]) == "block 1–2,7"
        assert pattern_of("a.12.b") == "a.*.b"


class TestCells:
    def test_spread_and_mean(self) -> None:
        assert numbers([0.1, None, 0.2], spread=True) == "0.100–0.200"
        assert numbers([0.1, None, 0.2], spread=False) == "0.150"
        assert numbers([-0.0001], spread=False) == "0.000"
        assert numbers([None], spread=True) == ""

    def test_empty_columns_are_left_out(self) -> None:
        table = table_of(["layer", "none", "drift"], [["a", "", "1"], ["b", "", ""]])
        assert [column.header for column in table.columns] == ["layer", "drift"]

    def test_names_are_broken_between_parts(self) -> None:
        names = Names([("down_blocks.0.attentions.1.to_q", None)])
        console = Console(width=30, file=io.StringIO())

        def table(width: int) -> Table:
            return table_of(
                ["layer", "drift"], [[names.of([("down_blocks.0.attentions.1.to_q", None)], width)[0], "0.1"]]
            )

        console.print(narrowed(console, table))
        out = console.file.getvalue()  # type: ignore[attr-defined]
        assert [line.split()[0] for line in out.splitlines() if "s." in line] == ["down_blocks.0.", "attentions.1.to_q"]


def _said(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    return out


class TestCheck:
    @pytest.mark.parametrize("columns", [80, 120])
    def test_a_line_for_each_module(
        self, work: Path, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = ["check", str(work / "lora"), "--source", str(work / "source"), "--target", str(work / "drifted")]
        out = _said(given, capsys, monkeypatch, columns)
        rows = [line.split() for line in out.splitlines() if "_proj" in line]
        assert [row[0] for row in rows] == [f"0–15…{name.split('.')[1]}" for name in SEVEN]
        assert all(row[1] == "16" and len(row) == 8 for row in rows)  # no cell is broken or empty
        assert "112 layers as it is: ordinary drift (0." in out
        assert ("means over" in out) == (columns == 80)
        assert "left out of the layers' names: model, layers, self_attn, mlp" in out

    def test_less_depth(self, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        given = ["check", str(work / "lora"), "--source", str(work / "source"), "--target", str(work / "shallow")]
        out = _said(given, capsys, monkeypatch, 80)
        assert "28 layers nowhere: model.layers has 16 blocks and 12 in the target" in " ".join(out.split())
        (row,) = [line.split() for line in out.splitlines() if "q_proj" in line and "align" in line]
        assert row[1:4] == ["0–11", "align", "12"]

    def test_features_have_a_table_of_their_own(
        self, tmp_path: Path, unet: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import xadapt
        from xadapt.data import Amount

        monkeypatch.setenv("COLUMNS", "80")
        adapter = unet_lora_folder(tmp_path / "lora")
        found = xadapt.check(adapter, unet, drifted(unet), "random", amount=Amount(samples=2))  # type: ignore[arg-type]
        check._print(found)
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert out.count(" layer ") == 2
        assert "attn2.to_k" in out


class TestTransfer:
    def test_a_plan_in_lines_for_modules(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = ["transfer", str(work / "lora"), "--source", str(work / "source"), "--method", "copy", "--plan"]
        given += ["--partial", "--out", str(tmp_path / "out"), "--target", str(work / "shallow")]
        out = _said(given, capsys, monkeypatch, 80)
        rows = [line.split() for line in out.splitlines() if "_proj" in line]
        assert sorted(row[1:] for row in rows) == [["0–11", "12"]] * 7 + [["none", "4"]] * 7
        assert "28 layers: model.layers has 16 blocks" in out

    def test_swapped_blocks_are_told_one_by_one(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = {"model.layers.0": "model.layers.1", "model.layers.1": "model.layers.0"}
        (tmp_path / "map.json").write_text(json.dumps(lines))
        given = ["transfer", str(work / "lora"), "--source", str(work / "source"), "--target", str(work / "drifted")]
        given += ["--method", "copy", "--plan", "--out", str(tmp_path / "out"), "--map", str(tmp_path / "map.json")]
        out = _said(given, capsys, monkeypatch, 80)
        rows = [line.split() for line in out.splitlines() if "q_proj" in line]
        assert sorted(rows) == [["0…q_proj", "1", "1"], ["1…q_proj", "0", "1"], ["2–15…q_proj", "14"]]
        assert "7 layers: model.layers.0 → model.layers.1 by the map given" in " ".join(out.split())
        assert "7 layers: model.layers.1 → model.layers.0 by the map given" in " ".join(out.split())

    def test_layers_left_out_in_lines_for_modules(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["transfer", str(work / "lora"), "--source", str(work / "source"), "--target", str(work / "shallow")]
        assert main([*given, "--method", "copy", "--partial", "--out", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert "left out 28 layers:" in out
        assert sum(line.startswith("  model.layers.") for line in out.splitlines()) == 7


def test_verify_with_many_metrics(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    metrics = {f"mmlu_high_school_european_history acc_norm {n}": n / 10 for n in range(8)}
    agreement = Agreement(score=0.5, direction=0.6, strength=0.7, rows=8)
    rows = [Verified(name=name, metrics=metrics) for name in ("bare source", "adapted source")]
    rows += [Verified(name=name, metrics=metrics, agreement=agreement) for name in ("bare", "transferred")]
    rows += [Verified(name="copy", error="it has other widths")]
    verify._print(
        VerifyReport(adapter="a", transferred="b", source="s", target="t", data="d", neutral=None, rows=tuple(rows))
    )
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "retention" not in out  # nothing neutral was given
    assert "copy (cannot be loaded)" in out
    assert sum(line.split()[-4:] == ["0.700"] * 4 for line in out.splitlines()) == 1
