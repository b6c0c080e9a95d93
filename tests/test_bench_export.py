"""benchmarks/export: its checkpoints are loadable, its tasks do what they are compared for, its table says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.export.__main__ import Case, markdown, measure
from benchmarks.export.checkpoints import FLUX, LLAMA, make_adapter, make_base, skeleton
from benchmarks.export.tasks import TASKS, needed
from xadapt.base import open_base
from xadapt.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.mark.parametrize(
    ("size", "parameters"), [("1b", 1_235_814_400), ("8b", 8_030_261_248), ("flux", 11_901_408_320)]
)
def test_the_real_shapes_have_the_real_sizes(size: str, parameters: int) -> None:
    assert {size} <= LLAMA.keys() | FLUX.keys()
    assert sum(p.numel() for p in skeleton(size).parameters()) == parameters


def test_a_base_is_made_once_and_opens(work: Path) -> None:
    folder = make_base("tiny", work / "tiny")
    assert make_base("tiny", work / "tiny") == folder
    base = open_base(folder)
    assert "lm_head.weight" not in Checkpoint.open(folder)  # tied, as in Llama-3.2-1B
    assert all(tensor.dtype == torch.bfloat16 for tensor in base.weights().values())
    base.module(dtype=torch.bfloat16)


def test_large_bases_are_sharded(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.export.checkpoints.SHARD", 50_000)
    checkpoint = Checkpoint.open(make_base("tiny", work / "sharded"))
    assert len(checkpoint.shards) > 2
    assert checkpoint.keys() == Checkpoint.open(make_base("tiny", work / "tiny")).keys()


def test_only_adapted_weights_are_needed(work: Path) -> None:
    base = make_base("tiny", work / "tiny")
    adapter = make_adapter("tiny", "input", "q,v", 4, work / "adapter-qv")
    entries = Checkpoint.open(base).entries
    wanted = sum(entry.nbytes for name, entry in entries.items() if "q_proj" in name or "v_proj" in name)
    assert sum(end - start for places in needed(base, adapter).values() for start, end in places) == wanted


def test_both_ways_to_merge_give_the_same_checkpoint(work: Path) -> None:
    base = make_base("tiny", work / "tiny")
    adapter = make_adapter("tiny", "output", "all linear", 4, work / "adapter-out")
    for task in ("xadapt merge", "PEFT merge", "plain copy"):
        TASKS[task](base, adapter)(work / task)
    ours, theirs = Checkpoint.open(work / "xadapt merge"), Checkpoint.open(work / "PEFT merge")
    assert ours.keys() == theirs.keys()
    for name in ours:
        # PEFT rounds the update to bfloat16 before it adds it; ours is rounded once.
        torch.testing.assert_close(ours[name], theirs[name], rtol=2**-6, atol=2**-10)
    copied = Checkpoint.open(work / "plain copy" / "model.safetensors")
    assert all(torch.equal(copied[name], tensor) for name, tensor in Checkpoint.open(base).items())


def test_a_case_is_measured_in_fresh_processes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.export.__main__.RANK", 4)
    row = measure(Case("input", "q,v", ("plain read", "xadapt export")), "tiny", 1, work)
    assert row["tasks"]["xadapt export"]["to_plain"] > 0
    assert row["tasks"]["xadapt export"]["peak_bytes"] >= 0
    assert 0 < row["bytes_needed"] < row["bytes_in_all"]
    lines = markdown([row]).splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| tiny | input, q,v, r=4 | xadapt export |")
