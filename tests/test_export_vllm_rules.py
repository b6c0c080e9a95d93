"""vLLM reads an export right. It is not installed here: its rules are said again below, as github.com/vllm-project/vllm has them.

vllm/lora/peft_helper.py at commit 02143692ba86a7ba6198a67e12982c5317c8bd2f: r, lora_alpha and use_rslora of the config make
one scaling for all modules (patterns are not read); modules_to_save and DoRA are refused, ranks are bounded.
vllm/lora/lora_model.py at commit 0306474e9d1f26d8717aad457b9511f0c9e57d60: tensor names are parsed to module names, and
modules other than the expected ones are refused; a module's rank is that of its tensors, its scaling the config's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import xadapt
from tests.conftest import make_llama
from tests.feature_models import adapted
from xadapt import HybridAdaConfig, InputAdaConfig, OutputAdaConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_LINEARS = set(TARGETS) | {"embed_tokens", "lm_head"}  # what vLLM puts LoRA layers on
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"0\.self_attn\.v_proj": 3, "down_proj": 6},
    "alpha_pattern": {"k_proj": 1, "o_proj": 32},
}
CASES: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "lora, patterns": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **PATTERNS),
    "lora, rslora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True, **PATTERNS),
    "input, patterns": InputAdaConfig(r=4, lora_alpha=6, target_modules=TARGETS, **PATTERNS),
    "output, rslora": OutputAdaConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True, **PATTERNS),
    "hybrid": HybridAdaConfig(r=4, feature_r=1, lora_alpha=6, target_modules=TARGETS),
    "tied": InputAdaConfig(r=4, target_modules=TARGETS[:3], tie=r"(layers\.\d+)\.self_attn"),
    "some layers": InputAdaConfig(r=4, target_modules=TARGETS, layers_to_transform=[1]),
}


def vllm_loads(folder: Path, max_lora_rank: int) -> dict[str, Tensor]:
    """What vLLM adds to each weight, by module path; it refuses with a ValueError."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["r"] > max_lora_rank:
        raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}.")
    if config.get("bias") != "none":
        raise ValueError("Adapter bias is not supported.")
    if config.get("modules_to_save"):
        raise ValueError("vLLM only supports modules_to_save being None.")
    if config.get("use_dora"):
        raise ValueError("vLLM does not yet support DoRA.")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        start = 2 if name.startswith("base_model.model.") else 0
        if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise ValueError(f"{name} is unsupported LoRA weight")
        if parts[-3] not in LLAMA_LINEARS:
            raise ValueError(f"unexpected module {name}")
        sides.setdefault(".".join(parts[start:-2]), {})[parts[-2]] = tensor
    for path, side in sides.items():
        if side["lora_A"].shape[0] > max_lora_rank:
            raise ValueError(f"{path} is longer than vLLM's buffers")
    return {path: scaling * side["lora_B"].double() @ side["lora_A"].double() for path, side in sides.items()}


def changed(config: Any) -> dict[str, Tensor]:
    """What the tuner does to each weight of the target, by PEFT's own merge."""
    bare, merged = make_llama(seed=4).double(), adapted(make_llama(seed=4).double(), config).merge_and_unload()
    differences = {
        name.removesuffix(".weight"): (tensor - bare.get_parameter(name)).detach()
        for name, tensor in merged.named_parameters()
    }
    return {path: difference for path, difference in differences.items() if difference.any()}


@pytest.mark.parametrize("name", CASES)
def test_every_layer_gets_its_own_update(name: str, tmp_path: Path) -> None:
    source = adapted(make_llama(), CASES[name])
    xadapt.save(source, tmp_path / "adapter")
    make_llama(seed=4).save_pretrained(tmp_path / "target")
    report = xadapt.export_lora(tmp_path / "adapter", tmp_path / "target", tmp_path / "lora")
    ranks = [layer.rank for layer in report.layers]
    loaded, expected = vllm_loads(report.out, max_lora_rank=max(ranks)), changed(CASES[name])
    assert loaded.keys() == expected.keys()
    for path, update in expected.items():
        assert (loaded[path] - update).norm() <= 1e-5 * update.norm(), path


def test_the_config_says_what_vllm_asks_for(tmp_path: Path) -> None:
    report = xadapt.export_lora(adapted(make_llama(), CASES["lora, patterns"]), make_llama(), tmp_path / "lora")
    config = json.loads((report.out / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TARGETS)  # a list of module names, and no regular expression
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]  # so a reader of neither is as right as one of both
    assert (config["bias"], config["lora_bias"], config["modules_to_save"]) == ("none", False, None)


def make_qwen() -> Qwen2ForCausalLM:
    """Biases on q, k and v, none on o."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def test_a_bias_is_dropped_on_demand(tmp_path: Path) -> None:
    """vLLM has no place for what moves a bias, and says so."""
    tuner = adapted(make_qwen(), OutputAdaConfig(r=2, target_modules=["q_proj", "o_proj"]))
    report = xadapt.export_lora(tuner, make_qwen(), tmp_path / "with")
    with pytest.raises(ValueError, match="unsupported LoRA weight"):
        vllm_loads(report.out, 64)
    report = xadapt.export_lora(tuner, make_qwen(), tmp_path / "without", drop_bias=True)
    assert len(vllm_loads(report.out, 64)) == 4
    dropped = {layer.path.rpartition(".")[2]: layer.dropped_bias for layer in report.layers}
    assert dropped["o_proj"] == 0 < dropped["q_proj"]
