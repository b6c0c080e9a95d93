"""python -m benchmarks.export [--size 1b] [--rounds 5] [--slow] [--work FOLDER] [--out benchmarks/export/results]"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks import provenance
from benchmarks.export.checkpoints import FLUX, LLAMA, family, make_adapter, make_base
from benchmarks.export.tasks import COLD, needed
from xadapt.base import CheckpointBase, open_base

RANK = 16
YARDSTICK = {
    "xadapt export": "plain read",
    "PEFT save_as_lora": "plain read",
    "xadapt merge": "plain copy",
    "PEFT merge": "plain copy",
}


@dataclass(frozen=True)
class Case:
    """One adapter on one base, and the tasks that take turns on it."""

    space: str
    layers: str
    tasks: tuple[str, ...]


def cases(slow: bool) -> list[Case]:
    """PEFT's SVD takes minutes for a few layers, so it is asked for on q and v only, and only with --slow."""
    export, merge = ("plain read", "xadapt export"), ("plain copy", "xadapt merge", "PEFT merge")
    cold = tuple(task + COLD for task in ("plain read", "xadapt export", "plain copy", "xadapt merge"))
    svd = ("PEFT save_as_lora",) if slow else ()
    return [
        Case("input", "all linear", (*export, *merge, *cold)),
        Case("output", "all linear", (*export, *merge)),
        Case("input", "q,v", (*export, *svd, *merge)),
        Case("parameter", "all linear", (*export, *merge)),
    ]


def measure(case: Case, size: str, rounds: int, work: Path) -> dict[str, Any]:
    """Medians over rounds, in each of which every task runs once, in a fresh process."""
    base, warm = make_base(size, work / size), make_base(_small(size), work / _small(size))
    adapter, warm_adapter = (
        make_adapter(s, case.space, case.layers, RANK, work / f"adapter-{s}-{case.space}-{case.layers}")
        for s in (size, _small(size))
    )
    runs: dict[str, list[dict[str, float]]] = {task: [] for task in case.tasks}
    for number in range(rounds):
        for task in case.tasks:
            if task == "PEFT save_as_lora" and number:
                continue  # minutes, and no close call
            runs[task].append(_child(task, warm, warm_adapter, base, adapter, work / "out"))
    opened = open_base(base)
    assert isinstance(opened, CheckpointBase)
    entries = opened.checkpoint.entries.values()
    places = needed(base, adapter)
    return {
        "base": size,
        "space": case.space,
        "layers": case.layers,
        "rank": RANK,
        "rounds": rounds,
        "bytes_needed": sum(end - start for shard in places.values() for start, end in shard),
        "bytes_in_all": sum(entry.nbytes for entry in entries),
        "largest_tensor": max(entry.nbytes for entry in entries),
        "tasks": {task: _summary(found, runs.get(_yardstick(task))) for task, found in runs.items()},
    }


def _yardstick(task: str) -> str:
    """The plain task of the same temperature."""
    plain = YARDSTICK.get(task.removesuffix(COLD), "")
    return plain + COLD if task.endswith(COLD) else plain


def _summary(runs: list[dict[str, float]], yardstick: list[dict[str, float]] | None) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    summary: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "peak_bytes": statistics.median(run["bytes"] for run in runs),
    }
    if yardstick:
        ratios = [run["seconds"] / plain["seconds"] for run, plain in zip(runs, yardstick, strict=False)]
        summary["to_plain"] = statistics.median(ratios)
        summary["all_to_plain"] = ratios
    return summary


def _child(task: str, *paths: Path) -> dict[str, float]:
    out = paths[-1]
    for left in (out, out.with_name(f"{out.name}-warm")):
        shutil.rmtree(left, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.export.child", task, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=provenance.ROOT)
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _small(size: str) -> str:
    return "flux-tiny" if family(size) == "flux" else "tiny"


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| base | adapter | task | seconds | × plain | peak memory, MB | × largest tensor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for task, found in row["tasks"].items():
            ratio = f"{found['to_plain']:.2f}" if "to_plain" in found else ""
            peak = found["peak_bytes"]
            lines.append(
                f"| {row['base']} | {row['space']}, {row['layers']}, r={row['rank']} | {task} | {found['seconds']:.2f} | {ratio} "
                f"| {peak / 1e6:.0f} | {peak / row['largest_tensor']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--size", default="1b", choices=[*LLAMA, *FLUX], help="shapes of the synthetic base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow", action="store_true", help="also PEFT's SVD, minutes")
    parser.add_argument(
        "--work", type=Path, help="where to put the checkpoints; they stay (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, default=provenance.ROOT / "benchmarks/export/results")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="xadapt-export-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        todo = cases(options.slow)
        rows = [measure(case, options.size, options.rounds, work) for case in track(todo, "exports and merges")]
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    about: dict[str, Any] = {
        "command": f"python -m benchmarks.export --size {options.size} --rounds {options.rounds}"
        + (" --slow" if options.slow else ""),
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "git": provenance.git(),
    }
    head = (
        "# Export and merge: time beside a plain read or copy of the same bytes, memory beside the largest tensor\n\n"
        "Each task runs in a fresh process, in turns; medians. Plain read: the adapted weights only, sequentially. Plain copy: "
        "the whole checkpoint, to the disk (fsync). Files are in the page cache, except where the task says cold: then they come from the disk. Memory is anonymous, above the interpreter "
        "with everything imported; PEFT's tasks load the model in bfloat16.\n\n"
        f"`{about['command']}` on {about['hardware']['processor']}, {about['hardware']['threads_used']} threads, "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + ".\n\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    _replace(options.out / f"{options.size}.json", json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    _replace(options.out / f"{options.size}.md", head + markdown(rows) + "\n")
    Console().print(markdown(rows))


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    main()
