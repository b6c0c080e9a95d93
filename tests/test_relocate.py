"""An adapter as it is on a sibling: under the sibling's names, without the layers that have another shape there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import xadapt
from tests.conftest import make_llama
from tests.test_every_method import assert_same, randomise
from tests.verb_models import IDS, randomised
from tests.weight_models import lora_on, updates_on
from xadapt.base import open_base
from xadapt.contract import Adapter
from xadapt.kinds import PeftKind
from xadapt.reading import detach, read_adapter
from xadapt.relocate import relocate
from xadapt.siblings import Pair
from xadapt.transferring.writing import write_folder
from xadapt_distil import DISTIL
from xadapt_feature import FULL_ADA, HYBRID_ADA, INPUT_ADA, OUTPUT_ADA, InputAdaConfig
from xadapt_weight import COPY, LORA_X


def renamed(seed: int = 1) -> nn.Module:
    """The Llama, inside another module, as in a multimodal model."""
    whole = nn.Module()
    whole.language = make_llama(seed)
    return whole


def narrow_keys(seed: int = 1) -> nn.Module:
    model = make_llama(seed)
    for layer in model.model.layers:
        layer.self_attn.k_proj = nn.Linear(32, 8, bias=False)
    return model


def adapter_of(kind: PeftKind, **options: object) -> Adapter:
    config = kind.config()(**{"target_modules": ["q_proj", "k_proj"], **options})
    model = make_llama()
    kind.attach(model, config)
    randomise(kind.tensors(model).values())
    return Adapter(kind=kind, config=config, tensors={n: t.detach().clone() for n, t in kind.tensors(model).items()})


def test_between_equals_nothing_changes() -> None:
    adapter = lora_on(make_llama(), ["q_proj"])
    carried = relocate(adapter, Pair(open_base(make_llama()), open_base(make_llama(seed=1))))
    assert carried.adapter.config is adapter.config
    assert carried.adapter.tensors == adapter.tensors
    assert not carried.left_out


def test_layers_get_the_targets_names_and_keep_rank_and_alpha() -> None:
    adapter = lora_on(
        make_llama(), ["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"layers.1.self_attn.q_proj": 7}
    )
    target = renamed()
    carried = relocate(adapter, Pair(open_base(make_llama()), open_base(target)))
    there = updates_on(carried.adapter, target)
    here = updates_on(adapter, make_llama())
    assert there.keys() == {f"language.{path}" for path in here}
    for path, update in here.items():
        torch.testing.assert_close(there[f"language.{path}"], update)


@pytest.mark.parametrize(
    ("kind", "options", "carried_layers"),
    [
        (COPY.writes, {}, ("q_proj",)),
        (INPUT_ADA.writes, {}, ("q_proj", "k_proj")),
        (OUTPUT_ADA.writes, {}, ("q_proj",)),
        (HYBRID_ADA.writes, {"space": "input"}, ("q_proj",)),
        (FULL_ADA.writes, {"space": "input"}, ("q_proj", "k_proj")),
        (FULL_ADA.writes, {"space": "output"}, ("q_proj",)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_only_the_width_that_the_space_adapts_has_to_agree(
    kind: PeftKind, options: dict[str, object], carried_layers: tuple[str, ...]
) -> None:
    method = {m.writes.name: m for m in (COPY, INPUT_ADA, OUTPUT_ADA, HYBRID_ADA, FULL_ADA)}[kind.name]
    target = narrow_keys()
    carried = method.build().transfer(adapter_of(kind, **options), Pair(open_base(make_llama()), open_base(target)))
    paths = {path.rpartition(".")[2] for path in updates_on(carried.adapter, target)}
    assert paths == set(carried_layers)
    lost = {path.rpartition(".")[2] for path in carried.left_out}
    assert lost == {"q_proj", "k_proj"} - set(carried_layers)
    assert all("key-value heads" in why for why in carried.left_out.values())
    kind.attach(target, carried.adapter.config)
    assert kind.tensors(target).keys() == carried.adapter.tensors.keys()


def test_an_adapter_of_another_model_is_refused() -> None:
    adapter = lora_on(make_llama(), ["q_proj"])
    tensors: dict[str, Tensor] = {f"blocks.{name}": tensor for name, tensor in adapter.tensors.items()}
    other = Adapter(kind=adapter.kind, config=LoraConfig(target_modules=["q_proj"]), tensors=tensors)
    with pytest.raises(ValueError, match=r"has none of the adapter's layers, .* blocks\.model"):
        relocate(other, Pair(open_base(make_llama()), open_base(make_llama())))


def test_what_is_bound_to_names_does_not_change_them() -> None:
    model = make_llama()
    config = InputAdaConfig(target_modules=["q_proj", "k_proj"], tie=r"(layers\.\d+\.self_attn)\.[qk]_proj$")
    INPUT_ADA.writes.attach(model, config)
    adapter = Adapter(kind=INPUT_ADA.writes, config=config, tensors=INPUT_ADA.writes.tensors(model))
    with pytest.raises(
        ValueError, match=r"tie of its config is bound to names, .* method='lora_x' or method='aligned'"
    ):
        relocate(adapter, Pair(open_base(make_llama()), open_base(renamed())))
    randomise(adapter.tensors.values())
    target = renamed()
    carried = LORA_X.build().transfer(adapter, Pair(open_base(make_llama()), open_base(target)))
    assert len(updates_on(carried.adapter, target)) == 4


def test_modules_that_come_along_whole_are_distilled_instead(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = read_adapter(xadapt.save(randomised(get_peft_model(make_llama(), config)), tmp_path / "lora"))
    bases = Pair(open_base(make_llama()), open_base(Wrapped(make_llama(1))))
    with pytest.raises(
        ValueError, match=r"modules_to_save.* other names or shapes for lm_head\.weight\. method='distil' trains"
    ):
        relocate(adapter, bases)
    with pytest.raises(ValueError, match=r"method='copy' takes them along .* method='distil' trains"):
        LORA_X.build().transfer(adapter, bases)
    batches = [{"input_ids": IDS}]
    carried = DISTIL.build(steps=1).fit(adapter, bases, batches).transfer(adapter, bases)
    assert len(updates_on(carried.adapter, Wrapped(make_llama(1)))) == 2


class Wrapped(nn.Module):
    """A Llama inside another module, which runs as it does."""

    def __init__(self, language: nn.Module) -> None:
        super().__init__()
        self.language, self.config = language, language.config

    def forward(self, **batch: Tensor) -> object:
        return self.language(**batch)


def test_a_missing_source_is_asked_for() -> None:
    adapter = lora_on(make_llama(), ["q_proj"])
    with pytest.raises(ValueError, match=r"pass source=… \(--source\)"):
        relocate(adapter, Pair(None, open_base(make_llama())))


class TestParametersOfTheBase:
    """What an adapter's file holds of the base itself: modules_to_save, and biases that were trained along."""

    def adapter(self, base: nn.Module, **options: Any) -> Adapter:
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **options))
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        return detach(model)

    def biased(self, moved: float = 0.0) -> nn.Module:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(moved + torch.arange(len(parameter)) / 7)
        return model

    @pytest.mark.parametrize("bias", ["lora_only", "all"])
    def test_the_change_of_a_bias_is_carried_and_not_the_source_s_bias(self, bias: str, tmp_path: Path) -> None:
        adapter, target = self.adapter(self.biased(), bias=bias), self.biased(moved=1.0)
        carried = relocate(adapter, Pair(open_base(self.biased()), open_base(target))).adapter
        write_folder(carried, tmp_path, open_base(target))
        loaded = PeftModel.from_pretrained(self.biased(moved=1.0), tmp_path).get_base_model()
        name = "model.layers.0.self_attn.q_proj.base_layer.bias"
        change = next(t for n, t in adapter.tensors.items() if n.endswith("0.self_attn.q_proj.base_layer.bias"))
        change = change - self.biased().get_parameter("model.layers.0.self_attn.q_proj.bias")
        assert change.abs().max() > 0.01
        torch.testing.assert_close(
            loaded.get_parameter(name), target.get_parameter("model.layers.0.self_attn.q_proj.bias") + change
        )

    @pytest.mark.parametrize("bias", ["lora_only", "all"])
    def test_on_the_same_base_they_stay_as_they_are(self, bias: str) -> None:
        adapter = self.adapter(self.biased(), bias=bias)
        carried = relocate(adapter, Pair(open_base(self.biased()), open_base(self.biased())))
        assert_same(carried.adapter.tensors, adapter.tensors)
        assert not carried.left_out

    def test_a_target_without_the_bias(self) -> None:
        adapter = self.adapter(self.biased(), bias="lora_only")
        target: Any = self.biased()
        for layer in target.model.layers:
            layer.self_attn.q_proj.bias = None
        with pytest.raises(ValueError, match=r"also changes the bias .*q_proj.*bias, which .* does not have"):
            relocate(adapter, Pair(open_base(self.biased()), open_base(target)))

    def test_the_biases_of_other_layers_do_not_follow_to_other_blocks(self) -> None:
        adapter = self.adapter(self.biased(), bias="all")
        target: Any = self.biased()
        target.model.layers.insert(0, copy.deepcopy(target.model.layers[0]))
        lines = {f"model.layers.{n}.self_attn.q_proj": f"model.layers.{n + 1}.self_attn.q_proj" for n in range(2)}
        with pytest.raises(ValueError, match=r"parameters of the base that lie in its file cannot follow: .*bias"):
            relocate(adapter, Pair(open_base(self.biased()), open_base(target), lines))

    def test_a_source_that_has_the_trained_biases_already(self) -> None:
        """As the live model has after training: PEFT trains them in place."""
        source: Any = self.biased()
        adapter = self.adapter(source, bias="lora_only")
        trained = self.biased()
        with torch.no_grad():
            for name, tensor in adapter.tensors.items():
                if name.endswith("q_proj.base_layer.bias"):
                    trained.get_parameter(name.replace(".base_layer", "")).copy_(tensor)
        with pytest.raises(ValueError, match=r"has the trained biases of the adapter already"):
            relocate(adapter, Pair(open_base(trained), open_base(self.biased(moved=1.0))))

    def test_a_norm_is_taken_along_whole(self) -> None:
        adapter = self.adapter(make_llama(), modules_to_save=["norm"])
        carried = relocate(adapter, Pair(open_base(make_llama()), open_base(make_llama(seed=1))))
        assert_same(carried.adapter.tensors, adapter.tensors)
        assert not carried.left_out

    def test_a_norm_of_another_width_is_named(self) -> None:
        adapter = self.adapter(make_llama(), modules_to_save=["norm"])
        target: Any = make_llama()
        target.model.norm = nn.LayerNorm(16)
        with pytest.raises(ValueError, match=r"other names or shapes for .*norm\.weight"):
            relocate(adapter, Pair(open_base(make_llama()), open_base(target)))
