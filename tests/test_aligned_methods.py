"""Adapters carried along learnt maps, on tiny models: exact where the sibling is the source in another basis."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, PeftModel
from torch import Tensor, nn

from benchmarks.tiny.siblings import reparam, rot
from tests.aligned_models import square_llama
from tests.conftest import make_gpt2, make_llama, make_unet
from tests.test_weight_methods import attach, errors_of, lora_on, updates_on
from xadapt.base import open_base
from xadapt.contract import Adapter, Method
from xadapt.siblings import Pair
from xadapt_aligned import ALIGNED, ALIGNED_INPUT, ALIGNED_OUTPUT
from xadapt_feature import INPUT_ADA, InputAdaConfig, OutputAdaConfig, feature_space

METHODS = (ALIGNED, ALIGNED_INPUT, ALIGNED_OUTPUT)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def batches(count: int = 4, seed: int = 0, length: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 64, (8, length), generator=generator)} for _ in range(count)]


def carry(method: Method, adapter: Adapter, source: Any, target: Any, data: Any = None, **options: Any) -> Any:
    pair = Pair(open_base(source), open_base(target))
    return method.build(**options).fit(adapter, pair, batches() if data is None else data).transfer(adapter, pair)


def feature_adapter(kind: Any, config: Any, model: nn.Module) -> Adapter:
    """With random tensors; `model` is used up."""
    kind.attach(model, config)
    generator = torch.Generator().manual_seed(5)
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.2 for n, t in kind.tensors(model).items()}
    return Adapter(kind=kind, config=config, tensors=tensors)


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class TestExact:
    """The function is the same, so the adapter has to do the same."""

    @pytest.mark.parametrize("sibling", [rot, reparam], ids=["rot", "reparam"])
    def test_a_lora(self, sibling: Any, logits: Callable[[nn.Module], Tensor]) -> None:
        source = square_llama()
        target = sibling(source, drawn())
        torch.testing.assert_close(logits(target), logits(source), rtol=1e-3, atol=1e-3)
        adapter = lora_on(square_llama(), ["q_proj", "v_proj", "up_proj", "down_proj"])
        wanted = logits(attach(square_llama(), adapter))
        moved = carry(ALIGNED, adapter, source, target, batches(8))
        found = logits(attach(sibling(source, drawn()), moved.adapter))
        copied = logits(attach(sibling(source, drawn()), adapter))
        change = (wanted - logits(source)).norm()
        assert (found - wanted).norm() < 0.02 * change
        assert (copied - wanted).norm() > 0.3 * change
        assert {told["inputs_map"] for told in moved.evidence.values()} <= {"identity", "procrustes", "permutation"}

    @pytest.mark.parametrize(
        ("method", "make", "sibling"),
        [(ALIGNED_INPUT, InputAdaConfig, rot), (ALIGNED_OUTPUT, OutputAdaConfig, reparam)],
        ids=["input", "output"],
    )
    def test_an_adapter_in_the_space_that_turned(
        self, method: Method, make: Any, sibling: Any, logits: Callable[[nn.Module], Tensor]
    ) -> None:
        source = square_llama()
        adapter = feature_adapter(method.writes, make(r=2, target_modules=["q_proj", "v_proj"]), square_llama())
        wanted = logits(attach(square_llama(), adapter))
        moved = carry(method, adapter, source, sibling(source, drawn()), batches(8))
        found = logits(attach(sibling(source, drawn()), moved.adapter))
        assert (found - wanted).norm() < 0.02 * (wanted - logits(source)).norm()

    def test_a_convolution_s_channels(self, noise: Callable[[nn.Module], Tensor]) -> None:
        pytest.importorskip("diffusers")
        adapter = lora_on(make_unet(), ["conv2", "to_v"])
        generator = torch.Generator().manual_seed(1)
        data = [
            {
                "sample": torch.randn(4, 4, 8, 8, generator=generator),
                "timestep": torch.tensor([10]),
                "encoder_hidden_states": torch.randn(4, 12, 24, generator=generator),
            }
            for _ in range(3)
        ]
        moved = carry(ALIGNED, adapter, make_unet(), make_unet(), data)
        torch.testing.assert_close(noise(attach(make_unet(), moved.adapter)), noise(attach(make_unet(), adapter)))
        kinds = {told["outputs_map"] for told in moved.evidence.values()}
        assert kinds == {"identity"}


class TestTrainedFurther:
    @every_method
    def test_where_no_basis_changed_it_is_the_copy(self, method: Method) -> None:
        """An alignment by least squares would put the adapter on whatever correlates."""
        adapter = lora_on(make_llama(), ["q_proj"])
        target = make_llama()
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.data += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=drawn())
        chosen = carry(method, adapter, make_llama(), target)
        kept = carry(method, adapter, make_llama(), target, map="identity")
        for name, tensor in chosen.adapter.tensors.items():
            torch.testing.assert_close(tensor, kept.adapter.tensors[name])


class TestOtherShapes:
    @every_method
    @pytest.mark.parametrize("widths", [(32, 48), (48, 32)])
    def test_another_width(self, method: Method, widths: tuple[int, int]) -> None:
        source, target = (make_llama(hidden_size=width) for width in widths)
        adapter = lora_on(make_llama(hidden_size=widths[0]), ["q_proj", "down_proj"])
        moved = carry(method, adapter, source, target)
        fresh = make_llama(hidden_size=widths[1])
        moved.adapter.kind.attach(fresh, moved.adapter.config)
        shapes = {name: tensor.shape for name, tensor in moved.adapter.kind.tensors(fresh).items()}
        assert shapes == {name: tensor.shape for name, tensor in moved.adapter.tensors.items()}
        assert not moved.left_out
        assert all(torch.isfinite(tensor).all() for tensor in moved.adapter.tensors.values())

    def test_of_a_wider_model_with_the_same_function_it_is_exact(self) -> None:
        """x′ = Q x for a semi-orthogonal Q, layer by layer, as in a model embedded in a wider one."""

        class Two(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))

            def forward(self, x: Tensor) -> Tensor:
                return self.second(torch.tanh(self.first(x)))

        torch.manual_seed(0)
        narrow, wide = Two(8), Two(12)
        eye = torch.eye(12, 8)
        with torch.no_grad():
            for name in ("first", "second"):
                wide.get_submodule(name).weight.copy_(eye @ narrow.get_submodule(name).weight @ eye.T)
        data = torch.randn(200, 8, generator=drawn())

        class Embedded(Two):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x @ eye.T)

        wide.__class__ = Embedded
        adapter = lora_on(Two(8), ["first", "second"])
        moved = carry(ALIGNED, adapter, narrow, wide, [{"x": data}]).adapter
        found, wanted = updates_on(moved, wide), updates_on(adapter, narrow)
        assert max(errors_of(found, {path: eye @ delta @ eye.T for path, delta in wanted.items()}).values()) < 1e-3

    @every_method
    def test_another_depth(self, method: Method) -> None:
        adapter = lora_on(make_llama(layers=3), ["q_proj"])
        moved = carry(method, adapter, make_llama(layers=3), make_llama(1, layers=2))
        assert len(moved.evidence) == 2
        assert len(moved.left_out) == 1


class TestConversion:
    def test_on_its_data_a_lora_becomes_an_output_adapter(self) -> None:
        """up_proj has more outputs than inputs, so W loses nothing; v_proj has fewer, and the data has to help."""
        adapter = lora_on(make_llama(), ["v_proj", "up_proj"])
        moved = carry(ALIGNED_OUTPUT, adapter, make_llama(), make_llama(), map="identity", ridge=1e-9)
        errors = {path: float(told["error"]) for path, told in moved.evidence.items()}
        assert all(error < 1e-3 for path, error in errors.items() if "up_proj" in path)
        assert all(0.1 < error < 1 for path, error in errors.items() if "v_proj" in path)

    @pytest.mark.parametrize("method", [ALIGNED_INPUT, ALIGNED_OUTPUT], ids=["input", "output"])
    def test_there_and_back(self, method: Method) -> None:
        """A LoRA that an adapter in feature space is, becomes that adapter's effect again."""
        config = {ALIGNED_INPUT: InputAdaConfig, ALIGNED_OUTPUT: OutputAdaConfig}[method]
        adapter = feature_adapter(method.writes, config(r=2, target_modules=["q_proj"]), make_llama())
        as_lora = carry(ALIGNED, adapter, make_llama(), make_llama(), map="identity").adapter
        back = carry(method, as_lora, make_llama(), make_llama(), map="identity", ridge=1e-9).adapter
        errors = errors_of(updates_on(back, make_llama()), updates_on(adapter, make_llama()))
        assert max(errors.values()) < 1e-3

    def test_a_bias_is_left_where_the_lora_left_it(self) -> None:
        """GPT-2's linears have biases, and an output adapter moves them; on the data the two agree."""
        adapter = lora_on(make_gpt2(), ["c_fc"], fan_in_fan_out=True)
        model = make_gpt2()
        with torch.no_grad():
            for block in model.transformer.h:
                block.mlp.c_fc.bias.normal_(generator=drawn())
        moved = carry(ALIGNED_OUTPUT, adapter, model, model, map="identity", ridge=1e-9)
        assert all(float(told["error"]) < 1e-3 for told in moved.evidence.values())

    def test_a_convolution_is_refused_by_name(self) -> None:
        pytest.importorskip("diffusers")
        adapter = lora_on(make_unet(), ["conv2"])
        data = [
            {
                "sample": torch.randn(2, 4, 8, 8, generator=drawn()),
                "timestep": torch.tensor([10]),
                "encoder_hidden_states": torch.randn(2, 5, 24, generator=drawn()),
            }
        ]
        with pytest.raises(ValueError, match="conv2 is no linear"):
            carry(ALIGNED_INPUT, adapter, make_unet(), make_unet(), data)


