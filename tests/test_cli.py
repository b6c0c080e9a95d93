"""The command: quick to answer, readable for people, parseable for programs, one line per mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from xadapt import registry
from xadapt.cli import VERBS, main
from xadapt.version import __version__

HEAVY = {"torch", "peft", "transformers", "diffusers", "accelerate", "numpy"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["methods"], ["methods", "--json"], ["methods", "--help"]]
)
def test_it_answers_without_the_heavy_imports(arguments: list[str], run_python: Callable[..., str]) -> None:
    printed = run_python(
        "import sys\n"
        "from xadapt.cli import main\n"
        "try:\n"
        f"    code = main({arguments!r})\n"
        "except SystemExit as leaving:\n"
        "    code = leaving.code\n"
        f"print('\\nheavy:', sorted({HEAVY!r} & set(sys.modules)), 'code:', code)"
    )
    assert printed.splitlines()[-1] == "heavy: [] code: 0"


def test_bare_import_is_light_and_knows_its_names(run_python: Callable[..., str]) -> None:
    printed = run_python(f"import sys, xadapt; print(sorted({HEAVY!r} & set(sys.modules))); print(*dir(xadapt))")
    light, names = printed.splitlines()
    assert light == "[]"
    assert {"InputAdaConfig", "OutputAdaConfig", "HybridAdaConfig", "FullAdaConfig", "feature_space", "load"} <= set(
        names.split()
    )


def test_every_lazy_name_resolves() -> None:
    import xadapt

    assert not {path.stem for path in Path(xadapt.__file__).parent.glob("*.py")} & set(xadapt.__all__), (
        "a module hides it"
    )
    for name in xadapt.__all__:
        assert getattr(xadapt, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'InputAdaConfigg'"):
        _ = xadapt.InputAdaConfigg


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"xadapt {__version__}\n"


def test_help_tells_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(verb.NAME in out for verb in VERBS)


def test_methods_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "320")
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in registry.methods():
        method = registry.get(name)
        assert name in out
        assert method.summary in out


def test_methods_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(registry.methods())
    assert rows["input_ada"]["reads"] == ["input_ada"]
    assert rows["input_ada"]["writes"] == "input_ada"
    assert rows["input_ada"].keys() == {"name", "summary", "reads", "writes", "paper"}


def test_without_a_verb_it_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    told = capsys.readouterr().err
    assert "usage: xadapt" in told
    assert "what is installed, as a table" in told


def test_a_misspelt_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["method"])
    assert "there is no verb 'method'. Did you mean 'methods'?" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["--metod copy", "--metod=copy"])
def test_a_misspelt_flag(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["transfer", "adapter", *typed.split(), "--target", "there"])  # --out is missing too, which matters less
    assert "there is no flag --metod. Did you mean '--method'?" in capsys.readouterr().err


def test_a_flag_of_another_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["transfer", "adapter", "--method", "copy", "--no-allow-training"])
    assert "there is no flag --no-allow-training. auto has it: --method auto." in capsys.readouterr().err


def test_a_flag_with_an_underscore(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["transfer", "adapter", "--train_below", "0.9"])
    assert "there is no flag --train_below. Did you mean '--train-below'?" in capsys.readouterr().err


def test_a_value_may_look_like_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "a", "--prompt", "--ar 16:9 castle"])
    assert "there is no flag" not in capsys.readouterr().err


def test_a_misspelt_method_is_told_before_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", "a", "--target", "b", "--out", "c", "--method", "distill", "--rank", "4"]) == 2
    assert "No method is called 'distill'. Did you mean 'distil'?" in capsys.readouterr().err


def test_the_beginning_of_a_flag_will_do() -> None:
    assert main(["methods", "--js"]) == 0


@pytest.mark.parametrize("arguments", [["method"], ["methods", "--jsn"], ["--no-such-option"]])
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: xadapt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (ValueError("no such folder: x"), 2, "xadapt methods: no such folder: x\n"),
        (KeyboardInterrupt(), 130, "xadapt methods: interrupted\n"),
    ],
)
def test_mistakes_are_one_line_not_a_traceback(
    raised: BaseException,
    code: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> int:
        raise raised

    monkeypatch.setattr("xadapt.cli.methods.run", fail)
    assert main(["methods"]) == code
    assert capsys.readouterr().err == told
