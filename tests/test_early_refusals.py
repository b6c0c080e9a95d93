"""What cannot end well is told before hours of work, and in words that say what to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import xadapt
from tests.conftest import make_llama
from tests.data_models import with_tokenizer
from tests.verb_models import IDS, drifted, lora_folder
from xadapt.base import open_base
from xadapt.cli import main
from xadapt.cli.options import as_flags
from xadapt.data import open_data
from xadapt.verifying.behaviour import Agreement
from xadapt.verifying.report import Verified, VerifyReport


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("early")
    with_tokenizer(work / "base")
    lora_folder(work / "lora")
    (work / "file").write_text("a b c\n")
    (work / "page.html").write_text("<p>somebody's</p>")
    return work


def never(*given: Any, **options: Any) -> None:
    raise AssertionError("the work began")


class TestReport:
    @pytest.mark.parametrize(
        ("place", "told"),
        [("page.html", "is no report of xadapt"), ("lora", "is a folder"), ("file/r.html", "file is a file, so")],
    )
    @pytest.mark.parametrize("verb", ["check", "transfer", "verify"])
    def test_its_place_is_looked_at_first(
        self,
        verb: str,
        place: str,
        told: str,
        work: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("checking.check.check", "transferring.transfer.transfer", "verifying.verify.verify"):
            monkeypatch.setattr(f"xadapt.{name}", never)
        lora, base = str(work / "lora"), str(work / "base")
        given = {"check": [], "transfer": ["--out", str(tmp_path / "out")], "verify": [lora, "--data", "x"]}[verb]
        command = [verb, lora, *given, "--source", base, "--target", base, "--report", str(work / place)]
        assert main(command) == 2
        assert told in capsys.readouterr().err


class TestPlaces:
    def test_a_file_is_no_folder_to_write_in(self, work: Path) -> None:
        told = "file is a file, so .* cannot lie in it; choose another place"
        with pytest.raises(ValueError, match=told):
            xadapt.transfer(work / "lora", work / "base", work / "base", "copy", out=work / "file" / "deep" / "out")
        for out, layout in (("out", "peft"), ("out.safetensors", "diffusers")):
            with pytest.raises(ValueError, match=told):
                xadapt.export_lora(
                    work / "lora",
                    work / "base",
                    work / "file" / out,
                    layout=layout,
                    name="unet" if layout != "peft" else None,
                )


def test_an_iterator_is_not_enough_for_several_targets(work: Path, tmp_path: Path) -> None:
    batches = ({"input_ids": IDS} for _ in range(2))
    targets = {"one": drifted(make_llama()), "two": drifted(make_llama(), seed=5)}
    with pytest.raises(ValueError, match="data is an iterator, which can be read once, and there are several targets"):
        xadapt.transfer_all(work / "lora", make_llama(), targets, "aligned", out=tmp_path, data=batches)
    found = xadapt.transfer_all(
        work / "lora", make_llama(), targets, "aligned", out=tmp_path, data=[{"input_ids": IDS}]
    )
    assert {name: type(one).__name__ for name, one in found.items()} == dict.fromkeys(targets, "TransferResult")


def test_random_is_for_denoisers(work: Path) -> None:
    base = open_base(work / "base")
    with pytest.raises(ValueError, match="data='random' is for denoisers"):
        open_data("random", base, base)


def test_an_adapter_of_the_hub_is_downloaded_first(work: Path) -> None:
    with pytest.raises(ValueError, match="hf download owner/name --local-dir FOLDER"):
        xadapt.check("owner/name", work / "base", work / "base")


def test_flags_are_named_once() -> None:
    assert as_flags("pass data=… (--data), a file") == "pass --data … (--data), a file".replace(" (--data)", "")
    assert as_flags("pass source=… (--target)") == "pass --source … (--target)"


def test_what_does_nothing_is_no_better_than_bare() -> None:
    def report(score: float) -> VerifyReport:
        scores = {"bare": 0.1, "copy": 0.0, "transferred": score}
        rows = [
            Verified(name=name, agreement=Agreement(score=one, direction=0, strength=0, rows=1))
            for name, one in scores.items()
        ]
        return VerifyReport(
            adapter="a", transferred="b", source="c", target="d", data="e", neutral=None, rows=tuple(rows)
        )

    assert report(0.1).verdict.startswith("no better than the bare target: score 0.10")
    assert report(0.2).verdict.startswith("score 0.20")
    assert report(0.05).verdict.startswith("worse than the bare target")
