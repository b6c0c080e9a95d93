"""Run PEFT's own test suite with LoraConfig, and again with our configs in its place. See README.md beside this file.

`python tests/peft_suite/run.py --peft-repo PATH` writes results.md and results.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reasons import reason_for  # type: ignore[import-not-found]  # beside this script

HERE = Path(__file__).resolve().parent
SUITE = ("test_low_level_api", "test_initialization", "test_custom_models", "test_decoder_models")
CONFIGS = ("InputAdaConfig", "OutputAdaConfig")
Outcomes = dict[str, dict[str, Any]]


@dataclass
class Counts:
    """One config against LoRA, over the tests of one file that use LoraConfig and that LoRA passes."""

    lora: int = 0  # passed by LoRA
    passed: int = 0  # passed by ours, the test as it is
    renamed: int = 0  # passed with our key names
    lifted: int = 0  # refused for its rank, passed with that check lifted
    differ: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # reason -> (test, its message)


class Runner:
    """PEFT's tests in a temporary folder, beside a cache of small models to stand for those of the hub."""

    def __init__(self, peft_repo: Path, work: Path) -> None:
        self.work = work
        self.repo = work / "peft"
        shutil.copytree(peft_repo / "tests", self.repo / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (self.repo / "pytest.ini").write_text("[pytest]\n")
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, pathlib, tiny_hub; tiny_hub.make(pathlib.Path(sys.argv[1]))",
                work / "hf",
            ],
            env={**os.environ, "PYTHONPATH": str(HERE)},
            check=True,
        )

    def run(self, config: str, file: str, only: set[str] | None = None, lift: bool = False) -> Outcomes:
        """One pytest process over one file of the suite; `only` holds the ids of the tests to run."""
        report = self.work / "report.json"
        report.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HF_HOME": str(self.work / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PEFT_SUITE_CONFIG": config,
            "PEFT_SUITE_REPORT": str(report),
        }
        if lift:
            environment["PEFT_SUITE_LIFT"] = "1"
        if only is not None:
            ids = self.work / "only.txt"
            ids.write_text("\n".join(sorted(only)))
            environment["PEFT_SUITE_ONLY"] = str(ids)
        print(f"{file} with {config}{', keys renamed, rank check lifted' if lift else ''}", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "swap", "-q", "--tb=no", "-rN", "-W", "ignore"]
        subprocess.run([*command, "-p", "no:cacheprovider", f"tests/{file}.py"], cwd=self.repo, env=environment)
        if not report.exists():
            raise SystemExit(f"pytest ended without a report on {file} with {config}; its output is above.")
        outcomes: Outcomes = json.loads(report.read_text())
        return outcomes

    def with_renamed_keys(self, file: str, child: str) -> Path:
        """The test file with LoRA's parameter names inside its strings put where ours are; returns the original."""
        path = self.repo / "tests" / f"{file}.py"
        original = path.with_suffix(".original")
        shutil.copy(path, original)
        path.write_text(renamed(path.read_text(), child))
        return original


def renamed(source: str, child: str) -> str:
    """`....lin0.lora_A.default.weight` becomes `....lin0.<child>.lora_A.default.weight`, in string literals only."""
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] in ("STRING", "FSTRING_MIDDLE") and token.start[0] == token.end[0]:
            row = token.start[0] - 1
            changed = re.sub(r"(?<=\w)\.(lora_[AB]\.)", rf".{child}.\1", token.string)
            if changed != token.string:
                lines[row] = lines[row].replace(token.string, changed)
    return "".join(lines)


def compare(runner: Runner, config: str, file: str, baseline: Outcomes) -> Counts:
    """Ours on what LoRA passed: as it is, then what failed once more with our key names and any rank."""
    import xadapt

    passed = {name for name, test in baseline.items() if test["uses"] and test["outcome"] == "passed"}
    first = runner.run(config, file, only=passed)
    failed = {name for name in passed if first.get(name, {}).get("outcome") != "passed"}
    counts = Counts(lora=len(passed), passed=len(passed) - len(failed))
    again = {name for name in failed if worth_a_second_look(first.get(name, {}))}
    second: Outcomes = {}
    if again:
        original = runner.with_renamed_keys(file, getattr(xadapt, config).type_name.lower() + "_phi")
        try:
            second = runner.run(config, file, only=again, lift=True)
        finally:
            shutil.move(original, original.with_suffix(".py"))
    for name in sorted(failed):
        test = second.get(name, first.get(name, {"outcome": "error", "reason": "not collected"}))
        if test["outcome"] == "passed":
            wide = "is above the layer's width" in first.get(name, {}).get("reason", "")
            counts.lifted += wide
            counts.renamed += not wide
        else:
            reason = reason_for(config, name, test["reason"])
            counts.differ.setdefault(reason, []).append(
                (name.partition("::")[2], (test["reason"] or test["outcome"])[:600])
            )
    return counts


