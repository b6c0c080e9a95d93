"""What the decoupled term computes: to the bit nothing without effect, and otherwise Eq. 13."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from tests.a4a_attaching import TARGETS, embeds, every_target, make, processors
from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    pixart_like,
    run,
    sd15_like,
)
from xadapt_a4a import Bank, find_attention_layers


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestExactness:
    @every_target
    def test_without_effect_it_is_the_untouched_target_to_the_bit(self, name: str) -> None:
        target = TARGETS[name]()
        keys = list(target.state_dict())
        before, bare = processors(target), run(target)
        adapter = make(target)
        with adapter.attached(target, adapter.encode(embeds()), 0.0, guidance=False) as attachment:
            assert torch.equal(run(target), bare)
            attachment.set_scale(1.0)
            assert not torch.equal(run(target), bare)
            assert list(target.state_dict()) == keys
            attachment.set_scale([0.0] * len(adapter.config.target_layers))
            assert torch.equal(run(target), bare)
        assert torch.equal(run(target), bare)
        assert all(now is was for now, was in zip(processors(target), before, strict=True))

    @every_target
    def test_the_term_is_computed_as_written(self, name: str) -> None:
        """Z = Attention(q, k, v) + λ Attention(q, k̄, v̄) before the output projection: checked at the last layer."""
        target = TARGETS[name]()
        adapter = make(target)
        bank = adapter.encode(embeds())
        layer = find_attention_layers(target)[-1]
        module, calls = layer.module, []
        handle = module.register_forward_hook(
            lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
        )
        run(target)
        scales = [0.0] * (len(bank.layers) - 1) + [0.7]
        with adapter.attached(target, bank, scales, guidance=False):
            run(target)
        handle.remove()
        (args, kwargs, bare), (_, _, adapted) = calls
        x = args[0] if args else kwargs["hidden_states"]
        query = module.norm_q(module.to_q(x)) if name == "sana" else module.to_q(x)
        query = query.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        query = query if module.norm_q is None or name == "sana" else module.norm_q(query)
        key, value = (t.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in bank.positive[-1])
        term = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        expected = F.linear(0.7 * term, module.to_out[0].weight)
        if isinstance(bare, tuple):
            assert torch.equal(bare[1], adapted[1])
            bare, adapted = bare[0], adapted[0]
        torch.testing.assert_close(adapted - bare, expected, atol=1e-5, rtol=1e-4)

    def test_injecting_the_sources_own_features_is_the_native_ip_adapter(self) -> None:
        unet, state_dict = sd15_like(), base_file(SD15_WIDTHS)
        adapter = make(unet)
        layers = tuple(layer.name for layer in find_attention_layers(unet))
        bank = Bank(layers, tuple(adapter.source(embeds())))
        generator = torch.Generator().manual_seed(7)
        sample = torch.randn(2, 4, 8, 8, generator=generator)
        text = torch.randn(2, 5, 24, generator=generator)
        with adapter.attached(unet, bank, 0.6, guidance=False):
            ours = unet(sample, 500, text).sample
        unet._load_ip_adapter_weights([state_dict], low_cpu_mem_usage=False)
        for processor in unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.6]
        native = unet(sample, 500, text, added_cond_kwargs={"image_embeds": [embeds()[:, None]]}).sample
        torch.testing.assert_close(ours, native)

    @pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
    def test_region_masks_are_those_of_the_native_ip_adapter(self, weights: tuple[float, float]) -> None:
        unet, state_dict = sd15_like(), base_file(SD15_WIDTHS)
        adapter = make(unet)
        two = embeds(2)
        masks = torch.zeros(2, 8, 8)
        masks[0, :, :4], masks[1, :, 4:] = weights
        pairs = tuple((k.flatten(0, 1)[None], v.flatten(0, 1)[None]) for k, v in adapter.source(two))
        bank = Bank(tuple(adapter.config.target_layers), pairs, references=2)
        sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
        with adapter.attached(unet, bank, 0.6, guidance=False, masks=masks):
            ours = unet(sample, 500, text).sample
        unet._load_ip_adapter_weights([state_dict], low_cpu_mem_usage=False)
        for processor in unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [[0.6, 0.6]]
        native = unet(
            sample,
            500,
            text,
            added_cond_kwargs={"image_embeds": [two[None]]},
            cross_attention_kwargs={"ip_adapter_masks": [masks[None]]},
        ).sample
        torch.testing.assert_close(ours, native)

    def test_masks_of_zeros_are_the_untouched_target(self) -> None:
        target = sd15_like()
        adapter, bare = make(target), run(target)
        with adapter.attached(target, adapter.encode(embeds()), guidance=False, masks=torch.zeros(1, 8, 8)):
            assert torch.equal(run(target), bare)
        for masks, error in (
            (torch.ones(2, 8, 8), ValueError),
            ([1], TypeError),
            (torch.ones(1, 8, 8) / 0, ValueError),
        ):
            with pytest.raises(error, match="one per reference"):
                adapter.attach(target, adapter.encode(embeds()), masks=masks)

    def test_maps_once_are_maps_at_every_step(self) -> None:
        target = pixart_like()
        adapter = make(target)
        bank = adapter.encode(embeds())
        with adapter.attached(target, bank, guidance=False):
            once = [run(target, seed=seed) for seed in range(3)]
        for seed, expected in enumerate(once):
            with adapter.attached(target, adapter.encode(embeds()), guidance=False):
                assert torch.equal(run(target, seed=seed), expected)
