"""`xadapt.transfer` with methods and formats of others: what breaks, learns, or has files of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import xadapt
from tests.verb_models import IDS, nothing_in, write_pair
from xadapt import registry
from xadapt.contract import Adapter, Carried, Method, Siblings
from xadapt.kinds import FileKind
from xadapt_weight import COPY, LORA_X


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("transfer"))


def _install(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """The method beside those that are installed, as its entry point would put it there."""
    get, load_all = registry.get, registry.load_all
    monkeypatch.setattr(registry, "get", lambda name: method if name == method.name else get(name))
    monkeypatch.setattr(registry, "load_all", lambda: ({**load_all()[0], method.name: method}, load_all()[1]))


@dataclass(frozen=True, kw_only=True)
class Broken:
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        name = next(iter(adapter.tensors))
        tensors = {**adapter.tensors, name: adapter.tensors[name] * float("nan")}
        return Carried(adapter=replace(adapter, tensors=tensors))


@dataclass(frozen=True, kw_only=True)
class Misshapen:
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        name = next(name for name in adapter.tensors if "lora_A" in name)
        return Carried(adapter=replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name][:, :5]}))


class TestResultsThatAreRefused:
    def test_a_result_that_is_not_finite(self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _install(monkeypatch, replace(COPY, name="broken", build=Broken))
        with pytest.raises(ValueError, match="The carried adapter holds NaN or infinity in 1 of 8 tensors"):
            xadapt.transfer(work / "lora", work / "source", work / "target", "broken", out=tmp_path / "out")
        assert nothing_in(tmp_path)

    def test_a_result_that_does_not_load(self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _install(monkeypatch, replace(COPY, name="broken", build=Misshapen))
        with pytest.raises(ValueError, match="trained on a base of other widths"):
            xadapt.transfer(work / "lora", work / "source", work / "target", "broken", out=tmp_path / "out")
        assert nothing_in(tmp_path)


@dataclass(frozen=True)
class Learnt:
    batches: int

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        carried = LORA_X.build(energy=1.0).transfer(adapter, bases)
        evidence = {path: {"batches": float(self.batches), "method": "copied"} for path in carried.evidence}
        return replace(carried, evidence=evidence)


@dataclass(frozen=True, kw_only=True)
class Learning:
    seed: int = 0

    def fit(self, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Learnt:
        return Learnt(sum(1 for batch in batches if batch["input_ids"].shape == (8, 16)))


@dataclass(frozen=True, kw_only=True)
class Either(Learning):
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        return Carried(adapter=adapter)


class TestLearners:
    def test_it_gets_batches_and_may_be_given_none(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _install(monkeypatch, replace(COPY, name="learner", build=Learning))
        given = (work / "lora", work / "source", work / "target", "learner")
        with pytest.raises(ValueError, match=r"'learner' learns from data: pass data=… \(--data\)"):
            xadapt.transfer(*given, out=tmp_path / "out")
        result = xadapt.transfer(*given, out=tmp_path / "out", data=IDS, seed=7)
        assert result.options["seed"] == 7
        assert all(layer.evidence == {"batches": 1.0, "method": "copied"} for layer in result.layers)
        assert result.methods == {"copied": 4}
        assert result.data == "token ids: 8 samples, 128 tokens"

    def test_one_that_can_do_without_data_does(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _install(monkeypatch, replace(COPY, name="either", build=Either))
        given = (work / "lora", work / "source", work / "target", "either")
        assert xadapt.transfer(*given, out=tmp_path / "one").layers[0].evidence == {}
        assert xadapt.transfer(*given, out=tmp_path / "two", data=IDS).layers[0].evidence["batches"] == 1


def _read_vector(path: Path, allow_pickle: bool) -> Adapter:
    file = path / "adapter.vector" if path.is_dir() else path
    return Adapter(kind=VECTOR, config=None, tensors=load_file(file))


def _write_vector(adapter: Adapter, folder: Path) -> None:
    save_file(dict(adapter.tensors), folder / "adapter.vector")


VECTOR = FileKind(
    name="vector", recognises=lambda path: path.suffix == ".vector", read=_read_vector, write=_write_vector
)


@dataclass(frozen=True, kw_only=True)
class Doubled:
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        return Carried(adapter=replace(adapter, tensors={name: 2 * t for name, t in adapter.tensors.items()}))


class TestFormatsOfTheirOwn:
    def test_a_file_kind_is_read_and_written_through_itself(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = Method(name="scale", summary="doubled", paper="none", reads=(VECTOR,), writes=VECTOR, build=Doubled)
        _install(monkeypatch, method)
        save_file({"vector": torch.ones(3)}, tmp_path / "mine.vector")
        result = xadapt.transfer(
            tmp_path / "mine.vector", work / "source", work / "target", "scale", out=tmp_path / "out"
        )
        torch.testing.assert_close(load_file(result.out / "adapter.vector")["vector"], 2 * torch.ones(3))
        assert (result.out / "xadapt_transfer.json").is_file()
        assert result.written == "vector"
