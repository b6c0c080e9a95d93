"""The method `a4a` and its training loop, on tiny targets of every objective."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    batch_for,
    faceid_plus_file,
    flat,
    flux_like,
    ip_adapter,
    pixart_like,
    plus_file,
    sd3_like,
    sd15_like,
    sdxl_like,
)
from xadapt.base import LiveBase
from xadapt.contract import Adapter, Learner, Method, Transfer
from xadapt.siblings import Pair
from xadapt_a4a import A4A, A4A_KIND, IP_ADAPTER, A4AModel, TrainA4A
from xadapt_a4a.dropping import Drops, check_drops, default_drop, without_images, without_text
from xadapt_a4a.objective import objective_of, predict
from xadapt_a4a.training import check_batch, train


def pair(target: nn.Module) -> Pair:
    return Pair(None, LiveBase(target))  # the source is never opened


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
        learned = TrainA4A(**QUICK).fit(adapter, Pair(LiveBase(sd15_like()), LiveBase(target)), [batch_for(target)])
        assert isinstance(learned, Transfer)
        assert isinstance(learned, nn.Module)
        moved = learned.transfer(adapter, Pair(None, LiveBase(target))).adapter
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
            ip_adapter(), Pair(None, LiveBase(target)), [batch_for(target)]
        )
        assert sum(learned.losses[-10:]) < 0.95 * sum(learned.losses[:10])

    def test_a_seed_says_everything(self) -> None:
        def losses(seed: int) -> list[float]:
            target = pixart_like()
            return TrainA4A(**QUICK, seed=seed).fit(
                ip_adapter(), Pair(None, LiveBase(target)), [batch_for(target), batch_for(target, seed=1)]
            ).losses  # fmt: skip

        assert losses(0) == losses(0) != losses(1)

    def test_the_plain_loop_trains_as_well(self) -> None:
        target = pixart_like()
        target.train()
        model = A4AModel.from_ip_adapter(base_file(SD15_WIDTHS), target, depth=1)
        losses = train(
            model,
            target,
            [batch_for(target)],
            objective_of(target),
            optimizer=torch.optim.AdamW(model.param_groups(1e-2, 1e-2)),
            steps=40,
            generator=torch.Generator().manual_seed(0),
            image_drop=0.1,
        )
        assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
        assert target.training
        assert not model.training

    def test_a_frozen_source_stays(self) -> None:
        target = pixart_like()
        options = TrainA4A(**QUICK, train_pta=False)
        learned = options.fit(ip_adapter(), Pair(None, LiveBase(target)), [batch_for(target)])
        moved = learned.transfer(ip_adapter(), Pair(None, LiveBase(target))).adapter
        kept = flat(base_file(SD15_WIDTHS))["ip_adapter.1.to_k_ip.weight"]
        assert torch.equal(moved.tensors["source.to_k_ip.0.weight"], kept)

    def test_what_is_missing_is_named(self) -> None:
        target = pixart_like()
        bases = pair(target)
        with pytest.raises(ValueError, match="reads adapters of kind 'ip_adapter', not 'a4a'"):
            TrainA4A().fit(Adapter(kind=A4A_KIND, config={}, tensors={}), bases, [])
        with pytest.raises(ValueError, match="no batch to train on"):
            TrainA4A(**QUICK).fit(ip_adapter(), bases, [])
        with pytest.raises(ValueError, match="ended after 1 steps"):
            TrainA4A(**QUICK).fit(ip_adapter(), bases, iter([batch_for(target)]))
        with pytest.raises(TypeError, match="Put a single batch into a list"):
            TrainA4A(**QUICK).fit(ip_adapter(), bases, batch_for(target))
        learned = TrainA4A(**QUICK).fit(ip_adapter(), bases, [batch_for(target)])
        with pytest.raises(ValueError, match="learnt for another IP-Adapter"):
            learned.transfer(ip_adapter(seed=3), bases)

    def test_a_loss_that_is_no_number_says_whose_fault_it_is(self) -> None:
        target = pixart_like()
        broken = {**batch_for(target), "latents": torch.full((4, 4, 8, 8), torch.nan)}
        with pytest.raises(ValueError, match=r"The loss is nan; the batch's latents hold NaN"):
            TrainA4A(**QUICK).fit(ip_adapter(), pair(target), [broken])
        with pytest.raises(ValueError, match=r"The loss is nan; lower the learning rates"):
            TrainA4A(**{**QUICK, "lr1": 1e30}).fit(ip_adapter(), pair(target), [batch_for(target)])


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
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        DDIMScheduler(prediction_type="v_prediction", beta_end=0.01).save_pretrained(tmp_path)
        objective = objective_of(sd15_like(), scheduler=str(tmp_path))
        assert objective.prediction == "v_prediction"
        assert objective.schedule.config.beta_end == 0.01
        DDIMScheduler(prediction_type="sample").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="prediction='epsilon'"):
            objective_of(sd15_like(), scheduler=str(tmp_path))
        FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
        assert objective_of(sd15_like(), "auto", str(tmp_path), "scheduler").prediction == "flow"
        with pytest.raises(ValueError, match="schedule of flow matching"):
            objective_of(sd15_like(), "epsilon", str(tmp_path / "scheduler"))

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

    def test_flux_is_told_the_time_from_0_to_1(self) -> None:
        target = flux_like()
        seen: list[Tensor] = []
        hook = target.time_text_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        batch = {
            "latents": torch.randn(2, 16, 4),
            "encoder_hidden_states": torch.randn(2, 5, 20),
            "pooled_projections": torch.randn(2, 16),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        }
        objective = objective_of(target)
        assert objective.prediction == "flow"
        _, times, _ = objective.noisy(batch["latents"], batch["latents"], torch.Generator().manual_seed(0))
        assert predict(target, batch["latents"], times, batch).shape == (2, 16, 4)
        torch.testing.assert_close(seen[0], times)  # it multiplies by 1000 itself before it embeds
        hook.remove()

    def test_a_target_in_half_precision_is_given_what_it_computes_in(self) -> None:
        target = pixart_like().to(torch.bfloat16)
        predicted = predict(target, torch.randn(4, 4, 8, 8), torch.ones(4), batch_for(target))
        assert predicted.dtype is torch.bfloat16

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
        with pytest.raises(ValueError, match="no sample in it"):
            check_batch({name: value[:0] for name, value in batch.items() if isinstance(value, torch.Tensor)})


class TestDrops:
    def test_at_most_one_of_three_happens_to_a_sample(self) -> None:
        no_image, no_text = Drops(0.3, 0.2, 0.1).choose(4000, torch.Generator().manual_seed(0))
        both = (no_image & no_text).float().mean()
        # Four standard deviations of a share of 4000 are at most .03.
        assert abs(no_image.float().mean() - 0.4) < 0.03
        assert abs(no_text.float().mean() - 0.3) < 0.03
        assert abs(both - 0.1) < 0.03
        assert not Drops().choose(5, torch.Generator())[0].any()
        for wrong in ({"image": 5}, {"text": -0.1}, {"both": float("nan")}):
            with pytest.raises(ValueError, match="is no share"):
                Drops(**wrong)
        with pytest.raises(ValueError, match="is more than 1"):
            Drops(0.5, 0.5, 0.5)

    def test_a_sample_loses_the_same_whatever_batch_it_is_in(self) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        whole = Drops(0.5, 0.2).choose(6, generators)[0]
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        halves = [Drops(0.5, 0.2).choose(3, generators[:3])[0], Drops(0.5, 0.2).choose(3, generators[3:])[0]]
        assert torch.equal(whole, torch.cat(halves))

    def test_dropped_images_are_zeros(self) -> None:
        lost = torch.tensor([True, False, True])
        images, clip = without_images({"image_embeds": torch.ones(3, 2)}, lost)
        assert images.tolist() == [[0, 0], [1, 1], [0, 0]]
        assert clip is None

    def test_dropped_hidden_states_are_the_empty_images(self) -> None:
        model = A4AModel.from_ip_adapter(plus_file(SD15_WIDTHS), pixart_like(), depth=1)
        batch = {"image_embeds": torch.ones(2, 9, 16)}
        with pytest.raises(ValueError, match="needs negative_image_embeds in the batch"):
            check_drops(model, batch, Drops(0.5))
        batch["negative_image_embeds"] = torch.full((1, 9, 16), 2.0)
        check_drops(model, batch, Drops(0.5))
        images, _ = without_images(batch, torch.tensor([True, False]))
        assert (images[0] == 2).all()
        assert (images[1] == 1).all()
        face = A4AModel.from_ip_adapter(faceid_plus_file(SD15_WIDTHS), pixart_like(), depth=1)
        batch = {"image_embeds": torch.ones(2, 16), "clip_embeds": torch.ones(2, 9, 20)}
        with pytest.raises(ValueError, match="needs negative_clip_embeds"):
            check_drops(face, batch, Drops(0.5))
        images, clip = without_images(
            {**batch, "negative_clip_embeds": torch.zeros(1, 9, 20)}, torch.tensor([True, False])
        )
        assert images[:, 0].tolist() == clip[:, 0, 0].tolist() == [0, 1]

    def test_dropped_texts_are_the_empty_prompts_all_through(self) -> None:
        target = sdxl_like()
        batch = batch_for(target, size=2)
        model = A4AModel.from_ip_adapter(base_file(SD15_WIDTHS), target, depth=1)
        with pytest.raises(ValueError, match=r"text_drop=0\.5 needs empty_text in the batch"):
            check_drops(model, batch, Drops(0, 0.5))
        empty = {
            "encoder_hidden_states": torch.zeros(1, 5, 40),
            "added_cond_kwargs": {"text_embeds": torch.full((1, 16), 3.0)},
        }
        lost = without_text({**batch, "empty_text": empty}, torch.tensor([False, True]))
        assert "empty_text" not in lost
        assert (lost["encoder_hidden_states"][1] == 0).all()
        assert torch.equal(lost["encoder_hidden_states"][0], batch["encoder_hidden_states"][0])
        assert (lost["added_cond_kwargs"]["text_embeds"][1] == 3).all()
        assert torch.equal(lost["added_cond_kwargs"]["time_ids"], batch["added_cond_kwargs"]["time_ids"])
        short = {"encoder_hidden_states": torch.zeros(1, 4, 40)}
        with pytest.raises(ValueError, match="pad the empty prompt"):
            without_text({**batch, "empty_text": short}, torch.tensor([False, True]))
        with pytest.raises(ValueError, match="holds 'text', which the batch itself lacks"):
            without_text({**batch, "empty_text": {"text": torch.zeros(1)}}, torch.tensor([False, True]))

    def test_text_is_dropped_by_default_where_there_is_an_empty_one(self) -> None:
        assert default_drop(None, {}) == 0
        assert default_drop(None, {"empty_text": {}}) == 0.05
        assert default_drop(0.2, {}) == 0.2
