"""The method `a4a` and its training loop, on tiny targets of every objective."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    batch_for,
    faceid_plus_file,
    flat,
    ip_adapter,
    pixart_like,
    plus_file,
    sd3_like,
    sd15_like,
    sdxl_like,
)
from xadapt.base import LiveBase
from xadapt.contract import Adapter, Learner, Method, Transfer
from xadapt_a4a import A4A, A4A_KIND, IP_ADAPTER, A4AModel, TrainA4A
from xadapt_a4a.objective import objective_of, predict
from xadapt_a4a.training import check_batch, drop_images

QUICK = {"steps": 3, "depth": 1, "lr1": 1e-3, "lr2": 1e-3}


class TestMethod:
    def test_looking_at_it_imports_no_torch(self) -> None:
        code = "import sys, xadapt_a4a; xadapt_a4a.A4A; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_it_is_ready_to_be_registered(self) -> None:
        assert isinstance(A4A, Method)
        assert (A4A.name, A4A.reads, A4A.writes) == ("a4a", (IP_ADAPTER,), A4A_KIND)
        assert isinstance(TrainA4A(), Learner)
        for option in dataclasses.fields(TrainA4A):
            assert option.kw_only
            assert option.default is not dataclasses.MISSING

    @pytest.mark.parametrize("make_target", [sd15_like, sdxl_like, pixart_like, sd3_like])
    def test_it_learns_and_changes_neither_target_nor_adapter(self, make_target: Any) -> None:
        target = make_target()
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        adapter = ip_adapter()
        kept = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
        learned = TrainA4A(**QUICK).fit(adapter, LiveBase(sd15_like()), LiveBase(target), [batch_for(target)])
        assert isinstance(learned, Transfer)
        assert isinstance(learned, nn.Module)
        moved = learned.transfer(adapter, LiveBase(sd15_like()), LiveBase(target))
        assert moved.kind is A4A_KIND
        model = A4AModel(**moved.config)
        model.load_state_dict(dict(moved.tensors))
        assert len(learned.losses) == 3
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
        assert all(parameter.requires_grad for parameter in target.parameters())
        assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter.tensors.items())
        source = model.source.state_dict()
        assert not torch.equal(source["to_k_ip.0.weight"], adapter.tensors["ip_adapter.1.to_k_ip.weight"])

    def test_the_loss_falls(self) -> None:
        target = pixart_like()
        learned = TrainA4A(**{**QUICK, "steps": 60, "lr1": 1e-2, "lr2": 1e-2, "image_drop": 0.0}).fit(
            ip_adapter(), LiveBase(target), LiveBase(target), [batch_for(target)]
        )
        assert sum(learned.losses[-10:]) < 0.95 * sum(learned.losses[:10])

    def test_a_seed_says_everything(self) -> None:
        def losses(seed: int) -> list[float]:
            target = pixart_like()
            return TrainA4A(**QUICK, seed=seed).fit(
                ip_adapter(), LiveBase(target), LiveBase(target), [batch_for(target), batch_for(target, seed=1)]
            ).losses  # fmt: skip

        assert losses(0) == losses(0) != losses(1)

    def test_a_frozen_source_stays(self) -> None:
        target = pixart_like()
        options = TrainA4A(**QUICK, train_pta=False)
        learned = options.fit(ip_adapter(), LiveBase(target), LiveBase(target), [batch_for(target)])
        moved = learned.transfer(ip_adapter(), LiveBase(target), LiveBase(target))
        kept = flat(base_file(SD15_WIDTHS))["ip_adapter.1.to_k_ip.weight"]
        assert torch.equal(moved.tensors["source.to_k_ip.0.weight"], kept)

    def test_what_is_missing_is_named(self) -> None:
        target = LiveBase(pixart_like())
        with pytest.raises(ValueError, match="reads adapters of kind 'ip_adapter', not 'a4a'"):
            TrainA4A().fit(Adapter(kind=A4A_KIND, config={}, tensors={}), target, target, [])
        with pytest.raises(ValueError, match="no batch to train on"):
            TrainA4A(**QUICK).fit(ip_adapter(), target, target, [])
        with pytest.raises(ValueError, match="ended after 1 steps"):
            TrainA4A(**QUICK).fit(ip_adapter(), target, target, iter([batch_for(target.module())]))
        learned = TrainA4A(**QUICK).fit(ip_adapter(), target, target, [batch_for(target.module())])
        with pytest.raises(ValueError, match="learnt for another IP-Adapter"):
            learned.transfer(ip_adapter(seed=3), target, target)
        broken = {**batch_for(target.module()), "latents": torch.full((4, 4, 8, 8), torch.nan)}
        with pytest.raises(ValueError, match="The loss is nan"):
            TrainA4A(**QUICK).fit(ip_adapter(), target, target, [broken])


class TestObjective:
    def test_it_is_the_targets_own(self) -> None:
        assert objective_of(sd15_like()).prediction == "epsilon"
        assert objective_of(pixart_like()).schedule.config.beta_schedule == "linear"
        assert objective_of(sd15_like()).schedule.config.beta_schedule == "scaled_linear"
        assert objective_of(sd3_like()).prediction == "flow"
        assert objective_of(sd15_like(), "v_prediction").prediction == "v_prediction"
        with pytest.raises(ValueError, match="prediction='auto' or prediction='epsilon'"):
            objective_of(sd15_like(), "sample")

    def test_a_schedulers_folder_says_it(self, tmp_path: Path) -> None:
        from diffusers import DDIMScheduler

        DDIMScheduler(prediction_type="v_prediction", beta_end=0.01).save_pretrained(tmp_path)
        objective = objective_of(sd15_like(), scheduler=str(tmp_path))
        assert objective.prediction == "v_prediction"
        assert objective.schedule.config.beta_end == 0.01

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
    def test_the_goal_gives_the_latents_back(self, prediction: str) -> None:
        objective = objective_of(sd15_like(), prediction)
        latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
        noisy, times, goal = objective.noisy(latents, noise, torch.Generator().manual_seed(0))
        if prediction == "flow":
            clean = noisy - (times / 1000).view(-1, 1, 1, 1) * goal
        else:
            alpha = objective.schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
            known = (noisy - (1 - alpha).sqrt() * goal) / alpha.sqrt()
            clean = known if prediction == "epsilon" else alpha.sqrt() * noisy - (1 - alpha).sqrt() * goal
        torch.testing.assert_close(clean, latents, atol=1e-3, rtol=1e-3)

    def test_the_variance_that_pixart_also_predicts_is_left_out(self) -> None:
        target = pixart_like()
        assert predict(target, torch.randn(4, 4, 8, 8), torch.ones(4), batch_for(target)).shape == (4, 4, 8, 8)

    def test_what_the_target_does_not_take_is_named(self) -> None:
        target = sd15_like()
        batch = {**batch_for(target), "encoder_attention_maks": torch.ones(4, 5)}
        with pytest.raises(ValueError, match="Did you mean 'encoder_attention_mask'"):
            predict(target, batch["latents"], torch.ones(4), batch)


class TestBatch:
    def test_parts_that_are_missing_or_do_not_match(self) -> None:
        batch = batch_for(sd15_like())
        check_batch(batch)
        with pytest.raises(ValueError, match="latents missing, there is image_embeds"):
            check_batch({name: value for name, value in batch.items() if name != "latents"})
        with pytest.raises(ValueError, match="'image_embeds': 3"):
            check_batch({**batch, "image_embeds": torch.ones(3, 16)})
        with pytest.raises(TypeError, match="got list"):
            check_batch([batch])

    def test_dropped_images_are_zeros(self) -> None:
        generator = torch.Generator().manual_seed(0)
        model = A4AModel.from_ip_adapter(base_file(SD15_WIDTHS), pixart_like(), depth=1)
        batch = {"image_embeds": torch.ones(1000, 2)}
        dropped, _ = drop_images(model, batch, 0.3, generator)
        assert 0.25 < (dropped == 0).all(1).float().mean() < 0.35
        assert drop_images(model, batch, 0.0, generator)[0] is batch["image_embeds"]
        with pytest.raises(ValueError, match="image_drop=5"):
            drop_images(model, batch, 5, generator)

    def test_dropped_hidden_states_are_the_empty_images(self) -> None:
        generator = torch.Generator().manual_seed(0)
        model = A4AModel.from_ip_adapter(plus_file(SD15_WIDTHS), pixart_like(), depth=1)
        batch = {"image_embeds": torch.ones(8, 9, 16)}
        with pytest.raises(ValueError, match="needs negative_image_embeds in the batch"):
            drop_images(model, batch, 0.5, generator)
        dropped, _ = drop_images(model, {**batch, "negative_image_embeds": torch.full((1, 9, 16), 2.0)}, 1.0, generator)
        assert (dropped == 2).all()
        face = A4AModel.from_ip_adapter(faceid_plus_file(SD15_WIDTHS), pixart_like(), depth=1)
        batch = {"image_embeds": torch.ones(8, 16), "clip_embeds": torch.ones(8, 9, 20)}
        with pytest.raises(ValueError, match="needs negative_clip_embeds"):
            drop_images(face, batch, 0.5, generator)
        image, clip = drop_images(face, {**batch, "negative_clip_embeds": torch.zeros(1, 9, 20)}, 0.5, generator)
        assert torch.equal(image[:, 0], clip[:, 0, 0])
        assert 0 < image[:, 0].sum() < 8
