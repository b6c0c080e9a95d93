"""The commands in README.md for check, transfer and verify, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.data_models import with_tokenizer
from tests.verb_models import lora_folder
from xadapt.cli import main

README = Path(__file__).parents[1] / "README.md"


def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"<!-- verbs: .*? -->\n```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    commands = [shlex.split(line) for line in found[1].splitlines()]
    assert [command[:2] for command in commands] == [["xadapt", verb] for verb in ("check", "transfer", "verify")]
    monkeypatch.chdir(tmp_path)
    with_tokenizer(Path("llama"))
    with_tokenizer(Path("llama-instruct"))
    lora_folder(Path("my-lora"))
    Path("lines.txt").write_text("a b c d e f g h i j\nhello world\n")
    for command in commands:
        assert main(command[1:]) == 0, capsys.readouterr().err
    assert Path("there/adapter_config.json").is_file()
    assert Path("report.html").read_text(encoding="utf-8").count("<h2>") == 3
