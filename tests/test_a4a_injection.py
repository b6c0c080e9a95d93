"""Maps on a live target, and that nothing stays behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from tests.a4a_attaching import embeds, make, processors
from tests.a4a_models import (
    pixart_like,
    run,
    sd15_like,
)
from xadapt_a4a.processors import Decoupled


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestAttaching:
    def test_several_adapters_add_up_and_leave_in_any_order(self) -> None:
        target = sd15_like()
        bare, before = run(target), processors(target)
        first, second = make(target), make(target, seed=5)
        one = first.attach(target, first.encode(embeds()), guidance=False)
        alone = run(target)
        two = second.attach(target, second.encode(embeds()), 0.0, guidance=False)
        assert torch.equal(run(target), alone)
        two.set_scale(1.0)
        both = run(target)
        assert not torch.allclose(both, alone)
        one.detach()
        assert not torch.allclose(run(target), both)
        two.detach()
        assert torch.equal(run(target), bare)
        assert all(now is was for now, was in zip(processors(target), before, strict=True))

    def test_one_adapter_twice_is_refused(self) -> None:
        target = sd15_like()
        adapter = make(target)
        with (
            adapter.attached(target, adapter.encode(embeds())),
            pytest.raises(RuntimeError, match="attached to this target already"),
        ):
            adapter.attach(target, adapter.encode(embeds()))

    def test_detached_maps_are_detached(self) -> None:
        target = sd15_like()
        adapter = make(target)
        attachment = adapter.attach(target, adapter.encode(embeds()))
        attachment.detach()
        with pytest.raises(RuntimeError, match="detached already"):
            attachment.detach()
        with pytest.raises(RuntimeError, match="Attach the adapter again"):
            attachment.set_scale(0.5)
        with pytest.raises(RuntimeError, match="Attach the adapter again"), attachment:
            pass

    def test_a_detached_adapter_keeps_no_target_alive(self) -> None:
        target = pixart_like()
        adapter = make(target)
        with adapter.attached(target, adapter.encode(embeds())):
            pass
        gone = weakref.ref(target)
        del target
        gc.collect()
        assert gone() is None

    def test_an_error_inside_the_block_leaves_the_target_clean(self) -> None:
        target = sd15_like()
        adapter, bare = make(target), run(target)
        with pytest.raises(KeyError), adapter.attached(target, adapter.encode(embeds())):
            raise KeyError
        assert torch.equal(run(target), bare)

    def test_processors_made_anew_are_empty_ones(self) -> None:
        target = sd15_like()
        adapter, bare = make(target), run(target)
        adapter.attach(target, adapter.encode(embeds()))
        target.set_attn_processor({name: type(p)() for name, p in target.attn_processors.items()})
        target._forward_pre_hooks.clear()
        assert any(isinstance(processor, Decoupled) for processor in processors(target))
        assert torch.equal(run(target), bare)

    def test_scale_of_the_adapter_is_that_of_what_is_attached(self) -> None:
        target = sd15_like()
        adapter, bare = make(target), run(target)
        with adapter.attached(target, adapter.encode(embeds()), guidance=False):
            adapter.set_scale(0.0)
            assert torch.equal(run(target), bare)
        with adapter.attached(target, adapter.encode(embeds()), guidance=False):
            assert torch.equal(run(target), bare)
            adapter.set_scale({"down": {"block_1": 1.0}})
            assert not torch.equal(run(target), bare)
