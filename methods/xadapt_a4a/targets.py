"""Which attention layers of a target take a decoupled term, read from the live model: nothing here goes by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from xadapt.errors import some
from xadapt.fingerprint import layer_print

from .processors import CROSS, JOINT, STOCK_IP_ADAPTER, Decoupled


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of the target."""

    name: str  # the module's path
    module: Any
    width: int
    """d̂_i, the width of its queries; keys may be narrower where heads share them."""

    heads: int


def find_attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The layers that attend to the condition, in the order in which the model holds them.

    These are the cross-attention layers, and in joint-attention transformers (SD3, FLUX) the blocks with projections of their
    own for the text.

    Raises:
        TypeError: it is no module.
        ValueError: there is none, they carry an IP-Adapter of diffusers already, or one of them computes its attention in a
            way that is not known here.
    """
    if not isinstance(model, nn.Module):
        parts = getattr(model, "components", None)
        names = [name for name in ("unet", "transformer") if isinstance(parts, dict) and name in parts]
        hint = f" Pass pipeline.{names[0]}." if names else ""
        raise TypeError(f"A target is a denoiser, an nn.Module, not {type(model).__name__}.{hint}")
    found = [
        AttentionLayer(name, module, module.inner_dim, module.heads)
        for name, module in model.named_modules()
        if isinstance(module, Attention | FluxAttention) and _takes_term(name, module)
    ]
    if not found:
        seen = sorted({type(module.processor).__name__ for module in model.modules() if hasattr(module, "processor")})
        raise ValueError(
            f"{type(model).__name__} has no attention layer to inject into. Wanted: cross-attention, or joint attention as in "
            f"SD3 and FLUX. Attention processors seen: {some(seen) or 'none'}."
        )
    return found


def _takes_term(name: str, module: Any) -> bool:
    processor = module.processor
    kind = processor.stock if isinstance(processor, Decoupled) else type(processor)
    if isinstance(module, FluxAttention):
        # The single blocks see text and image as one sequence, without its lengths.
        return kind is FluxAttnProcessor and module.added_kv_proj_dim is not None
    if kind in JOINT:
        return module.added_kv_proj_dim is not None
    if not module.is_cross_attention:
        return False
    if issubclass(kind, STOCK_IP_ADAPTER):
        raise ValueError(
            f"{name} carries an IP-Adapter of diffusers already. Call pipe.unload_ip_adapter() first, then attach."
        )
    if kind not in CROSS or module.group_norm is not None or module.spatial_norm is not None:
        known = ", ".join(sorted(cls.__name__ for cls in (*CROSS, *JOINT, FluxAttnProcessor)))
        raise ValueError(
            f"{name} computes its attention with {kind.__name__}, which A4A cannot extend. Known: {known}. "
            "If it is an option that you have set (attention slicing, fused projections), undo it."
        )
    return True


def unwrapped(model: Any) -> Any:
    """The module itself: torch.compile's wrapper has its layers under other names."""
    return getattr(model, "_orig_mod", model)


def working_place(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where and in what the model computes; None where its weights do not tell, being offloaded or quantised."""
    device, dtype = getattr(model, "device", None), getattr(model, "dtype", None)
    if device is not None and torch.device(device).type == "meta":
        device = None
    return device, dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else None


def target_fingerprint(layers: Sequence[AttentionLayer]) -> str:
    """A few numbers of the first, the middle and the last layer's queries, hashed. "" where weights cannot be read."""
    digest = hashlib.sha256()
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        weight: Any = layer.module.to_q.weight
        printed = layer_print(weight) if isinstance(weight, Tensor) else None
        if printed is None or not printed.digest:
            return ""
        digest.update(f"{printed.shape} {printed.digest}".encode())
    return digest.hexdigest()[:16]
