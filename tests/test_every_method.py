"""Registering is being tested: what must hold of every method, and of every kind that one reads or writes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

import xadapt
from xadapt import registry
from xadapt.base import open_base
from xadapt.contract import Adapter, Base, Kind, Learner, Method, Transfer
from xadapt.kinds import PeftKind
from xadapt.siblings import Pair

Logits = Callable[[nn.Module], Tensor]
MakeBase = Callable[..., nn.Module]

every_method = pytest.mark.parametrize(
    "method", [registry.get(name) for name in registry.methods()], ids=lambda m: m.name
)
every_kind = pytest.mark.parametrize(
    "kind", [kind for kind in registry.kinds() if isinstance(kind, PeftKind)], ids=lambda kind: kind.name
)


QUICK = {
    "auto": {"gain": 0.0},  # the models are random, so nothing carries, and it would say so
    "a4a": {"steps": 2, "depth": 1},
    **{name: {"steps": 2} for name in ("distil", "distil_input", "distil_output")},
}  # options that make learning short


def world_of(kind: Kind, llama_like: MakeBase) -> tuple[Adapter, Base, Base, list[dict[str, Any]]]:
    """An adapter of this kind, its source, a target, and something to learn from."""
    if isinstance(kind, PeftKind):
        adapter = trained_adapter(kind, llama_like())
        batches = [{"input_ids": torch.arange(56).reshape(8, 7)}]  # for alignment, as many tokens as features
        return adapter, open_base(llama_like()), open_base(llama_like(seed=1)), batches
    if kind.name == "ip_adapter":
        pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        from tests.a4a_models import batch_for, ip_adapter, pixart_like, sd15_like

        target = pixart_like()
        return ip_adapter(), open_base(sd15_like()), open_base(target), [batch_for(target)]
    pytest.skip(f"no world is made here for adapters of kind {kind.name}; its plug-in has tests of its own")


def config_of(kind: PeftKind) -> PeftConfig:
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    return kind.config()(**options)


def randomise(tensors: Iterable[Tensor]) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(std=0.2)


def trained_adapter(kind: PeftKind, base: nn.Module) -> Adapter:
    """An adapter of that kind whose tensors are all random, detached from the base it was attached to."""
    config = config_of(kind)
    kind.attach(base, config)
    randomise(kind.tensors(base).values())
    return Adapter(kind=kind, config=config, tensors={n: t.detach().clone() for n, t in kind.tensors(base).items()})


class TestMethod:
    @every_method
    def test_it_is_what_its_entry_point_says(self, method: Method) -> None:
        (entry,) = (entry for entry in entry_points(group=registry.GROUP) if entry.name == method.name)
        assert entry.load() is method

    @every_method
    def test_it_can_be_listed(self, method: Method) -> None:
        assert method.name.isidentifier()
        assert method.summary
        assert "\n" not in method.summary
        assert method.paper
        assert method.reads

    @every_method
    def test_its_options_are_the_fields_of_a_dataclass(self, method: Method) -> None:
        assert inspect.isclass(method.build)
        assert dataclasses.is_dataclass(method.build)
        for option in dataclasses.fields(method.build):
            assert option.kw_only, f"{option.name}: options are given by name"
            assert option.default is not dataclasses.MISSING or option.default_factory is not dataclasses.MISSING
        with pytest.raises(TypeError, match="no_such_option"):
            method.build(**{"no_such_option": 1})

    @every_method
    def test_it_carries_an_adapter_and_changes_neither_base(self, method: Method, llama_like: MakeBase) -> None:
        for kind in method.reads:
            adapter, source, target, batches = world_of(kind, llama_like)
            before = copy.deepcopy(dict(adapter.tensors))
            weights = [copy.deepcopy(dict(base.weights())) for base in (source, target)]

            step = method.build()
            if isinstance(step, Learner):
                step = method.build(**QUICK.get(method.name, {})).fit(adapter, Pair(source, target), batches)
            assert isinstance(step, Transfer)
            moved = step.transfer(adapter, Pair(source, target)).adapter

            assert moved.kind == method.writes
            assert moved.tensors
            assert all(torch.isfinite(tensor).all() for tensor in moved.tensors.values())
            assert_same(adapter.tensors, before)
            for base, was in zip((source, target), weights, strict=True):
                assert_same(dict(base.weights()), was)
            if isinstance(method.writes, PeftKind):  # what was written sits on the target
                fresh = llama_like(seed=1)
                method.writes.attach(fresh, moved.config)
                assert {n: t.shape for n, t in method.writes.tensors(fresh).items()} == {
                    n: t.shape for n, t in moved.tensors.items()
                }


class TestKind:
    @every_kind
    def test_its_name_is_its_peft_type(self, kind: PeftKind) -> None:
        peft_type = config_of(kind).peft_type
        assert peft_type is not None
        assert kind.name == kind.name.lower()
        assert kind.serves(peft_type.value)
        assert registry.kind_of(peft_type.value) == kind

    @every_kind
    def test_a_fresh_adapter_does_nothing_and_everything_else_stays(
        self, kind: PeftKind, llama_like: MakeBase, logits: Logits
    ) -> None:
        base = llama_like()
        bare = logits(base)
        weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        kind.attach(base, config_of(kind))
        torch.testing.assert_close(logits(base), bare)
        now = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items()}
        assert_same({name: now[name] for name in weights}, weights)

    @every_kind
    def test_its_tensors_are_live_and_named_by_path(self, kind: PeftKind, llama_like: MakeBase, logits: Logits) -> None:
        base = llama_like()
        modules = dict(base.named_modules())
        bare = logits(base)
        kind.attach(base, config_of(kind))
        tensors = kind.tensors(base)
        assert tensors
        for name in tensors:
            assert any(name.startswith(f"{path}.") for path in modules if path.endswith(("q_proj", "v_proj"))), name
            assert ".default" not in name
        randomise(tensors.values())
        assert not torch.allclose(logits(base), bare)

    @every_kind
    def test_it_trains(self, kind: PeftKind, llama_like: MakeBase) -> None:
        base = llama_like()
        kind.attach(base, config_of(kind))
        live = [parameter for parameter in base.parameters() if parameter.requires_grad]
        ids = torch.arange(14).reshape(2, 7)
        optimizer = torch.optim.AdamW(live, lr=1e-2)
        losses = []
        for _ in range(5):
            loss = base(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    @every_kind
    def test_saved_and_loaded_it_does_the_same(
        self, kind: PeftKind, llama_like: MakeBase, logits: Logits, tmp_path: Path
    ) -> None:
        model = get_peft_model(llama_like(), config_of(kind))
        randomise(parameter for parameter in model.parameters() if parameter.requires_grad)
        model.eval().save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").is_file()
        loaded = xadapt.load(llama_like(), tmp_path)
        assert not torch.allclose(logits(loaded), logits(llama_like()))
        torch.testing.assert_close(logits(loaded), logits(model))


def assert_same(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
