"""Maps beside what people do to a target: LoRAs, torch.compile, other processors, half precision, offloading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.a4a_attaching import TARGETS, embeds, make
from tests.a4a_models import pixart_like, run, sd15_like


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestBeside:
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

    @pytest.mark.parametrize("call", ["fuse_qkv_projections", "set_attention_slice"])
    def test_calls_that_drop_processors_are_noticed(self, call: str) -> None:
        target = sd15_like()
        adapter = make(target)
        with adapter.attached(target, adapter.encode(embeds())):
            getattr(target, call)(*(["auto"] if call == "set_attention_slice" else []))
            with pytest.raises(RuntimeError, match=r"gone from 7 of 7 layers.*Call it before attaching"):
                run(target)
        run(target)

    def test_a_compiled_target_notices_it_as_well(self) -> None:
        target: Any = pixart_like(layers=1)
        adapter = make(target)
        torch._dynamo.reset()
        compiled = torch.compile(target, backend="eager")
        inputs: Any = (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 20))
        named: Any = {"timestep": torch.ones(2), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        with adapter.attached(compiled, adapter.encode(embeds()), guidance=False):
            compiled(*inputs, **named)
            target.fuse_qkv_projections()
            with pytest.raises(RuntimeError, match=r"gone from 1 of 1 layers"):
                compiled(*inputs, **named)

    def test_unloading_an_ip_adapter_is_noticed(self) -> None:
        """There may be none: it makes every processor anew."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        target: Any = sd15_like()
        parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
        pipe: Any = StableDiffusionPipeline(**parts, unet=target, scheduler=scheduler, requires_safety_checker=False)
        adapter, bare = make(target), run(target)
        with adapter.attached(target, adapter.encode(embeds()), guidance=False):
            pipe.unload_ip_adapter()
            with pytest.raises(RuntimeError, match=r"gone from 7 of 7 layers.*unload_ip_adapter"):
                run(target)
        assert torch.equal(run(target), bare)
        with adapter.attached(target, adapter.encode(embeds()), guidance=False):
            assert not torch.equal(run(target), bare)

    # HunyuanDiT itself cannot be offloaded so: it reads a weight of its own beside its layers'.
    @pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"hunyuan"}))
    def test_of_an_offloaded_target(self, name: str) -> None:
        """As enable_sequential_cpu_offload does it: outside of its own call, no layer has weights."""
        from accelerate import cpu_offload

        target = TARGETS[name]()
        adapter, bare = make(target), run(target)
        bank = adapter.encode(embeds())
        with adapter.attached(target, bank, guidance=False):
            expected = run(target)
        cpu_offload(target, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in target.parameters())
        with adapter.attached(target, bank, guidance=False) as attachment:
            torch.testing.assert_close(run(target), expected)
            attachment.set_scale(0.0)
            torch.testing.assert_close(run(target), bare)
        assert not torch.allclose(expected, bare)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["sd15", "pixart", "sd3", "flux"])
    def test_of_a_target_in_half_precision(self, name: str, dtype: torch.dtype) -> None:
        target = TARGETS[name]()
        adapter = make(target)
        bank = adapter.encode(embeds())
        with adapter.attached(target, bank, guidance=False):
            expected = run(target)
        nn.Module.to(target, dtype)  # diffusers' own `to` warns that it does so
        hook = target.register_forward_pre_hook(lambda _, given, named: cast((given, named), dtype), with_kwargs=True)
        bare = run(target)
        for given in (bank, bank.to(dtype=dtype)):
            with adapter.attached(target, given, guidance=False):
                found = run(target)
            assert found.dtype == dtype
            limit = 16 * torch.finfo(dtype).eps * expected.abs().max()  # some ten layers, each rounded to eps / 2
            assert (found.float() - expected).abs().max() < limit
            assert not torch.equal(found, bare)
        hook.remove()


def cast(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, dict):
        return {name: cast(one, dtype) for name, one in given.items()}
    if isinstance(given, tuple):
        return tuple(cast(one, dtype) for one in given)
    return given.to(dtype) if isinstance(given, torch.Tensor) and given.is_floating_point() else given