def worth_a_second_look(test: dict[str, Any]) -> bool:
    """Not what is refused whatever the names and the rank."""
    return "is refused in feature space" not in test.get("reason", "")


def table(results: dict[str, dict[str, Counts]], baselines: dict[str, Outcomes]) -> str:
    lines = [
        "| test file | config | LoRA passes | ours, as it is | + with our key names | + with any rank | differs, reason known | open |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for config, files in results.items():
        for file, counts in files.items():
            lines.append(_row(file, config, counts))
        lines.append(_row("**all**", config, _total(files)))
    lines += ["", "Not counted: tests that LoRA itself does not pass here.", ""]
    for file, baseline in baselines.items():
        left = [(n, t) for n, t in baseline.items() if t["uses"] and t["outcome"] != "passed"]
        tally = Counter(test["outcome"] for _, test in left)
        lines.append(f"- `{file}`: {', '.join(f'{n} {outcome}' for outcome, n in sorted(tally.items())) or 'none'}")
        lines += [
            f"  - `{name.rpartition('::')[2]}`: {t['reason'].splitlines()[0][:200]}"
            for name, t in left
            if t["outcome"] == "failed"
        ]
    return "\n".join(lines)


def _total(files: dict[str, Counts]) -> Counts:
    total = Counts()
    for counts in files.values():
        total.lora += counts.lora
        total.passed += counts.passed
        total.renamed += counts.renamed
        total.lifted += counts.lifted
        for reason, tests in counts.differ.items():
            total.differ.setdefault(reason, []).extend(tests)
    return total


def _row(file: str, config: str, counts: Counts) -> str:
    opened = sum(len(tests) for reason, tests in counts.differ.items() if reason == "open")
    known = sum(len(tests) for reason, tests in counts.differ.items() if reason != "open")
    numbers = (counts.lora, counts.passed, counts.renamed, counts.lifted, known, opened)
    return f"| {file} | {config} | {' | '.join(map(str, numbers))} |"


def differences(results: dict[str, dict[str, Counts]]) -> str:
    lines = []
    for config, files in results.items():
        lines += [f"## {config}: what differs, and why", ""]
        for reason, tests in sorted(_total(files).differ.items(), key=lambda pair: -len(pair[1])):
            names = functions(tests)
            lines.append(f"- **{len(tests)}**: {reason}")
            if reason == "open":
                lines += [f"  - `{name}`: {message.splitlines()[0]}" for name, message in tests]
                continue
            lines += (
                [f"  - `{name}`{f' × {n}' if n > 1 else ''}" for name, n in sorted(names.items())]
                if len(names) <= 40
                else [f"  - {len(names)} test functions, each with the cases of this kind"]
            )
        lines.append("")
    return "\n".join(lines)


def functions(tests: list[tuple[str, str]]) -> dict[str, int]:
    """How many cases of each test function."""
    return dict(Counter(name.partition("[")[0] for name, _ in tests))


def as_json(counts: Counts) -> dict[str, Any]:
    return {**vars(counts), "differ": {reason: functions(tests) for reason, tests in counts.differ.items()}}


def write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft-repo", type=Path, required=True, help="a clone of PEFT at the installed version's tag")
    parser.add_argument("--files", nargs="+", default=list(SUITE), metavar="FILE", help="test files, without .py")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), metavar="CONFIG")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.md and results.json go")
    arguments = parser.parse_args()
    tests = arguments.peft_repo / "tests"
    for needed in ("__init__.py", "conftest.py", "testing_common.py", *(f"{file}.py" for file in arguments.files)):
        if not (tests / needed).exists():
            parser.error(
                f"{tests / needed} does not exist; --peft-repo is to be a clone of github.com/huggingface/peft."
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        runner = Runner(arguments.peft_repo, Path(work))
        baselines = {file: runner.run("LoraConfig", file) for file in arguments.files}
        results = {
            config: {file: compare(runner, config, file, baselines[file]) for file in arguments.files}
            for config in arguments.configs
        }
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "torch", "transformers", "xadapt"))
    head = f"# PEFT's test suite with our configs\n\n{versions}, Python {platform.python_version()}, CPU.\n\n"
    write(arguments.out / "results.md", head + table(results, baselines) + "\n\n" + differences(results))
    data = {config: {file: as_json(counts) for file, counts in files.items()} for config, files in results.items()}
    write(arguments.out / "results.json", json.dumps({"versions": versions, "results": data}, indent=1) + "\n")
    print(table(results, baselines))


if __name__ == "__main__":
    main()
