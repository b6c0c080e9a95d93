"""Maps on a live target: which layers, what is computed, and that nothing stays behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    flux_like,
    hunyuan_like,
    pixart_like,
    plus_file,
    run,
    sana_like,
    sd3_like,
    sd15_like,
    sdxl_like,
)
from xadapt_a4a import A4AModel, Bank, find_attention_layers
from xadapt_a4a.processors import Decoupled

TARGETS: dict[str, Callable[..., nn.Module]] = {
    "sd15": sd15_like,
    "sdxl": sdxl_like,
    "pixart": pixart_like,
    "sd3": sd3_like,
    "flux": flux_like,
    "sana": sana_like,
    "hunyuan": hunyuan_like,
}
every_target = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make(target: nn.Module, seed: int = 0, **options: Any) -> A4AModel:
    torch.manual_seed(seed)
    return A4AModel.from_ip_adapter(base_file(SD15_WIDTHS), target, **{"depth": 1, **options}).eval()


def embeds(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 16, generator=torch.Generator().manual_seed(seed))


def processors(target: nn.Module) -> list[Any]:
    return [module.processor for module in target.modules() if hasattr(module, "processor")]


class TestLayers:
    def test_widths_and_order_are_the_models(self) -> None:
        assert [layer.width for layer in find_attention_layers(sd15_like())] == SD15_WIDTHS
        assert [layer.width for layer in find_attention_layers(pixart_like())] == [48] * 3
        names = [layer.name for layer in find_attention_layers(sd15_like())]
        assert names[0].startswith("down_blocks")
        assert names[-1].startswith("mid_block")

    def test_self_attention_beside_joint_attention_is_left_alone(self) -> None:
        """The `attn2` of SD3.5-medium attends to the image itself."""
        names = [layer.name for layer in find_attention_layers(sd3_like())]
        assert names == [f"transformer_blocks.{index}.attn" for index in range(3)]

    def test_single_blocks_of_flux_are_left_out(self) -> None:
        names = [layer.name for layer in find_attention_layers(flux_like())]
        assert names == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]

    def test_targets_without_cross_attention_are_refused(self) -> None:
        unet = sd15_like(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            mid_block_type=None,
        )
        with pytest.raises(ValueError, match=r"UNet2DConditionModel has no attention layer.*AttnProcessor2_0"):
            find_attention_layers(unet)
        with pytest.raises(ValueError, match="processors seen: none"):
            find_attention_layers(nn.Linear(2, 2))
        with pytest.raises(TypeError, match="not str"):
            find_attention_layers("unet")

    def test_a_target_with_an_ip_adapter_of_diffusers_is_refused(self) -> None:
        unet = sd15_like()
        unet._load_ip_adapter_weights([base_file(SD15_WIDTHS)], low_cpu_mem_usage=False)
        with pytest.raises(ValueError, match="unload_ip_adapter"):
            find_attention_layers(unet)

    def test_unknown_processors_are_refused(self) -> None:
        unet = sd15_like()
        unet.set_attention_slice("auto")
        with pytest.raises(ValueError, match=r"SlicedAttnProcessor.*Known: AttnProcessor, AttnProcessor2_0"):
            find_attention_layers(unet)


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

    @pytest.mark.parametrize("name", ["sd15", "sd3"])
    def test_with_a_lora_beside_it(self, name: str) -> None:
        from peft import LoraConfig

        target = TARGETS[name]()
        target.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
        adapter, bare = make(target), run(target)
        with adapter.attached(target, adapter.encode(embeds()), guidance=False) as attachment:
            adapted = run(target)
            attachment.set_scale(0.0)
            assert torch.equal(run(target), bare)
        target.disable_adapters()
        assert not torch.allclose(adapted, bare)
        # Another model's tensors lie elsewhere in memory, and several threads may then add in another order.
        torch.testing.assert_close(run(target), run(TARGETS[name]()))

    def test_compiled_without_breaks_and_once_for_all_references(self) -> None:
        from torch._dynamo.testing import CompileCounter

        target = pixart_like()
        adapter = make(target)
        torch._dynamo.reset()
        counter = CompileCounter()
        block = torch.compile(target.transformer_blocks[0], backend=counter, fullgraph=True)
        inputs = (torch.randn(2, 16, 48),)
        named = {"encoder_hidden_states": torch.randn(2, 5, 48), "timestep": torch.randn(2, 6 * 48)}
        for seed in (0, 1):
            with adapter.attached(target, adapter.encode(embeds(seed=seed)), guidance=False):
                torch.testing.assert_close(block(*inputs, **named), target.transformer_blocks[0](*inputs, **named))
        assert counter.frame_count == 1

    def test_a_compiled_target_is_attached_to_as_it_is(self) -> None:
        target = pixart_like(layers=1)
        adapter, bare = make(target), run(target)
        torch._dynamo.reset()
        compiled = torch.compile(target, backend="eager", fullgraph=True)
        sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 20)
        named = {"timestep": torch.ones(2), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        with adapter.attached(compiled, adapter.encode(embeds()), guidance=False):
            adapted = compiled(sample, text, **named, return_dict=False)[0]
            torch.testing.assert_close(adapted, target(sample, text, **named, return_dict=False)[0])
        assert not torch.allclose(adapted, target(sample, text, **named, return_dict=False)[0])
        assert torch.equal(run(target), bare)

    def test_processors_without_fused_attention_are_kept(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        unet, other = sd15_like(), sd15_like()
        other.set_attn_processor(AttnProcessor())
        adapter = make(unet)
        bank = adapter.encode(embeds())
        bare = run(other)
        with adapter.attached(other, bank, 0.0, guidance=False):
            assert torch.equal(run(other), bare)
        with adapter.attached(unet, bank, guidance=False), adapter.attached(other, bank, guidance=False):
            torch.testing.assert_close(run(other), run(unet))

    def test_maps_once_are_maps_at_every_step(self) -> None:
        target = pixart_like()
        adapter = make(target)
        bank = adapter.encode(embeds())
        with adapter.attached(target, bank, guidance=False):
            once = [run(target, seed=seed) for seed in range(3)]
        for seed, expected in enumerate(once):
            with adapter.attached(target, adapter.encode(embeds()), guidance=False):
                assert torch.equal(run(target, seed=seed), expected)


class TestBatches:
    def test_guidance_is_both_halves_in_one(self) -> None:
        target = sd15_like()
        adapter = make(target)
        bank = adapter.encode(embeds())
        maps = bank.for_call(guidance=True, num_images_per_prompt=3)
        assert maps[0][0].shape[0] == 12
        key = bank.positive[0][0]
        assert torch.equal(maps[0][0][6:9], key[:1].expand(3, -1, -1))
        assert torch.equal(maps[0][0][9:], key[1:].expand(3, -1, -1))
        assert torch.equal(maps[0][0][:6], bank.negative[0][0].expand(6, -1, -1))

    def test_one_reference_serves_any_batch(self) -> None:
        target = sd15_like()
        adapter = make(target)
        one = adapter.encode(embeds(1))
        with adapter.attached(target, one, guidance=False):
            broadcast = run(target, batch=4)
        with adapter.attached(target, adapter.encode(embeds(1).expand(4, -1)), guidance=False):
            torch.testing.assert_close(run(target, batch=4), broadcast)
        with adapter.attached(target, one, guidance=True):  # [negative, negative, positive, positive]
            guided = run(target, batch=4)
        torch.testing.assert_close(guided[2:], broadcast[2:])
        assert not torch.allclose(guided[:2], broadcast[:2])

    @pytest.mark.parametrize("guidance", [True, False])
    def test_another_batch_than_the_models_is_refused(self, guidance: bool) -> None:
        target = sd15_like()
        adapter = make(target)
        with (
            adapter.attached(target, adapter.encode(embeds(2)), guidance=guidance),
            pytest.raises(ValueError, match=r"batch of 3.*guidance=True.*num_images_per_prompt=n"),
        ):
            run(target, batch=3)

    def test_several_references_are_attended_to_together(self) -> None:
        target = sd15_like()
        adapter = make(target)
        two = embeds(2)
        bank = adapter.encode(two[None])
        assert bank.batch == 1
        assert bank.positive[0][0].shape[1] == 2 * adapter.source.num_tokens
        assert bank.for_call(guidance=True)[0][0].shape[0] == 2
        first = adapter.encode(two[:1])
        twice = adapter.encode(two[:1].expand(2, -1)[None])
        with adapter.attached(target, first, guidance=False):
            expected = run(target)
        with adapter.attached(target, twice, guidance=False):  # the same image twice says nothing new
            torch.testing.assert_close(run(target), expected)

    def test_diffusers_own_form_of_embeddings(self) -> None:
        adapter = make(sd15_like())
        positive, negative = embeds(2)[:, None], embeds(2, seed=1)[:, None]
        bank = adapter.encode([torch.cat([negative, positive])])
        expected = adapter.encode(positive, negative)
        assert torch.equal(bank.positive[0][0], expected.positive[0][0])
        assert torch.equal(bank.negative[0][0], expected.negative[0][0])
        with pytest.raises(ValueError, match=r"\[negative; positive\]"):
            adapter.encode([positive, negative])

    def test_adapters_of_hidden_states_have_no_default_negative(self) -> None:
        target = sd15_like()
        torch.manual_seed(0)
        adapter = A4AModel.from_ip_adapter(plus_file(SD15_WIDTHS), target, depth=1).eval()
        bank = adapter.encode(torch.randn(2, 9, 16))
        assert bank.negative is None
        with pytest.raises(ValueError, match="negative_image_embeds=…"):
            adapter.attach(target, bank)
        adapter.attach(target, bank, guidance=False).detach()
        assert adapter.encode(torch.randn(2, 9, 16), torch.zeros(1, 9, 16)).for_call(guidance=True)

    def test_negatives_of_another_number_are_refused(self) -> None:
        with pytest.raises(ValueError, match="2 samples of 4 tokens, the negative embeddings 3 of 4"):
            make(sd15_like()).encode(embeds(2), embeds(3))
        with pytest.raises(ValueError, match="1 samples of 8 tokens, the negative embeddings 1 of 12"):
            make(sd15_like()).encode(embeds(2)[None], embeds(3)[None])

    @pytest.mark.parametrize(("number", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
    def test_numbers_of_images_that_are_none(self, number: Any, error: type[Exception]) -> None:
        target = sd15_like()
        adapter = make(target)
        with pytest.raises(error, match="num_images_per_prompt"):
            adapter.attach(target, adapter.encode(embeds()), num_images_per_prompt=number)


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

    @pytest.mark.parametrize("call", ["fuse_qkv_projections", "set_attention_slice"])
    def test_calls_that_drop_processors_are_noticed(self, call: str) -> None:
        target = sd15_like()
        adapter = make(target)
        with adapter.attached(target, adapter.encode(embeds())):
            getattr(target, call)(*(["auto"] if call == "set_attention_slice" else []))
            with pytest.raises(RuntimeError, match=r"gone from 7 of 7 layers.*Call it before attaching"):
                run(target)
        run(target)

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

    def test_maps_in_another_precision_are_cast(self) -> None:
        target = pixart_like().to(torch.bfloat16)
        adapter = make(pixart_like())
        layer = find_attention_layers(target)[0].module
        with adapter.attached(target, adapter.encode(embeds()), guidance=False):
            assert layer(torch.randn(2, 3, 48).bfloat16(), torch.randn(2, 5, 48).bfloat16()).dtype == torch.bfloat16


class TestMismatch:
    def test_another_target_is_refused(self) -> None:
        adapter = make(sd15_like())
        with pytest.raises(ValueError, match=r"for UNet2DConditionModel with 7 attention layers; PixArt.* has 3"):
            adapter.attach(pixart_like(), adapter.encode(embeds()))
        deeper = make(pixart_like())
        with pytest.raises(ValueError, match="the first of them agree"):
            deeper.attach(pixart_like(layers=4), deeper.encode(embeds()))

    def test_maps_for_another_target_or_of_another_adapter_are_refused(self) -> None:
        target = sd15_like()
        adapter, other = make(target), make(target, seed=1)
        with pytest.raises(ValueError, match="maps are for another target: 3 layers"):
            adapter.attach(target, make(pixart_like()).encode(embeds()))
        with pytest.raises(ValueError, match="computed by another adapter"):
            adapter.attach(target, other.encode(embeds()))
        with pytest.raises(TypeError, match="takes a Bank, got Tensor"):
            adapter.attach(target, embeds())

    @pytest.mark.parametrize(
        ("scale", "error", "message"),
        [
            (float("nan"), ValueError, "not finite"),
            ([1.0, 0.5], ValueError, "2 numbers; the target has 7"),
            ({"sideways": 1.0}, ValueError, "names 'sideways', where no layer is"),
            ({"down": {"block_9": 1.0}}, ValueError, "down_blocks.9"),
            ("strong", TypeError, "'strong'"),
            ({"down": "strong"}, TypeError, "'strong'"),
        ],
    )
    def test_scales_that_are_none(self, scale: Any, error: type[Exception], message: str) -> None:
        target = sd15_like()
        adapter, before = make(target), processors(target)
        with pytest.raises(error, match=message):
            adapter.attach(target, adapter.encode(embeds()), scale)
        assert processors(target) == before
        with pytest.raises(error, match=message):
            adapter.set_scale(scale)
