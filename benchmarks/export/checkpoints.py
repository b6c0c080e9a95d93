"""Synthetic checkpoints and adapters in real shapes: random weights, real names, files and configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import xadapt

LLAMA: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}  # Llama-3.2-1B and Llama-3.1-8B
FLUX: dict[str, dict[str, Any]] = {
    "flux": {"guidance_embeds": True},  # the class's other defaults are FLUX.1-dev's too
    "flux-tiny": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
}
SHARD = 5 * 10**9  # bytes; one file for 1B, as on the hub
SETS: dict[str, dict[str, Any]] = {
    "q,v": {"llama": ["q_proj", "v_proj"], "flux": ["to_q", "to_v"]},
    "all linear": {
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "flux": r"(single_)?transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_out\.0)"
        r"|ff\.net\.(0\.proj|2)|ff_context\.net\.(0\.proj|2)|proj_mlp|proj_out|norm\.linear|norm1\.linear|norm1_context\.linear)",
    },
}


def family(size: str) -> str:
    return "flux" if size in FLUX else "llama"


def skeleton(size: str) -> nn.Module:
    """The network without data."""
    with torch.device("meta"):
        if family(size) == "flux":
            from diffusers import FluxTransformer2DModel

            model: Any = FluxTransformer2DModel(**FLUX[size])
            return model
        from transformers import LlamaConfig, LlamaForCausalLM

        options = {"tie_word_embeddings": True, "num_key_value_heads": 2, **LLAMA[size]}
        return LlamaForCausalLM(LlamaConfig(**options, dtype="bfloat16"))


def make_base(size: str, folder: Path) -> Path:
    """Writes the checkpoint, unless it is there."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = skeleton(size)
    stem = "diffusion_pytorch_model" if family(size) == "flux" else "model"
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, Tensor]] = [{}]
    total = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        nbytes = 2 * tensor.numel()
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + nbytes > SHARD:
            _write(shards[-1], folder / f"{stem}-{len(shards):05d}.safetensors.part")
            shards[-1] = dict.fromkeys(shards[-1], noise[:0])
            shards.append({})
        shards[-1][name] = noise.repeat(tensor.numel() // len(noise) + 1)[: tensor.numel()].view(tensor.shape).clone()
        total += nbytes
    _write(shards[-1], folder / f"{stem}-{len(shards):05d}.safetensors.part")
    _name_shards(folder, stem, [list(shard) for shard in shards], total)
    model.config.architectures = [type(model).__name__]
    model.save_config(folder) if family(size) == "flux" else model.config.save_pretrained(folder)
    return folder


def _write(shard: dict[str, Tensor], path: Path) -> None:
    save_file(shard, path, metadata={"format": "pt"})


def _name_shards(folder: Path, stem: str, names: list[list[str]], total: int) -> None:
    import json

    if len(names) == 1:
        (folder / f"{stem}-00001.safetensors.part").rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, held in enumerate(names, 1):
        name = f"{stem}-{number:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{stem}-{number:05d}.safetensors.part").rename(folder / name)
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(size: str, space: str, layers: str, rank: int, folder: Path) -> Path:
    """A random adapter for the shapes of a base, in bfloat16. `space`: "input", "output" or "parameter"."""
    from peft import LoraConfig

    config_cls = {"input": xadapt.InputAdaConfig, "output": xadapt.OutputAdaConfig, "parameter": LoraConfig}[space]
    targets: Any = SETS[layers][family(size)]
    model = get_peft_model(skeleton(size), config_cls(r=rank, target_modules=targets), low_cpu_mem_usage=True)
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                random = torch.randn(parameter.shape).mul_(0.02).bfloat16()
                module._parameters[name] = nn.Parameter(random)
    return xadapt.save(model, folder, save_embedding_layers=False)
