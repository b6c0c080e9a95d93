"""`xadapt transfer`: options of the method, exit codes, several targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_llama
from tests.verb_models import nothing_in, write_pair
from xadapt.cli import main


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("transfer"))


class TestCommandLine:
    def given(self, work: Path, adapter: str = "lora", target: str = "target") -> list[str]:
        return ["transfer", str(work / adapter), "--source", str(work / "source"), "--target", str(work / target)]

    def test_options_of_the_method(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        asked = [
            *self.given(work),
            "--method",
            "prolora",
            "--rank",
            "4",
            "--cross-terms",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*asked, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["options"] == {"rank": 4, "energy": None, "cross_terms": True}
        assert (tmp_path / "out" / "adapter_config.json").is_file()

    def test_help_lists_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["transfer", "--method", "pinv_input", "--help"])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert "options of the method pinv_input" in out
        assert "--ridge FLOAT" in out
        assert "mean squared singular value" in " ".join(out.split())

    def test_exit_codes(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_llama(layers=1).save_pretrained(tmp_path / "shallow")
        partial = ["transfer", str(work / "lora"), "--source", str(work / "source"), "--method", "copy"]
        partial += ["--target", str(tmp_path / "shallow"), "--out", str(tmp_path / "out")]
        assert main(partial) == 3
        assert "--partial" in capsys.readouterr().err
        assert main([*partial, "--partial"]) == 0
        assert main([*self.given(work), "--method", "no_such", "--out", str(tmp_path / "other")]) == 2
        with pytest.raises(SystemExit) as ended:
            main([*self.given(work), "--method", "copy", "--rank", "3", "--out", str(tmp_path / "other")])
        assert ended.value.code == 2

    def test_a_hub_that_cannot_be_reached(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(name: str, **options: Any) -> str:
            raise ConnectionError("Network is unreachable")

        monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
        given = ["transfer", str(work / "lora"), "--source", str(work / "source"), "--target", "nobody/nothing"]
        assert main([*given, "--method", "copy", "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert "nobody/nothing" in told
        assert "Network is unreachable" in told
        assert nothing_in(tmp_path)

    def test_plan(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*self.given(work), "--method", "copy", "--out", str(tmp_path / "out"), "--plan"]) == 0
        assert "A plan: nothing is written." in capsys.readouterr().out
        assert nothing_in(tmp_path)

    def test_a_plan_says_what_it_has_not_tested(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = [*self.given(work), "--method", "pinv_input", "--out", str(tmp_path / "out"), "--plan"]
        assert main(given) == 0
        assert "Not tested: what pinv_input makes of the weights" in capsys.readouterr().out
        assert main([*given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["untested"].startswith("what pinv_input makes of the weights")
        make_llama(hidden_size=64).save_pretrained(tmp_path / "wide")
        wide = ["transfer", str(work / "lora"), "--source", str(work / "source"), "--target", str(tmp_path / "wide")]
        assert main([*wide, "--out", str(tmp_path / "out"), "--plan"]) == 3  # auto, without data
        out = " ".join(capsys.readouterr().out.split())
        assert "It would be refused: 4 of 4 layers have other bases or widths in the target" in out
        assert "Not tested" not in out

    def test_several_targets_where_one_is_refused(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_llama(layers=1).save_pretrained(tmp_path / "shallow")
        asked = [
            *self.given(work),
            "--target",
            str(tmp_path / "shallow"),
            "--method",
            "copy",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*asked, "--json"]) == 3
        told = json.loads(capsys.readouterr().out)
        assert [row.get("refused") for row in told] == [None, True]
        assert told[0]["adapter"] == str(work / "lora")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["target"]
