"""Export and merge of every type of adapter that PEFT has: what they find is what PEFT's own merge makes, or they refuse.

The base is never the one that the adapter was trained on: what is read out of that one's weights shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BdLoraConfig, KasaConfig, LNTuningConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

import xadapt
from tests.feature_models import SPACES, load
from tests.test_feature_any_method import peft_config
from xadapt import feature_space, registry
from xadapt.attached import EXACT
from xadapt.base import open_base
from xadapt.contract import Adapter
from xadapt.factors import VARIANTS
from xadapt.folding import layers_of
from xadapt.kinds import stock_kind
from xadapt.peft_internals import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from xadapt.update import to_stored
from xadapt_feature.hosts import HOSTS
from xadapt_weight.lora import CHANGES_THE_BASE, TOLD_BY_MERGING
from xadapt_weight.methods import LORA

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),  # PEFT's BOFT, where there is no CUDA
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor"),  # for the same reason
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # PEFT's SHiRA makes sparse tensors
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but"),  # its data is needed for training only
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
    # PEFT 0.21.2 takes every lora_bias for a tensor that DeepSpeed has cut up.
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d LoRA tensor\(s\) have invalid shape"),
]

TARGETS = ["q_proj", "o_proj", "up_proj"]  # 32 → 32, 32 → 32, 32 → 48, all with biases
MORE: dict[str, dict[str, Any]] = {
    "TINYLORA": {"r": 2, "u": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
}
STOCK = [kind for kind in sorted(str(t.value) for t in PEFT_TYPE_TO_CONFIG_MAPPING) if registry.kind_of(kind) is None]


def llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def trained(config: PeftConfig, folder: Path) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(llama(seed=0), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return xadapt.save(model, folder)


def merged_by_peft(folder: Path) -> Mapping[str, Tensor]:
    model: Any = load(llama(seed=1), folder)
    return dict(model.merge_and_unload().state_dict())


def folded(folder: Path) -> Mapping[str, Tensor]:
    base = llama(seed=1)
    state, opened = dict(base.state_dict()), open_base(base)
    for layer in layers_of([xadapt.read_adapter(folder)], opened):
        update = layer.update(opened.weights())
        weight = state[layer.weight_name]
        matrix = update.matrix.tensor()
        state[layer.weight_name] = weight + to_stored(layer.module, matrix.view(layer.shape))
        if update.bias is not None and layer.bias_name is not None:
            state[layer.bias_name] = state[layer.bias_name] + update.bias
    return state


def check(config: PeftConfig, tmp_path: Path) -> None:
    folder = trained(config, tmp_path / "adapter")
    wanted, found, bare = merged_by_peft(folder), folded(folder), llama(seed=1).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5)
    assert any(float((tensor - bare[name]).abs().max()) > 1e-4 for name, tensor in found.items())
    inspected = xadapt.inspect(folder, llama(seed=1))
    assert inspected.layers
    assert all(layer.update is not None for layer in inspected.layers)


@pytest.mark.parametrize("peft_type", STOCK)
def test_a_stock_type_is_merged_as_peft_does_or_refused(peft_type: str, tmp_path: Path) -> None:
    if peft_type in EXACT:
        check(peft_config(peft_type, **{"target_modules": TARGETS, **MORE.get(peft_type, {})}), tmp_path)
        return
    adapter = Adapter(kind=stock_kind(peft_type), config=PeftConfig(peft_type=PeftType(peft_type)), tensors={})
    with pytest.raises(
        ValueError, match=rf"type {peft_type} cannot be told .*merge_and_unload\(\), then save_pretrained"
    ):
        layers_of([adapter], open_base(llama(seed=1)))


@pytest.mark.parametrize("peft_type", HOSTS)
@pytest.mark.parametrize("space", SPACES)
def test_a_hosted_type_is_merged_as_peft_does(peft_type: str, space: str, tmp_path: Path) -> None:
    check(feature_space(peft_config(peft_type, target_modules=TARGETS), space), tmp_path)


class TestLora:
    @pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva"])
    def test_initialisations_that_leave_the_base_alone(self, init: Any, tmp_path: Path) -> None:
        check(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init), tmp_path)

    def test_every_initialisation_that_changes_the_base_is_refused(self) -> None:
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"):
            assert init.startswith(CHANGES_THE_BASE)
            config = LoraConfig(r=4, target_modules=TARGETS)
            config.init_lora_weights = init  # type: ignore[assignment]
            with pytest.raises(ValueError, match=rf"init_lora_weights='{init}', which takes a part out"):
                layers_of([Adapter(kind=LORA, config=config, tensors={})], open_base(llama(seed=1)))

    @pytest.mark.parametrize(
        "options",
        [
            {"use_dora": True},
            {"use_rslora": True},
            {"lora_bias": True},
            {"use_bdlora": BdLoraConfig(target_modules_bd_b=TARGETS, nblocks=2)},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_variants_that_merging_tells_of(self, options: dict[str, Any], tmp_path: Path) -> None:
        check(LoraConfig(r=4, target_modules=TARGETS, **options), tmp_path)

    def test_a_variant_that_truncates_the_base_is_refused(self, tmp_path: Path) -> None:
        config = LoraConfig(r=4, target_modules=TARGETS, kasa_config=KasaConfig())
        with pytest.raises(ValueError, match=r"trained with kasa_config, and .*merge_and_unload\(\)"):
            folded(trained(config, tmp_path / "adapter"))

    @pytest.mark.parametrize("option", [name for name in VARIANTS if name not in TOLD_BY_MERGING])
    def test_every_other_variant_is_refused(self, option: str) -> None:
        config = LoraConfig(r=4, target_modules=TARGETS)
        setattr(config, option, ["something"])
        with pytest.raises(ValueError, match=f"trained with {option}"):
            layers_of([Adapter(kind=LORA, config=config, tensors={})], open_base(llama(seed=1)))


def test_a_type_that_is_told_is_one_of_peft_s() -> None:
    assert set(STOCK) >= EXACT


def test_a_folder_of_a_type_that_copies_the_base_is_refused(tmp_path: Path) -> None:
    """LN_TUNING stores its layers whole, so what it adds depends on the base."""
    folder = trained(LNTuningConfig(target_modules=TARGETS), tmp_path / "adapter")
    with pytest.raises(ValueError, match="type LN_TUNING cannot be told"):
        folded(folder)
