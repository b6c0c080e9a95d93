"""A tiny language model that siblings in other bases can be made of."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def square_llama(seed: int = 0) -> LlamaForCausalLM:
    """As many key and value heads as query heads, which `reparam` turns."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # trained models do not lie this near to zero
        parameter.data *= 1.0 if parameter.ndim == 1 else 10.0
    return model
