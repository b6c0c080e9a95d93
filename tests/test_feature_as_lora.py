"""What PEFT does for LoRA alone, by its PEFT type, and does for input and output adaptation too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftWarning, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from transformers import FalconMambaConfig, FalconMambaForCausalLM, LlamaConfig, LlamaForCausalLM

from xadapt import InputAdaConfig, OutputAdaConfig

CONFIGS = [InputAdaConfig, OutputAdaConfig]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)).eval()


def trained(config_cls: Any, folder: Path, seed: int, rank: int, x: Tensor) -> Tensor:
    """Saves an adapter that is no identity and returns the output with it."""
    base = mlp()
    torch.manual_seed(seed)
    config = config_cls(r=rank, lora_alpha=3 * rank, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(folder)
    with torch.inference_mode():
        output: Tensor = model(x)
    return output


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config_cls", CONFIGS)
def test_adapters_of_other_rank_are_swapped_in_place(config_cls: Any, padded: bool, tmp_path: Path) -> None:
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    first = trained(config_cls, tmp_path / "first", seed=1, rank=4, x=x)
    second = trained(config_cls, tmp_path / "second", seed=2, rank=2, x=x)
    model = PeftModel.from_pretrained(mlp(), tmp_path / "first").eval()
    if padded:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == {6}
    with torch.inference_mode():
        torch.testing.assert_close(model(x), first)
        hotswap_adapter(model, str(tmp_path / "second"), adapter_name="default", torch_device="cpu")
        torch.testing.assert_close(model(x), second)
        assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize("config_cls", CONFIGS)
def test_layers_whose_weight_mamba_reads_without_a_call_are_refused(config_cls: Any) -> None:
    config = FalconMambaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, state_size=4, vocab_size=50)  # type: ignore[call-arg]  # typed in part
    model = FalconMambaForCausalLM(config)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(model, config_cls(r=2, target_modules=["in_proj", "out_proj"]))
    assert [name for name, _ in model.named_modules()] == before


def tied_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40, tie_word_embeddings=True))


@pytest.mark.parametrize("config_cls", CONFIGS)
class TestEnsureWeightTying:
    def test_modules_to_save_stay_tied(self, config_cls: Any) -> None:
        config = config_cls(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        model: Any = get_peft_model(tied_llama(), config).base_model.model
        assert isinstance(model.lm_head, ModulesToSaveWrapper)
        head, embedding = model.lm_head.modules_to_save, model.model.embed_tokens.modules_to_save
        assert head["default"].weight is embedding["default"].weight

    def test_a_tied_output_head_as_target_is_refused(self, config_cls: Any) -> None:
        config = config_cls(r=2, target_modules=["lm_head", "q_proj"], ensure_weight_tying=True)
        with pytest.raises(ValueError, match=r"tied to \['lm_head'\].*modules_to_save"):
            get_peft_model(tied_llama(), config)


@pytest.mark.parametrize("config_cls", CONFIGS)
def test_saving_a_shard_as_if_it_were_whole_warns(config_cls: Any, tmp_path: Path) -> None:
    model = get_peft_model(mlp(), config_cls(r=2, target_modules=["0"], lora_bias=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "whole")  # the bias of lora_B is one-dimensional and whole
    layer: Any = model.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.zeros(8)
    with pytest.warns(PeftWarning, match="shards were not gathered"):
        model.save_pretrained(tmp_path / "shard")


@pytest.mark.parametrize("config_cls", CONFIGS)
@pytest.mark.parametrize("bias", [True, False])
def test_lora_bias_warns_where_the_base_layer_has_no_bias(config_cls: Any, bias: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(nn.Sequential(nn.Linear(4, 4, bias=bias)), config_cls(r=2, target_modules=["0"], lora_bias=True))
    said = [str(w.message) for w in caught if w.category is PeftWarning]
    assert said == [] if bias else len(said) == 1 and "layer of type Linear has no bias" in said[0]
