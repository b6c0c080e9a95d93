"""FLUX with true_cfg_scale: the two halves of guidance come in two calls, each with its own maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from tests.a4a_attaching import embeds, make
from tests.a4a_models import flux_like, run
from xadapt_a4a import Bank


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_each_call_has_the_maps_of_its_half() -> None:
    target: Any = flux_like()
    adapter = make(target)
    bank = adapter.encode(embeds())
    expected = []
    for maps in (bank.positive, bank.negative):
        assert maps is not None
        with adapter.attached(target, Bank(bank.layers, tuple(maps)), guidance=False):
            expected.append(run(target))
    positive, negative = expected
    assert not torch.allclose(positive, negative)
    with adapter.attached(target, bank, guidance=True, num_images_per_prompt=1):
        torch.testing.assert_close(run(target), positive)
        for name, wanted in (("cond", positive), ("uncond", negative), ("cond", positive)):
            with target.cache_context(name):
                torch.testing.assert_close(run(target), wanted)
        torch.testing.assert_close(run(target), positive)


def test_the_target_announces_nothing_afterwards() -> None:
    target: Any = flux_like()
    one, two = make(target), make(target, seed=1)
    first = one.attach(target, one.encode(embeds()))
    second = two.attach(target, two.encode(embeds()))
    first.detach()
    assert "cache_context" in vars(target)
    second.detach()
    assert "cache_context" not in vars(target)


def test_through_the_stock_pipeline() -> None:
    def random(*shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    target: Any = flux_like()
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe: Any = FluxPipeline(**parts, transformer=target, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    texts = {f"{half}prompt_embeds": random(1, 5, 20, seed=seed) for seed, half in enumerate(("", "negative_"))} | {
        f"{half}pooled_prompt_embeds": random(1, 16, seed=seed) for seed, half in enumerate(("", "negative_"))
    }

    def generate(true_cfg_scale: float) -> Tensor:
        return pipe(
            **{"prompt_embeds": texts["prompt_embeds"], "pooled_prompt_embeds": texts["pooled_prompt_embeds"]},
            **{"negative_prompt_embeds": texts["negative_prompt_embeds"]},
            **{"negative_pooled_prompt_embeds": texts["negative_pooled_prompt_embeds"]},
            **{"latents": random(1, 16, 4, seed=5), "height": 64, "width": 64, "num_images_per_prompt": 1},
            **{"true_cfg_scale": true_cfg_scale, "num_inference_steps": 2, "output_type": "latent"},
        ).images

    adapter = make(target)
    bank = adapter.encode(embeds(1))
    bare = generate(3.0)
    with adapter.attached(target, bank) as attachment:
        guided, plain = generate(3.0), generate(1.0)
        attachment.set_scale(0.0)
        assert torch.equal(generate(3.0), bare)
    assert not torch.allclose(guided, bare)
    with adapter.attached(target, bank, guidance=False):
        torch.testing.assert_close(generate(1.0), plain)
        with pytest.raises(RuntimeError, match=r"second time.*true_cfg_scale.*guidance=True"):
            generate(3.0)
    assert torch.equal(generate(3.0), bare)
