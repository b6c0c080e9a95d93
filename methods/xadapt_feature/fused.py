"""Fewer tensors kept and fewer kernels launched for the common case: one plain LoRA on the identity.

PEFT's LoRA keeps the layer's input x and the r-wide h = Ax for the backward pass. The two functions here keep no more
than that. In output space this takes one step: ∂A needs y = Wx + b, but ∂A = ghᵀy = (ghᵀx)Wᵀ + (Σgh)bᵀ, so x, which
neighbouring layers share, is enough, and y (one tensor per layer) need not be kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .peft_internals import LoraLinear

if TYPE_CHECKING:
    from .layer import FeatureLayer


class _Residual(torch.autograd.Function):
    """z = x + s (x Aᵀ) Bᵀ for x (n, d), A (r, d), B (d, r), calculated in `dtype`, returned in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(dtype)
        h = wide @ a.to(dtype).T
        ctx.save_for_backward(x, h, a, b)
        ctx.scaling, ctx.dtype = scaling, dtype
        return torch.addmm(wide, h, b.to(dtype).T, alpha=scaling).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        g = grad.to(ctx.dtype)
        gh = (g @ b.to(ctx.dtype)) * ctx.scaling
        grad_x = torch.addmm(g, gh, a.to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_a = (gh.T @ x.to(ctx.dtype)).to(a.dtype) if ctx.needs_input_grad[1] else None
        grad_b = (g.T @ h).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_a, grad_b, None, None


class _OutputLinear(torch.autograd.Function):
    """z = y + s (y Aᵀ) Bᵀ with y = x Wᵀ + bias, for a frozen W (o, i) and x (n, i), all of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        y = nn.functional.linear(x, w, bias)
        h = y @ a.T
        ctx.save_for_backward(x, h, w, bias, a, b)
        ctx.scaling = scaling
        return y.addmm_(h, b.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w, bias, a, b = ctx.saved_tensors
        gh = (grad @ b) * ctx.scaling
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addmm(grad, gh, a) @ w
        if ctx.needs_input_grad[3]:
            grad_a = (gh.T @ x) @ w.T
            if bias is not None:
                grad_a = torch.addr(grad_a, gh.sum(0), bias)
        if ctx.needs_input_grad[4]:
            grad_b = (grad.T @ h).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


def fused_forward(layer: FeatureLayer, x: Tensor) -> Tensor | None:
    """The layer's output, or None where the case is not the common one and PEFT's code has to run."""
    factors = _only_factors(layer)
    if factors is None:
        return None
    a, b, scaling = factors
    base = layer.base_layer
    autocast = torch.is_autocast_enabled(x.device.type)
    if layer.space.name == "output":
        if not autocast and _is_frozen_linear(base) and x.dtype == base.weight.dtype == a.dtype:
            flat = x.reshape(-1, x.shape[-1])
            out = _OutputLinear.apply(flat, base.weight, base.bias, a, b, scaling)
            return cast(Tensor, out).view(*x.shape[:-1], -1)
        return _residual(base(x), a, b, scaling, autocast)
    return cast(Tensor, base(_residual(x, a, b, scaling, autocast)))


def _residual(x: Tensor, a: Tensor, b: Tensor, scaling: float, autocast: bool) -> Tensor:
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else a.dtype
    flat = x.reshape(-1, x.shape[-1])
    return cast(Tensor, _Residual.apply(flat, a, b, scaling, dtype)).view(x.shape)


def _only_factors(layer: FeatureLayer) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, s) if the layer is a linear with exactly one active plain LoRA, without dropout, offset or hooks."""
    hosted: Any = layer.hosted
    if layer.feature_axis != -1 or type(hosted) is not LoraLinear or len(layer.hosts) != 1:
        return None
    active = [name for name in hosted.active_adapters if name in hosted.lora_A]
    if len(active) != 1 or active[0] in hosted.lora_variant:
        return None
    a, b = hosted.lora_A[active[0]], hosted.lora_B[active[0]]
    # A subclass or a hook (tensor parallelism, FSDP) wants to see the call.
    if type(a) is not nn.Linear or type(b) is not nn.Linear or b.bias is not None or _has_hooks(a) or _has_hooks(b):
        return None
    dropout = hosted.lora_dropout[active[0]]
    if not isinstance(dropout, nn.Identity) and dropout.training:
        return None
    return a.weight, b.weight, hosted.scaling[active[0]]


def _is_frozen_linear(base: nn.Module) -> bool:
    return (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and type(base.weight) in (nn.Parameter, Tensor)
        and not _has_hooks(base)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