class TestData:
    def test_what_a_mask_hides_does_not_count(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        whole = batches(1, length=12)[0]["input_ids"]
        padded = torch.cat([whole, torch.zeros(8, 4, dtype=torch.long)], dim=1)
        mask = torch.cat([torch.ones(8, 12), torch.zeros(8, 4)], dim=1).long()
        one = carry(ALIGNED, adapter, make_llama(), make_llama(1), [{"input_ids": whole}], map="procrustes")
        other = carry(
            ALIGNED,
            adapter,
            make_llama(),
            make_llama(1),
            [{"input_ids": padded, "attention_mask": mask}],
            map="procrustes",
        )
        for path, told in one.evidence.items():
            assert other.evidence[path]["inputs"] == pytest.approx(told["inputs"], abs=1e-4)
            assert other.evidence[path]["tokens"] == 96

    def test_the_networks_are_left_as_they_were(self) -> None:
        source, target = make_llama(), make_llama(1).train()
        carry(ALIGNED, lora_on(make_llama(), ["q_proj"]), source, target)
        for network, training in ((source, False), (target, True)):
            assert all(module.training is training for module in network.modules())
            assert not any(module._forward_hooks for module in network.modules())

    def test_an_iterator_is_read_once(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        listed = carry(ALIGNED, adapter, make_llama(), make_llama(1))
        streamed = carry(ALIGNED, adapter, make_llama(), make_llama(1), iter(batches()))
        for name, tensor in listed.adapter.tensors.items():
            assert torch.equal(tensor, streamed.adapter.tensors[name])

    def test_from_disk(self, tmp_path: Path, logits: Callable[[nn.Module], Tensor]) -> None:
        for seed in (0, 1):
            make_llama(seed).save_pretrained(tmp_path / str(seed))
        adapter = lora_on(make_llama(), ["q_proj"])
        moved = carry(ALIGNED, adapter, tmp_path / "0", tmp_path / "1")
        attach(make_llama(1), moved.adapter).save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(make_llama(1), tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(loaded), logits(attach(make_llama(1), moved.adapter)))


class TestErrors:
    def fails(self, data: Any, source: Any = None, target: Any = None, **options: Any) -> str:
        adapter = lora_on(make_llama(), ["q_proj", "down_proj"])
        with pytest.raises((ValueError, TypeError)) as caught:
            carry(ALIGNED, adapter, source or make_llama(), target or make_llama(1), data, **options)
        return str(caught.value)

    def test_no_data(self) -> None:
        assert "no calibration data" in self.fails([])

    def test_too_few_tokens(self) -> None:
        """down_proj is the widest: 48."""
        text = self.fails([{"input_ids": torch.arange(40).reshape(4, 10)}])
        assert "40 tokens" in text
        assert "at least 48" in text

    def test_a_batch_that_is_no_dict(self) -> None:
        assert "a dict of arguments" in self.fails([torch.arange(4)])

    def test_a_batch_that_the_forward_does_not_take(self) -> None:
        assert "does not take a batch of pixels" in self.fails([{"pixels": torch.arange(4)}])

    def test_features_that_are_not_finite_name_the_layer(self) -> None:
        broken = make_llama(1)
        with torch.no_grad():
            broken.model.layers[1].input_layernorm.weight[0] = float("inf")
        text = self.fails(batches(), target=broken)
        assert "model.layers.1.self_attn.q_proj in the target holds NaN or infinity" in text

    def test_a_token_beyond_the_vocabulary(self) -> None:
        assert "token id 64, and the source's vocabulary has 64" in self.fails([{"input_ids": torch.tensor([[64]])}])

    def test_tokenizers_that_differ(self, tmp_path: Path) -> None:
        for seed, vocabulary in enumerate(({"a": 0, "b": 1}, {"b": 0, "a": 1})):
            make_llama(seed).save_pretrained(tmp_path / str(seed))
            (tmp_path / str(seed) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        text = self.fails(batches(), source=tmp_path / "0", target=tmp_path / "1")
        assert "The tokenizers differ" in text
        assert "'a' for one" in text

    def test_positions_that_do_not_match(self) -> None:
        class Shorter(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.model, self.lm_head = inner.model, inner.lm_head

            def forward(self, input_ids: Tensor) -> Any:
                return self.model(input_ids[:, 1:])

        text = self.fails(batches(), target=Shorter(make_llama(1)))
        assert "has 128 positions in a batch" in text
        assert "120" in text

    def test_an_adapter_on_other_layers(self) -> None:
        pair = Pair(open_base(make_llama()), open_base(make_llama(1)))
        learnt = ALIGNED.build().fit(lora_on(make_llama(), ["q_proj"]), pair, batches())
        with pytest.raises(ValueError, match="learnt for an adapter on other layers"):
            learnt.transfer(lora_on(make_llama(), ["o_proj"]), pair)

    def test_an_adapter_of_full_rank(self) -> None:
        config = feature_space(OFTConfig(oft_block_size=4, target_modules=["q_proj"]), "input")
        adapter = feature_adapter(INPUT_ADA.writes, config, make_llama())
        with pytest.raises(ValueError, match="of full rank"):
            carry(ALIGNED_INPUT, adapter, make_llama(), make_llama(1))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"map": "cca"}, "'permutation', 'procrustes'"),
            ({"ridge": -1}, "from 0 on"),
            ({"stay": True}, "from 0 on"),
            ({"probe": float("nan")}, "from 0 on"),
            ({"precision": "half"}, "precision='float32'"),
        ],
    )
    def test_options(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            ALIGNED.build(**options)

    def test_layers_that_never_run_are_left_out(self) -> None:
        """The rest is carried, and the caller decides."""

        class First(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.used(x)

        adapter = lora_on(First(), ["used", "unused"])
        moved = carry(ALIGNED, adapter, First(), First(), [{"x": torch.randn(50, 8, generator=drawn())}])
        assert list(moved.evidence) == ["used"]
        assert "never ran" in moved.left_out["unused"]
