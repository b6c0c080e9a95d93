"""Fewer tensors kept and fewer kernels launched for the common case: one plain LoRA on the identity.

PEFT's LoRA keeps the layer's input x and the r-wide h = Ax for the backward pass. The functions here keep no more than
that. In output space this takes a step: ∂A = ghᵀy with y = Wx + b, but also ∂A = (ghᵀx)Wᵀ + (Σgh)bᵀ. So either x, which
neighbouring layers share, or y is enough, and the narrower of the two is kept.

What is kept of the intermediate results (h, y) has no history, so where the backward pass is itself recorded
(`create_graph=True`) it is calculated again, or handed out as a second output, by which autograd knows it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from xadapt.peft_internals import HostedLayer, LoraLinear

from .spaces import Space
from .torch_internals import is_transformed


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        if torch.is_grad_enabled():
            h = x.to(ctx.dtype) @ a.to(ctx.dtype).T
        g = grad.to(ctx.dtype)
        gh = (g @ b.to(ctx.dtype)) * ctx.scaling
        grad_x = torch.addmm(g, gh, a.to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_a = (gh.T @ x.to(ctx.dtype)).to(a.dtype) if ctx.needs_input_grad[1] else None
        grad_b = (g.T @ h).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_a, grad_b, None, None


class _InputLinear(torch.autograd.Function):
    """y = W(x + s (x Aᵀ) Bᵀ) + bias for a frozen W (o, i) and x (n, i), all of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        h = x @ a.T
        ctx.save_for_backward(x, h, w, a, b)
        ctx.scaling = scaling
        if _cheaper_on_the_weight(x, w):  # the exact LoRA form on this base: B of the LoRA is WB
            y = nn.functional.linear(x, w, bias)
            return y.addmm_(h, (w @ b).T, alpha=scaling)
        return nn.functional.linear(torch.addmm(x, h, b.T, alpha=scaling), w, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            h = x @ a.T
        on_weight = _cheaper_on_the_weight(x, w)
        gz = grad @ w if needs_x or not on_weight else grad
        gh = (grad @ (w @ b) if on_weight else gz @ b) * ctx.scaling
        grad_a = gh.T @ x if needs_a else None
        grad_b = None
        if needs_b:
            grad_b = (w.T @ (grad.T @ h) if on_weight else gz.T @ h).mul_(ctx.scaling)
        grad_x = None
        if needs_x:  # last, since it writes into gz
            grad_x = torch.addmm(gz, gh, a) if torch.is_grad_enabled() else gz.addmm_(gh, a)
        return grad_x, None, None, grad_a, grad_b, None


def _cheaper_on_the_weight(x: Tensor, w: Tensor) -> bool:
    """Whether h(WB)ᵀ, with WB made for it, takes fewer multiplications than W applied to x + hBᵀ."""
    (n, i), o = x.shape, w.shape[0]
    return o * (n + i) < n * i


class _OutputLinear(torch.autograd.Function):
    """z = y + s (y Aᵀ) Bᵀ with y = x Wᵀ + bias, for a frozen W (o, i) and x (n, i), all of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        y = nn.functional.linear(x, w, bias)
        h = y @ a.T
        narrows = w.shape[0] < w.shape[1]  # then y is the smaller of the two tensors that ∂A can be had from
        ctx.save_for_backward(y if narrows else x, h, w, bias, a, b)
        ctx.scaling, ctx.narrows = scaling, narrows
        ctx.set_materialize_grads(False)
        if (
            narrows and torch.compiler.is_compiling()
        ):  # a compiled y would get a gradient of zeros, and a product with it
            return torch.addmm(y, h, b.T, alpha=scaling)
        return (torch.addmm(y, h, b.T, alpha=scaling), y) if narrows else y.addmm_(h, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_y: Tensor | None = None) -> tuple[Tensor | None, ...]:
        kept, h, w, bias, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = None if grad_y is None or not needs_x else grad_y @ w  # there is one in a second backward pass only
        grad_a = grad_b = None
        if grad is None:
            return grad_x, None, None, None, None, None
        if torch.is_grad_enabled():
            h = (kept if ctx.narrows else nn.functional.linear(kept, w, bias)) @ a.T
        gh = (grad @ b) * ctx.scaling
        if needs_x:
            through = torch.addmm(grad, gh, a) @ w
            grad_x = through if grad_x is None else grad_x + through
        if needs_a:
            grad_a = gh.T @ kept
            if not ctx.narrows:
                grad_a = grad_a @ w.T if bias is None else torch.addr(grad_a @ w.T, gh.sum(0), bias)
        if needs_b:
            grad_b = (grad.T @ h).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


def fused_forward(space: Space, base: nn.Module, hosted: HostedLayer, x: Tensor) -> Tensor | None:
    """Output of a linear with one hosted layer, or None where the case is not the common one: PEFT's code has to run."""
    factors = _only_factors(hosted)
    if factors is None:
        return None
    a, b, scaling = factors
    if is_transformed(x, a, b):
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and _is_frozen_linear(base) and x.dtype == base.weight.dtype == a.dtype:
        whole = _InputLinear if space.name == "input" else _OutputLinear
        outs = whole.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, scaling)
        out = cast(Tensor, outs[0] if isinstance(outs, tuple) else outs)
        return out.view(*x.shape[:-1], out.shape[-1])
    return space.forward(base, lambda z: _residual(z, a, b, scaling, autocast), x)


def _residual(x: Tensor, a: Tensor, b: Tensor, scaling: float, autocast: bool) -> Tensor:
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else a.dtype
    flat = x.reshape(-1, x.shape[-1])
    return cast(Tensor, _Residual.apply(flat, a, b, scaling, dtype)).view(x.shape)


def _only_factors(hosted: Any) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, s) if there is exactly one active plain LoRA, without dropout, offset or hooks."""
    if type(hosted) is not LoraLinear:
        return None
    active = [name for name in hosted.active_adapters if name in hosted.lora_A]
    if len(active) != 1 or active[0] in hosted.lora_variant:
        return None
    a, b = hosted.lora_A[active[0]], hosted.lora_B[active[0]]
    if not (_is_plain(a) and _is_plain(b)) or b.bias is not None:
        return None
    dropout = hosted.lora_dropout[active[0]]
    if not isinstance(dropout, nn.Identity) and dropout.training:
        return None
    scaling = hosted.scaling[active[0]]
    if isinstance(scaling, Tensor):  # PEFT's hotswapping, which must not recompile for a new scaling
        return None
    return a.weight, b.weight, scaling


def _is_frozen_linear(base: nn.Module) -> bool:
    return _is_plain(base) and not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)


def _is_plain(linear: nn.Module) -> bool:
    """Whether the call may be left out and the weight used instead: nobody has to see the call, and the weight is there.

    FSDP and tensor parallelism give the layer another class or its weight another type, offloading (accelerate,
    diffusers) keeps the weight elsewhere and replaces `forward`, quantisation packs the weight.
    """
    return (
        type(linear) is nn.Linear
        and type(linear.weight) in (nn.Parameter, Tensor)
        and "forward" not in vars(linear)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
    )
