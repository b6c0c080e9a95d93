"""The contract: light to import, small, and its few rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest

from xadapt import contract
from xadapt.contract import Adapter, Carried, Kind, Learner, Method, Siblings, Transfer
from xadapt.kinds import PeftKind


def _unused(*_: Any) -> Any:
    raise AssertionError("the contract itself calls nothing")


def kind(name: str) -> PeftKind:
    return PeftKind(name=name, config=_unused, attach=_unused, tensors=_unused)


@dataclass(frozen=True, kw_only=True)
class Step:
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        return Carried(adapter=adapter)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    def fit(self, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Transfer:
        return Step()


def method(reads: tuple[Kind, ...], writes: Kind) -> Method:
    return Method(name="m", summary="", paper="", reads=reads, writes=writes, build=Step)


def test_it_imports_neither_torch_nor_peft(run_python: Callable[..., str]) -> None:
    printed = run_python("import sys, xadapt.contract; print({'torch', 'peft', 'transformers'} & set(sys.modules))")
    assert printed.strip() == "set()"


def test_it_stays_short_enough_to_read() -> None:
    assert len(Path(contract.__file__).read_text().splitlines()) < 100


@pytest.mark.parametrize(
    ("peft_type", "served"),
    [
        ("INPUT_ADA", True),
        ("INPUT_ADA_LOHA", True),
        ("INPUT_ADAPT", False),
        ("OUTPUT_ADA", False),
        ("input_ada", False),
        ("", False),
    ],
)
def test_a_kind_serves_its_type_and_its_family(peft_type: str, served: bool) -> None:
    assert kind("input_ada").serves(peft_type) is served


def test_a_method_names_each_kind_once() -> None:
    lora, ada = kind("lora"), kind("input_ada")
    assert method((lora, ada), ada).kinds == (lora, ada)
    assert method((lora,), ada).kinds == (lora, ada)


def test_what_must_learn_is_told_by_its_shape() -> None:
    assert isinstance(Step(), Transfer)
    assert not isinstance(Step(), Learner)
    assert isinstance(Lesson(), Learner)
    assert not isinstance(Lesson(), Transfer)


def test_specs_are_frozen_and_named() -> None:
    lora = kind("lora")
    with pytest.raises(FrozenInstanceError):
        lora.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        PeftKind("lora", _unused, _unused, _unused)  # type: ignore[misc]
