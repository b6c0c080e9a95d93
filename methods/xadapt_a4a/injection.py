"""Putting maps on a target and taking them off again (A4A, Eq. 13). The target's weights are never touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xadapt.errors import some

from .bank import Maps
from .calls import NEGATIVE, are_separate, listen
from .processors import Decoupled, Term, around
from .scales import Scale, layer_scales
from .targets import AttentionLayer


class Attachment:
    """One adapter's maps on one target, from `attach` until `detach` or the end of a `with` block."""

    def __init__(
        self,
        target: nn.Module,
        layers: Sequence[AttentionLayer],
        maps: Maps,
        *,
        halves: int,
        scale: Scale,
        masks: Tensor | None = None,
    ) -> None:
        self.target = target
        self._layers = tuple(layers)
        self._names = [layer.name for layer in layers]
        scales = layer_scales(scale, self._names)  # before anything is changed
        half = 1 if halves == 2 and are_separate(layers) else None
        self._terms = [
            Term(key, value, halves, one, masks, half) for (key, value), one in zip(maps, scales, strict=True)
        ]
        self._processors: list[Decoupled] = []
        self._reached = False
        for layer, term in zip(self._layers, self._terms, strict=True):
            processor = around(layer.module.processor)
            if processor is not layer.module.processor:
                layer.module.set_processor(processor)
            processor.terms.append(term)
            self._processors.append(processor)
        self._hooks: list[Any] = [target.register_forward_pre_hook(self._before_forward)]
        self._end_listening = listen(target, self._half) if are_separate(layers) else None
        self._watched: list[Any] = [term.key for term in self._terms if term.key.requires_grad]
        self._hooks += [key.register_hook(self._gradient) for key in self._watched]

    @property
    def is_attached(self) -> bool:
        return bool(self._hooks)

    @property
    def backward_is_due(self) -> bool:
        """Whether the target would compute its activations again in a backward that has not come yet."""
        if not self.is_attached or not torch.is_grad_enabled() or self._reached or not self._watched:
            return False
        acting = any(term.scale != 0 for term in self._terms)
        return acting and bool(getattr(self.target, "is_gradient_checkpointing", False))

    def __enter__(self) -> Attachment:
        if not self.is_attached:
            raise RuntimeError("These maps are detached, so they would do nothing here. Attach the adapter again.")
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        due = self.backward_is_due
        if self.is_attached:
            self.detach()
        if due and error is None:
            raise RuntimeError(
                "The maps were taken off before backward() reached them, while the target uses gradient checkpointing: it would "
                "compute its activations again without them, or with others. Call backward() inside the `with` block; "
                "for a forward without one, open the block under torch.no_grad()."
            )

    def set_scale(self, scale: Scale) -> None:
        """λ from here on: a number, a list with one per layer, or a dict by block."""
        if not self.is_attached:
            raise RuntimeError("These maps are detached, so their scale says nothing. Attach the adapter again.")
        for term, one in zip(self._terms, layer_scales(scale, self._names), strict=True):
            term.scale = one

    def detach(self) -> None:
        """Takes the maps off. Where no other adapter is left, the layer has its own processor again."""
        if not self.is_attached:
            raise RuntimeError("These maps are detached already.")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._end_listening is not None:
            self._end_listening()
        for layer, processor, term in zip(self._layers, self._processors, self._terms, strict=True):
            processor.terms[:] = [other for other in processor.terms if other is not term]
            if not processor.terms and layer.module.processor is processor:
                layer.module.set_processor(processor.base)

    def _half(self, context: str) -> None:
        """Which half the next call of a target is for that is called once for each."""
        for term in self._terms:
            if term.half is not None:
                term.half = 0 if context == NEGATIVE else 1
            elif context == NEGATIVE:
                raise RuntimeError(
                    "The pipeline calls its target a second time, for the negative prompt (true_cfg_scale), and would show it the "
                    "reference there too. Attach with guidance=True."
                )

    def _gradient(self, gradient: object) -> None:
        self._reached = True

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Some calls put other processors in place and say nothing: the reference would be ignored in silence."""
        lost = [
            layer.name
            for layer, processor in zip(self._layers, self._processors, strict=True)
            if layer.module.processor is not processor
        ]
        if lost:
            raise RuntimeError(
                f"The attached maps are gone from {len(lost)} of {len(self._layers)} layers ({some(lost, 2)}): something has set "
                "other attention processors since (fuse_qkv_projections, set_attention_slice, unload_ip_adapter, "
                "load_ip_adapter, …). Call it before attaching."
            )
