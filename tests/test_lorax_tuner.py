"""LoRA-X as a tuner: it starts at the base, trains, saves, merges, exports, and goes to siblings by their own directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import xadapt
from benchmarks.tiny.siblings import random_rotation, rot
from tests.aligned_models import square_llama
from tests.conftest import make_gpt2, make_llama, make_unet
from tests.test_weight_methods import attach, errors_of, updates_on
from xadapt.base import open_base
from xadapt.contract import Adapter
from xadapt.siblings import Pair
from xadapt_lorax import LORAX, LoraXConfig
from xadapt_lorax.directions import leading, product, signs_between

KIND = LORAX.writes
both_forms = pytest.mark.parametrize("form", ["full", "diagonal"])


def trained(
    model: nn.Module, form: str = "full", targets: tuple[str, ...] = ("q_proj", "v_proj"), r: int = 4
) -> Adapter:
    """With random numbers; `model` is used up."""
    config = LoraXConfig(r=r, form=form, target_modules=list(targets))
    KIND.attach(model, config)
    generator = torch.Generator().manual_seed(5)
    tensors = {n: torch.randn(t.shape, generator=generator) for n, t in KIND.tensors(model).items()}
    return Adapter(kind=KIND, config=config, tensors=tensors)


def carry(adapter: Adapter, source: Any, target: Any) -> Any:
    return LORAX.build().transfer(adapter, Pair(open_base(source), open_base(target)))


class TestDirections:
    @pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
    def test_they_are_the_leading_singular_vectors(self, shape: tuple[int, int]) -> None:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u, v = leading(weight, 4)
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(u.T @ u, eye)
        torch.testing.assert_close(v.T @ v, eye)
        torch.testing.assert_close(u.T @ weight @ v, torch.linalg.svdvals(weight)[:4].diag())

    def test_signs_are_settled(self) -> None:
        weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u, _ = leading(weight, 6)
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())

    def test_the_two_products(self) -> None:
        u, v = leading(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), 3)
        sizes = torch.tensor([1.0, -2.0, 3.0])
        one, other = (left @ right for left, right in (product(u, sizes, v), product(u, sizes.diag(), v)))
        torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("side", [0, 1])
    def test_signs_are_read_off_the_side_that_stayed(self, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.linalg.qr(torch.randn(9, 4, generator=generator)).Q for _ in range(2))
        flips = torch.tensor([1.0, -1.0, -1.0, 1.0])
        turned = [u * flips, v * flips]
        turned[1 - side] = random_rotation(9, generator) @ turned[1 - side]
        signs, alike = signs_between((u, v), (turned[0], turned[1]))
        assert signs.tolist() == flips.tolist()
        torch.testing.assert_close(alike, torch.ones(4))

    def test_too_many_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"r=7: a weight of shape \(9, 6\) has 6"):
            leading(torch.zeros(9, 6), 7)


class TestTuner:
    @both_forms
    @pytest.mark.parametrize(
        ("make", "targets"),
        [(make_llama, ["q_proj", "down_proj"]), (make_gpt2, ["c_attn", "c_fc"])],
        ids=["llama", "gpt2"],
    )
    def test_it_starts_at_the_base_trains_and_merges(
        self, form: str, make: Any, targets: list[str], logits: Callable[[nn.Module], Tensor]
    ) -> None:
        bare = logits(make())
        model = get_peft_model(make(), LoraXConfig(r=6, form=form, target_modules=targets))
        assert torch.equal(logits(model), bare)
        learning = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in learning) == 4 * (36 if form == "full" else 6)
        ids = torch.arange(14).reshape(2, 7)
        optimizer = torch.optim.AdamW(learning, lr=0.1)
        losses = []
        for _ in range(8):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        adapted = logits(model.eval())
        assert not torch.allclose(adapted, bare, atol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), bare, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits(model.merge_and_unload()), adapted, rtol=1e-4, atol=1e-4)

    @both_forms
    def test_saved_it_is_small_and_loads_in_peft(
        self, form: str, tmp_path: Path, logits: Callable[[nn.Module], Tensor]
    ) -> None:
        adapter = trained(make_llama(), form)
        model = attach(make_llama(), adapter)
        xadapt.save(model, tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4000
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter").eval()
        assert torch.equal(logits(loaded), logits(model))
        assert torch.equal(logits(xadapt.load(make_llama(), tmp_path / "adapter")), logits(model))

    def test_several_adapters(self, logits: Callable[[nn.Module], Tensor]) -> None:
        model = attach(make_llama(), trained(make_llama()))
        alone = logits(model)
        model.add_adapter("other", LoraXConfig(r=2, form="diagonal", target_modules=["q_proj"]))
        model.set_adapter("other")
        torch.testing.assert_close(logits(model), logits(make_llama()))
        model.set_adapter("default")
        assert torch.equal(logits(model), alone)
        model.delete_adapter("other")
        assert torch.equal(logits(model), alone)

    @both_forms
    def test_as_a_plain_lora_it_does_the_same(
        self, form: str, tmp_path: Path, logits: Callable[[nn.Module], Tensor]
    ) -> None:
        """No model is built for it: the update is the base's own singular vectors with the matrix between them."""
        make_llama().save_pretrained(tmp_path / "base")
        xadapt.save(attach(make_llama(), trained(make_llama(), form)), tmp_path / "adapter")
        xadapt.export_lora(tmp_path / "adapter", tmp_path / "base", tmp_path / "lora")
        lora = PeftModel.from_pretrained(make_llama(), tmp_path / "lora").eval()
        torch.testing.assert_close(
            logits(lora), logits(xadapt.load(make_llama(), tmp_path / "adapter")), rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize(
        ("options", "text"),
        [({"r": 0}, "positive integer"), ({"form": "half"}, "form='full'"), ({"layers_pattern": "h"}, "pass both")],
    )
    def test_options(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            LoraXConfig(**options)

    def test_more_directions_than_there_are(self) -> None:
        with pytest.raises(ValueError, match=r"model.layers.0.self_attn.v_proj: r=20: .* has 16"):
            get_peft_model(make_llama(), LoraXConfig(r=20, target_modules=["v_proj"]))

    def test_what_is_no_linear(self) -> None:
        pytest.importorskip("diffusers")
        with pytest.raises(ValueError, match=r"conv_in: LoRA-X is for linears .* Conv2d"):
            get_peft_model(make_unet(), LoraXConfig(r=2, target_modules=["conv_in"]))

    def test_a_broken_adapter_is_not_merged(self) -> None:
        model = attach(make_llama(), trained(make_llama()))
        was = {name: tensor.clone() for name, tensor in make_llama().state_dict().items()}
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lorax_core" in n).fill_(float("inf"))
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter()
        torch.testing.assert_close(
            model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight,
            was["model.layers.0.self_attn.q_proj.weight"],
        )


class TestTransfer:
    @both_forms
    def test_in_a_rotated_residual_stream_it_does_the_same(
        self, form: str, logits: Callable[[nn.Module], Tensor]
    ) -> None:
        """Inputs of q and v turn, outputs do not: the target has other right singular vectors, and the signs of none are known."""
        source = square_llama()  # its norm gains are ones, so a rotation is all that changes
        target = rot(source, torch.Generator().manual_seed(3))
        adapter = trained(square_llama(), form)
        moved = carry(adapter, source, target)
        wanted = logits(attach(square_llama(), adapter))
        change = (wanted - logits(source)).norm()
        assert (logits(attach(target, moved.adapter)) - wanted).norm() < 1e-2 * change
        if form == "full":
            assert all(told["overlap"] > 0.99 for told in moved.evidence.values())

    def test_signs_matter_to_the_full_form_alone(self) -> None:
        """A target whose weights are the source's, turned on the output side, where the convention looks."""
        source, target = square_llama(), square_llama()
        turn = random_rotation(32, torch.Generator().manual_seed(2))
        with torch.no_grad():
            for layer in target.model.layers:
                layer.self_attn.q_proj.weight.copy_(turn @ layer.self_attn.q_proj.weight)
        for form in ("full", "diagonal"):
            adapter = trained(square_llama(), form, ("q_proj",))
            wanted = {path: turn @ delta for path, delta in updates_on(adapter, source).items()}
            moved = carry(adapter, source, target).adapter
            assert max(errors_of(updates_on(moved, target), wanted).values()) < 1e-3
        copied = updates_on(trained(square_llama(), "full", ("q_proj",)), target)
        full = {
            path: turn @ delta
            for path, delta in updates_on(trained(square_llama(), "full", ("q_proj",)), source).items()
        }
        assert max(errors_of(copied, full).values()) > 0.1, "no sign differs, so this shows nothing"

    @both_forms
    def test_to_another_width(self, form: str) -> None:
        moved = carry(trained(make_llama(), form), make_llama(), make_llama(hidden_size=48))
        fresh = make_llama(hidden_size=48)
        KIND.attach(fresh, moved.adapter.config)
        assert KIND.tensors(fresh).keys() == moved.adapter.tensors.keys()

    def test_to_fewer_directions_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"8 singular directions, and the adapter uses 12"):
            carry(trained(make_llama(), r=12), make_llama(), make_llama(hidden_size=16))

    def test_to_another_depth(self) -> None:
        moved = carry(trained(make_llama(layers=3)), make_llama(layers=3), make_llama(1, layers=2))
        assert len(moved.left_out) == 2
        assert len(moved.adapter.tensors) == 4

    def test_each_layer_s_numbers_go_to_its_counterpart(self) -> None:
        """Where layers move up, a name of the source is also one of another layer of the target."""
        source, target = make_llama(layers=3), make_llama(layers=2)
        for index in range(2):
            target.model.layers[index].load_state_dict(source.model.layers[index + 1].state_dict())
        adapter = trained(make_llama(layers=3))
        override = {"model.layers.0": None, **{f"model.layers.{i + 1}": f"model.layers.{i}" for i in range(2)}}
        moved = LORAX.build().transfer(adapter, Pair(open_base(source), open_base(target), override))
        wanted = updates_on(adapter, source)
        found = updates_on(moved.adapter, target)
        assert len(found) == 4
        for path, delta in found.items():
            above = path.replace("layers.1", "layers.2").replace("layers.0", "layers.1")
            torch.testing.assert_close(delta, wanted[above])
