"""Distillation of an adapter's change of behaviour: what it learns, that it resumes exactly, what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tiny.siblings import reparam
from tests.aligned_models import square_llama
from tests.conftest import make_llama, make_unet
from tests.test_every_method import assert_same
from tests.test_weight_methods import attach, lora_on
from xadapt.base import open_base
from xadapt.contract import Adapter
from xadapt.data.counting import with_neutral
from xadapt.siblings import Pair
from xadapt_distil import DISTIL, DISTIL_INPUT, DISTIL_OUTPUT
from xadapt_distil.objective import divergence, noise_error, wanted_log_probs
from xadapt_distil.training import rate


def batches(count: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 64, (4, 8), generator=generator)} for _ in range(count)]


def pair(source: Any = None, target: Any = None) -> Pair:
    return Pair(open_base(source or make_llama()), open_base(target or make_llama(1)))


def distil(adapter: Adapter, bases: Pair, data: Any = None, method: Any = DISTIL, **options: Any) -> Any:
    return method.build(**options).fit(adapter, bases, batches() if data is None else data).transfer(adapter, bases)


class Interrupted(Exception):
    """Stands for Ctrl-C."""


class Breaking:
    """Batches that end the run after a while, once."""

    def __init__(self, data: list[dict[str, Any]], after: int) -> None:
        self.data, self.after, self.read = data, after, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.data:
            self.read += 1
            if self.read == self.after:
                raise Interrupted
            yield batch


class TestObjective:
    def test_the_wish_is_the_target_s_own_plus_the_change_renormalised(self) -> None:
        torch.manual_seed(0)
        bare, before, after = torch.randn(3, 2, 5, 9).unbind()
        found = wanted_log_probs(bare, before, after)
        odds = bare.softmax(-1) * after.softmax(-1) / before.softmax(-1)
        torch.testing.assert_close(found.exp(), odds / odds.sum(-1, keepdim=True))

    def test_without_a_change_it_is_the_target_s_own(self) -> None:
        torch.manual_seed(0)
        bare, before = torch.randn(2, 2, 5, 9).unbind()
        wanted = wanted_log_probs(bare, before, before + 3.0)  # a constant is no change
        torch.testing.assert_close(wanted, bare.log_softmax(-1))
        torch.testing.assert_close(divergence(bare, wanted, None), torch.tensor(0.0), atol=1e-6, rtol=0)

    def test_the_divergence_is_of_the_positions_that_count(self) -> None:
        torch.manual_seed(0)
        student, wanted = torch.randn(2, 2, 5, 9).unbind()
        wanted = wanted.log_softmax(-1)
        mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0.0]])
        each = (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1)
        torch.testing.assert_close(divergence(student, wanted, mask), each[mask > 0].mean())

    def test_of_noise_it_is_the_change_itself(self) -> None:
        torch.manual_seed(0)
        bare, before, after = torch.randn(3, 2, 4, 8, 8).unbind()
        assert noise_error(bare + after - before, bare, before, after) < 1e-12
        torch.testing.assert_close(noise_error(bare, bare, before, after), (after - before).square().mean())

    def test_the_rate_rises_and_falls_to_zero(self) -> None:
        rates = [rate(step, 100) for step in range(100)]
        assert rates[0] == pytest.approx(0.2)
        assert max(rates) == 1.0
        assert rates[-1] < 1e-3


class TestLearning:
    @pytest.mark.parametrize("method", [DISTIL, DISTIL_INPUT, DISTIL_OUTPUT], ids=lambda method: method.name)
    def test_the_student_comes_to_change_the_target_as_the_adapter_changed_the_source(
        self, method: Any, logits: Callable[[nn.Module], Tensor]
    ) -> None:
        """On a sibling in another basis, where the adapter itself is of no use."""
        source, target = square_llama(), reparam(square_llama(), torch.Generator().manual_seed(3))
        adapter = lora_on(square_llama(), ["v_proj", "down_proj"])
        change = logits(attach(square_llama(), adapter)).log_softmax(-1) - logits(source).log_softmax(-1)
        bare = logits(target).log_softmax(-1)
        moved = distil(adapter, pair(source, target), batches(12), method=method, steps=60, lr=1e-2, rank=4)
        learnt = logits(attach(target, moved.adapter)).log_softmax(-1) - bare
        told = moved.evidence[""]
        assert told["loss_at_last"] < 0.7 * told["loss_at_first"]
        assert torch.cosine_similarity(learnt.flatten(), change.flatten(), dim=0) > 0.3

    def test_what_labels_leave_out_is_not_learnt_from(self) -> None:
        adapter, data = lora_on(make_llama(), ["v_proj"]), batches(2)
        neutral = [{"input_ids": batch["input_ids"].flip(1)} for batch in data]
        one = distil(adapter, pair(), data, steps=4)
        other = distil(adapter, pair(), list(with_neutral(data, neutral)), steps=4)
        assert_same(dict(one.adapter.tensors), dict(other.adapter.tensors))
        answers = [{**batch, "labels": torch.where(torch.arange(8) < 5, -100, batch["input_ids"])} for batch in data]
        elsewhere = [{**batch, "labels": torch.where(torch.arange(8) < 2, -100, batch["input_ids"])} for batch in data]
        some, more = (distil(adapter, pair(), given, steps=4) for given in (answers, elsewhere))
        assert not torch.equal(next(iter(some.adapter.tensors.values())), next(iter(more.adapter.tensors.values())))

    def test_several_batches_make_a_step_as_one_larger_does(self) -> None:
        adapter, data = lora_on(make_llama(), ["v_proj"]), batches(4)
        parts = [{"input_ids": part} for batch in data for part in batch["input_ids"].split(2)]
        whole = distil(adapter, pair(), data, steps=6, lr=1e-2)
        found = distil(adapter, pair(), parts, steps=6, lr=1e-2, gradient_accumulation_steps=2)
        for name, tensor in whole.adapter.tensors.items():
            torch.testing.assert_close(found.adapter.tensors[name], tensor, rtol=1e-3, atol=1e-5)
        assert found.evidence[""]["loss_at_last"] == pytest.approx(whole.evidence[""]["loss_at_last"], rel=1e-4)

    def test_a_denoiser(self, noise: Callable[[nn.Module], Tensor]) -> None:
        pytest.importorskip("diffusers")
        generator = torch.Generator().manual_seed(0)
        data = [
            {
                "sample": torch.randn(2, 4, 8, 8, generator=generator),
                "timestep": torch.tensor([step]),
                "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
            }
            for step in (10, 500)
        ]
        adapter = lora_on(make_unet(), ["to_k", "to_v", "to_out.0"])
        bases = pair(make_unet(), make_unet(1))
        moved = distil(adapter, bases, data, steps=30, lr=2e-2)
        assert moved.evidence[""]["loss_at_last"] < 0.8 * moved.evidence[""]["loss_at_first"]
        assert not torch.allclose(noise(attach(make_unet(1), moved.adapter)), noise(make_unet(1)))

    def test_by_default_it_stands_on_the_counterparts(self) -> None:
        adapter = lora_on(make_llama(layers=3), ["v_proj"])
        moved = distil(adapter, pair(make_llama(layers=3), make_llama(1, layers=2)), steps=1)
        layers = {name.partition(".lora_")[0] for name in moved.adapter.tensors}
        assert layers == {f"model.layers.{index}.self_attn.v_proj" for index in (0, 1)}

    @pytest.mark.parametrize(("targets", "count"), [("o_proj", 2), ("o_proj, up_proj", 4), (r".*\.1\..*up_proj", 1)])
    def test_or_where_it_is_told_to(self, targets: str, count: int) -> None:
        moved = distil(lora_on(make_llama(), ["v_proj"]), pair(), steps=1, targets=targets, rank=3, alpha=6)
        assert len(moved.adapter.tensors) == 2 * count
        assert moved.adapter.config.lora_alpha == 6
        assert {min(tensor.shape) for tensor in moved.adapter.tensors.values()} == {3}

    def test_both_networks_are_as_they_were(self) -> None:
        source, target = make_llama(), make_llama(1).train()
        target.lm_head.weight.requires_grad_(False)
        was = [copy.deepcopy(network.state_dict()) for network in (source, target)]
        distil(lora_on(make_llama(), ["v_proj"]), pair(source, target), steps=2)
        for network, before in zip((source, target), was, strict=True):
            assert_same(dict(network.state_dict()), before)
            assert not hasattr(network, "peft_config")
        assert target.training
        assert not source.training
        assert not target.lm_head.weight.requires_grad
        assert target.model.embed_tokens.weight.requires_grad
        assert target.model.embed_tokens.weight.grad is None

    def test_the_seed_decides(self) -> None:
        adapter = lora_on(make_llama(), ["v_proj"])
        one, again, other = (distil(adapter, pair(), steps=3, seed=seed).adapter.tensors for seed in (1, 1, 2))
        assert_same(dict(one), dict(again))
        assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


class TestResuming:
    @pytest.mark.parametrize("accumulated", [1, 3])
    def test_an_interrupted_run_ends_in_the_same_adapter(self, accumulated: int, tmp_path: Path) -> None:
        adapter, data = lora_on(make_llama(), ["v_proj"]), batches(4)
        options: dict[str, Any] = {"steps": 10, "save_every": 3, "lr": 1e-2, "weight_decay": 0.1}
        options["gradient_accumulation_steps"] = accumulated
        whole = distil(adapter, pair(), data, **options)
        folder = str(tmp_path / "state")
        with pytest.raises(Interrupted):
            distil(adapter, pair(), Breaking(data, 9 * accumulated), checkpoint=folder, **options)
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["distil.safetensors"]
        resumed = distil(adapter, pair(), data, checkpoint=folder, **options)
        assert_same(dict(resumed.adapter.tensors), dict(whole.adapter.tensors))
        assert resumed.evidence == whole.evidence

    def test_a_finished_run_is_only_read(self, tmp_path: Path) -> None:
        adapter = lora_on(make_llama(), ["v_proj"])
        first = distil(adapter, pair(), steps=4, checkpoint=str(tmp_path))
        again = distil(adapter, pair(), Breaking(batches(), 2), steps=4, checkpoint=str(tmp_path))
        assert_same(dict(first.adapter.tensors), dict(again.adapter.tensors))

    @pytest.mark.parametrize(
        ("change", "text"),
        [({"lr": 0.5}, "lr was 0.001, now 0.5"), ({"rank": 2}, "rank was 8, now 2"), ({}, "first_batch was")],
    )
    def test_another_run_s_state_is_refused(self, change: dict[str, Any], text: str, tmp_path: Path) -> None:
        adapter = lora_on(make_llama(), ["v_proj"])
        distil(adapter, pair(), steps=1, checkpoint=str(tmp_path))
        data = batches() if change else batches(4)[3:]
        with pytest.raises(ValueError, match=text):
            distil(adapter, pair(), data, **{"steps": 1, "checkpoint": str(tmp_path), **change})

    def test_other_labels_are_other_data(self, tmp_path: Path) -> None:
        adapter = lora_on(make_llama(), ["v_proj"])
        distil(adapter, pair(), steps=1, checkpoint=str(tmp_path))
        data = [{**one, "labels": torch.where(torch.arange(8) < 5, -100, one["input_ids"])} for one in batches()]
        with pytest.raises(ValueError, match="first_batch was"):
            distil(adapter, pair(), data, steps=1, checkpoint=str(tmp_path))

    def test_a_damaged_state_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "distil.safetensors").write_bytes(b"no tensors")
        with pytest.raises(ValueError, match="is no state of a distillation"):
            distil(lora_on(make_llama(), ["v_proj"]), pair(), steps=1, checkpoint=str(tmp_path))


class TestErrors:
    def fails(self, data: Any = None, bases: Pair | None = None, **options: Any) -> str:
        adapter = lora_on(make_llama(), ["v_proj"])
        with pytest.raises((TypeError, ValueError)) as caught:
            distil(adapter, bases or pair(), data, **{"steps": 2, **options})
        return str(caught.value)

    def test_no_batch(self) -> None:
        assert "not one batch" in self.fails([])

    def test_labels_that_leave_out_everything(self) -> None:
        data = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in batches()]
        assert "the labels of all batches are -100 throughout" in self.fails(data)

    def test_an_iterator(self) -> None:
        assert "read only once" in self.fails(iter(batches()))

    def test_no_dict(self) -> None:
        assert "a dict of arguments" in self.fails([torch.arange(3)])

    def test_another_vocabulary(self) -> None:
        from transformers import LlamaForCausalLM

        config = make_llama().config.__class__(**{**make_llama().config.to_dict(), "vocab_size": 80})
        text = self.fails(bases=pair(target=LlamaForCausalLM(config).eval()))
        assert "vocabularies have 64 and 80 tokens" in text

    def test_a_network_without_answers(self) -> None:
        adapter = lora_on(make_llama().model, ["v_proj"])
        with pytest.raises(ValueError, match="without logits or sample"):
            distil(adapter, pair(make_llama().model, make_llama(1).model), steps=2)

    def test_a_loss_that_is_not_finite(self) -> None:
        broken = make_llama(1)
        with torch.no_grad():
            broken.lm_head.weight[0] = float("inf")
        assert "The loss at step 0 is nan" in self.fails(bases=pair(target=broken))

    def test_the_same_network_twice(self) -> None:
        model = make_llama()
        assert "the same live network" in self.fails(bases=pair(model, model))

    def test_an_adapter_that_is_not_the_source_s(self) -> None:
        assert "does not fit the source" in self.fails(bases=pair(source=make_llama(hidden_size=48)))

    def test_another_adapter(self) -> None:
        bases = pair()
        learnt = DISTIL.build(steps=1).fit(lora_on(make_llama(), ["v_proj"]), bases, batches())
        with pytest.raises(ValueError, match="learnt from another adapter"):
            learnt.transfer(lora_on(make_llama(), ["q_proj"]), bases)

    @pytest.mark.parametrize(
        "options",
        [{"rank": 0}, {"steps": 1.5}, {"save_every": True}, {"lr": 0}, {"temperature": float("inf")}, {"alpha": -1}],
    )
    def test_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            DISTIL.build(**options)
