"""python -m benchmarks.scale [--size 8b] [--blocks 4] [--layers "all linear"] [--rounds 3] [--work FOLDER] [--out FOLDER]"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks import provenance
from benchmarks.export.checkpoints import LLAMA, SETS, make_adapter, make_base
from benchmarks.export.tasks import needed
from benchmarks.scale.tasks import METHODS, READS_BOTH
from xadapt.base import CheckpointBase, open_base

RANK = 16
INTERRUPTED = "pinv_output"


def measure(size: str, layers: str, rounds: int, work: Path) -> dict[str, Any]:
    """Medians over rounds, in each of which every task runs once, in a fresh process."""
    base, warm = make_base(size, work / size), make_base("tiny", work / "tiny")
    adapter, warm_adapter = (
        make_adapter(each, "parameter", layers, RANK, work / f"adapter-{each}-{layers}") for each in (size, "tiny")
    )
    paths = (warm, warm_adapter, base, adapter)
    runs: dict[str, list[dict[str, float]]] = {task: [] for task in ("plain read", *METHODS)}
    for _ in track(range(rounds), "rounds", console=Console(stderr=True)):
        for task, found in runs.items():
            found.append(child(task, *paths))
    opened = open_base(base)
    assert isinstance(opened, CheckpointBase)
    places = needed(base, adapter)
    largest = max(entry.nbytes for entry in opened.checkpoint.entries.values())
    return {
        "base": size,
        "layers": layers,
        "rank": RANK,
        "rounds": rounds,
        "bytes_needed": sum(end - start for shard in places.values() for start, end in shard),
        "largest_tensor": largest,
        "largest_adapted": max(end - start for shard in places.values() for start, end in shard),
        "tasks": {task: _summary(task, found, runs["plain read"]) for task, found in runs.items()},
        "interrupted": interrupted(paths, work / "journal"),
    }


def _summary(task: str, runs: list[dict[str, float]], reads: list[dict[str, float]]) -> dict[str, float]:
    """Throughput is that of what the task reads: the adapted weights of the source, and for some of the target as well."""
    times = 2 if task in READS_BOTH else 1
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "peak_bytes": statistics.median(run["bytes"] for run in runs),
        "share_of_plain_read": statistics.median(
            times * read["seconds"] / run["seconds"] for run, read in zip(runs, reads, strict=True)
        ),
    }


def interrupted(paths: tuple[Path, Path, Path, Path], journal: Path) -> dict[str, float]:
    """A transfer that is killed when about half of its layers are finished, and started again."""
    shutil.rmtree(journal, ignore_errors=True)
    whole = child(INTERRUPTED, *paths, journal)["seconds"]
    count = len(list(journal.glob("*.safetensors")))
    shutil.rmtree(journal)
    command = [sys.executable, "-m", "benchmarks.scale.child", INTERRUPTED, *map(str, (*paths, journal))]
    process = subprocess.Popen(command, cwd=provenance.ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(journal.glob("*.safetensors"))) < count // 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in journal.glob("*.safetensors")}
    again = child(INTERRUPTED, *paths, journal)["seconds"]
    redone = sum(file.stat().st_mtime_ns != written for file, written in kept.items())
    return {"layers": count, "kept": len(kept), "redone": redone, "whole_seconds": whole, "resumed_seconds": again}


def child(task: str, *paths: Path) -> dict[str, float]:
    """One run of a task in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale.child", task, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=provenance.ROOT)
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def markdown(row: dict[str, Any]) -> str:
    lines = [
        f"{row['base']}, LoRA r={row['rank']} on {row['layers']}: {row['bytes_needed'] / 1e9:.1f} GB of adapted weights, the largest tensor "
        f"has {row['largest_tensor'] / 1e6:.0f} MB, the largest adapted one {row['largest_adapted'] / 1e6:.0f} MB.",
        "",
        "| method | options | seconds | share of a plain read's throughput | peak memory, MB | × largest tensor |",
        "|---|---|---|---|---|---|",
    ]
    for task, found in row["tasks"].items():
        options = ", ".join(f"{name}={value}" for name, value in METHODS.get(task, {}).items())
        lines.append(
            f"| {task} | {options} | {found['seconds']:.2f} | {found['share_of_plain_read']:.3f} | {found['peak_bytes'] / 1e6:.0f} "
            f"| {found['peak_bytes'] / row['largest_tensor']:.2f} |"
        )
    cut = row["interrupted"]
    lines += [
        "",
        f"Killed with {cut['kept']:.0f} of {cut['layers']:.0f} layers finished, {INTERRUPTED} went on in {cut['resumed_seconds']:.1f} s (whole: "
        f"{cut['whole_seconds']:.1f} s); {cut['redone']:.0f} finished layers were redone.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--size", default="8b", choices=[*LLAMA])
    parser.add_argument("--blocks", type=int, help="how many of the blocks to make; all by default")
    parser.add_argument("--layers", default="all linear", choices=[*SETS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where to put the checkpoint; it stays (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=provenance.ROOT / "benchmarks/scale/results")
    options = parser.parse_args()
    size = options.size
    if options.blocks:
        size = f"{options.size}, {options.blocks} blocks"
        LLAMA[size] = {**LLAMA[options.size], "num_hidden_layers": options.blocks}
    work = options.work or Path(tempfile.mkdtemp(prefix="xadapt-scale-"))
    try:
        row = measure(size, options.layers, options.rounds, work)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    blocks = f" --blocks {options.blocks}" if options.blocks else ""
    command = f'python -m benchmarks.scale --size {options.size}{blocks} --layers "{options.layers}" --rounds {options.rounds}'
    about: dict[str, Any] = {
        "command": command,
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "git": provenance.git(),
    }
    head = (
        "# Data-free transfers: throughput beside a plain read of the same bytes, memory beside the largest tensor\n\n"
        "Each task runs in a fresh process, in turns; medians. Memory is anonymous, above the interpreter with everything imported.\n\n"
        f"`{command}` on {about['hardware']['processor']}, {about['hardware']['threads_used']} threads, "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + ".\n\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    _replace(options.out / f"{options.size}.json", json.dumps({"about": about, "row": row}, indent=1) + "\n")
    _replace(options.out / f"{options.size}.md", head + markdown(row) + "\n")
    Console().print(markdown(row))


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    main()
