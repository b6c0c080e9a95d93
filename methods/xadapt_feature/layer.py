"""`FeatureLayer`: a base layer with a PEFT layer, hosted on the identity, on one side of it.

What PEFT, transformers and diffusers see is one `BaseTunerLayer` at the place of the base layer. The hosted layer
is its child, but hidden from `modules()`: the loops over adapter layers in those libraries would otherwise meet it a
second time and merge it into the identity.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from xadapt.peft_internals import BaseTunerLayer, HostedLayer, QuantizationBackend, check_adapters_to_merge
from xadapt.update import Update, calculating_in, to_stored

from .action import phi_of
from .base_layer import BaseLayer, ConvLayer, EmbeddingLayer, describe
from .fused import fused_forward
from .identity import IdentityLinear
from .spaces import Space

# What PEFT's forward hooks add to a layer's call; it is for the adapter, not for the base layer.
ADAPTER_ARGUMENTS = ("adapter_names",)


class FeatureLayer(nn.Module, BaseTunerLayer):
    """y = W Φ(x) + b or y = Φ(W x + b), where Φ is a PEFT layer hosted on an identity linear (Revisit Model Adaptation, Eq. 4).

    Args:
        base_layer: linear, convolution, embedding or quantised linear. It is called, never copied.
        space: the side of the base layer on which Φ stands.
        phi_name: the name of the child that holds the hosted layer, see `register.py`.
        backend: PEFT's quantisation backend of the base layer, if it is quantised.

    Raises:
        ValueError: this kind of layer has no such space.
    """

    def __init__(
        self, base_layer: nn.Module, space: Space, phi_name: str, backend: QuantizationBackend | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.space = space
        self.phi_name = phi_name
        self.quantization_backend = backend
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._added: Update | None = None  # what merging has added; unmerging subtracts it again, Φ is never inverted
        base = self.base
        base.check(space)
        self.feature_axis = base.feature_axis
        self.features = space.width(base.in_features, base.out_features)
        self.add_module(phi_name, IdentityLinear(self.features, beside=base_layer))

    # ---- the parts

    @property
    def base(self) -> BaseLayer:
        """The base layer as Φ sees it, described anew each time: quantisation backends replace the layer."""
        return describe(self.get_base_layer(), self, self.quantization_backend)

    @property
    def hosted(self) -> HostedLayer:
        """PEFT's own layer on the identity."""
        return cast(HostedLayer, self._modules[self.phi_name])

    @property
    def hosts(self) -> tuple[HostedLayer, ...]:
        """Every hosted layer: what is done to an adapter is done to all of them."""
        return (self.hosted,)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """All modules inside except the hosted layers themselves, see the head of this file."""
        hidden = set(map(id, self.hosts))
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if id(module) not in hidden:
                yield name, module

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:  # typing.Self is newer than Python 3.10
        """`fn` on every module inside except the hosted layers: diffusers fuses, scales and unfuses by this."""
        for module in reversed(list(self.modules())):
            fn(module)
        return self

    def __getattr__(self, name: str) -> Any:
        """Adapter state (`lora_A`, `scaling`, ...) is found where PEFT's own layers have it: on the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or self.__dict__.get("phi_name") not in self._modules:
                raise  # not yet initialised, or being copied
            return self._hosted_attribute(name)

    def _hosted_attribute(self, name: str) -> Any:
        return getattr(self.hosted, name)

    def __repr__(self) -> str:
        return f"{self.space.name}_ada." + super().__repr__()

    # ---- what PEFT asks of an adapter layer, answered by the hosted layer

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:  # type: ignore[override]  # class attributes in PEFT
        return self.hosted.adapter_layer_names

    @property
    def other_param_names(self) -> tuple[str, ...]:  # type: ignore[override]  # a plain attribute in PEFT
        return self.hosted.other_param_names

    @property
    def frozen_peft_weight_names(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]  # likewise
        return self.hosted.frozen_peft_weight_names

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.hosted._active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        for hosted in self.hosts:
            hosted._active_adapter = names

    @property
    def scaling(self) -> dict[str, float]:
        """The hosted LoRA's; `rescale_adapter_scale` assigns a whole new dict."""
        return cast("dict[str, float]", self._hosted_attribute("scaling"))

    @scaling.setter
    def scaling(self, scaling: dict[str, float]) -> None:
        for hosted in self.hosts:
            cast(Any, hosted).scaling = dict(scaling)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        for hosted in self.hosts:
            hosted.set_adapter(adapter_names, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for hosted in self.hosts:
            hosted.set_requires_grad(adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        for hosted in self.hosts:
            hosted.delete_adapter(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        for hosted in self.hosts:
            hosted.enable_adapters(enabled)
        self._disable_adapters = not enabled

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for hosted in self.hosts:
            hosted._move_adapter_to_device_of_base_layer(adapter_name, device)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Called by stock tuners that meet this layer; ours address the hosted layer.

        Raises:
            ValueError: always, since a parameter-space adapter would silently become one in feature space.
        """
        raise ValueError(
            f"This layer carries an adapter in {self.space.name} space, so {adapter_name!r}, an adapter of another "
            "kind, cannot be added to it. Merge or unload the first one, or train both in one space."
        )

    # ---- forward

    def phi(self, features: Tensor, **adapter_arguments: Any) -> Tensor:
        """Φ along the feature axis; (..., d) for linears, (..., d, *positions) for convolutions."""
        if self.feature_axis == -1:
            return cast(Tensor, self.hosted(features, **adapter_arguments))
        moved = self.hosted(features.movedim(self.feature_axis, -1), **adapter_arguments)
        return cast(Tensor, moved.movedim(-1, self.feature_axis))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        ours = {name: kwargs.pop(name) for name in ADAPTER_ARGUMENTS if name in kwargs}
        if self.merged and ours.get("adapter_names") is not None:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if not (ours or args or kwargs):
            fused = self.fused(x)
            if fused is not None:
                return fused
        return self.adapted(x, lambda z: self.base_layer(z, *args, **kwargs), ours)

    def fused(self, x: Tensor) -> Tensor | None:
        """The adapted output at less cost, or None where only PEFT's own code knows it."""
        if self.feature_axis != -1 or len(self.hosts) != 1:
            return None
        return fused_forward(self.space, self.base_layer, self.hosted, x)

    def adapted(self, x: Tensor, base: Any, adapter_arguments: dict[str, Any]) -> Any:
        """The adapted output, through PEFT's own code."""
        return self.space.forward(base, lambda z: self.phi(z, **adapter_arguments), x)

    # ---- merge

    def folded(self, adapter_names: Sequence[str], weight: Tensor, bias: Tensor | None) -> Update:
        """What these adapters add to a weight (out, in, *kernel) and a bias (out,), which need not be this layer's own."""
        phi = phi_of(self.hosted, adapter_names, calculating_in(weight))
        if phi.offset is not None:
            self.base.check_padding(self.space)
        return self.space.update(weight, bias, phi)

    def _unmerged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without what is merged into them, in the dtype to calculate in."""
        base = self.base
        weight, bias = base.read(), base.bias
        bias = None if bias is None else bias.detach().to(weight.dtype)
        added = self._added_beside(weight)
        if added is not None:
            weight = weight - added.matrix.tensor().view(weight.shape)
            if bias is not None and added.bias is not None:
                bias = bias - added.bias
        return weight, bias

    def _added_beside(self, weight: Tensor) -> Update | None:
        """What merging has added, where the layer is now: it may have been moved, or cast, since."""
        if self._added is None:
            return None
        matrix, bias = self._added.matrix, self._added.bias
        parts = {part.name: getattr(matrix, part.name).to(weight) for part in fields(matrix)}
        return Update(replace(matrix, **parts), None if bias is None else bias.to(weight))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update of the base weight, in the layout that the base layer stores (for PEFT's `convert_to_lora`)."""
        weight, bias = self._unmerged()
        return to_stored(self.base.layer, self.folded([adapter_name], weight, bias).matrix.tensor().view(weight.shape))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA of a linear says the same: it has no bias, so not where Φ moves one or adds a constant."""
        if isinstance(self.base, (ConvLayer, EmbeddingLayer)) or adapter_name not in self._get_available_adapters():
            return False
        weight, bias = self._unmerged()
        moved = self.folded([adapter_name], weight, bias).bias
        return moved is None or not bool(moved.any())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold Φ into the base layer. Adapters add up, whether merged at once or one after another.

        Args:
            safe_merge: look at the merged weight for NaN and infinity as well, not at the update alone.
            adapter_names: the adapters to merge; by default the active ones.

        Raises:
            ValueError: the result is not finite, or this base layer cannot hold it. The layer is as it was.
        """
        names = self._to_merge(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        merged = [*self.merged_adapters, *names]
        added, weight = self._checked(merged, safe_merge)
        self._replace_added(added, weight, merged)
        self.merged_adapters = merged

    @torch.no_grad()
    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise the ValueError that `merge` would raise. Changes nothing."""
        names = self._to_merge(self.active_adapters if adapter_names is None else adapter_names)
        if names:
            self._checked([*self.merged_adapters, *names], safe_merge)

    def _to_merge(self, adapter_names: Sequence[str]) -> list[str]:
        available = self._get_available_adapters()
        return [name for name in adapter_names if name in available and name not in self.merged_adapters]

    def _checked(self, adapter_names: list[str], safe_merge: bool) -> tuple[Update, Tensor]:
        """What these adapters add to the unmerged weight, and that weight."""
        weight, bias = self._unmerged()
        added = self.folded(adapter_names, weight, bias)
        if added.bias is not None:
            self.base.check_constant(self.space)
        # A weight that NaN has been added to cannot be had back. The factors are looked at here, which costs nothing;
        # a product of finite ones that is not finite is found before the layer is written to.
        finite = _is_finite(*(getattr(added.matrix, part.name) for part in fields(added.matrix)), added.bias)
        if finite and safe_merge:
            update = added.matrix.tensor().view(weight.shape)
            finite = _is_finite(update, weight + update)
        if not finite:
            raise _broken(adapter_names)
        return added, weight

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract again what merging has added."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._replace_added(None, self.base.read())
        self.merged_adapters = []

    def _replace_added(self, added: Update | None, weight: Tensor, adapter_names: Sequence[str] = ()) -> None:
        """One write of the difference between what is to be added and what has been."""
        base, old = self.base, self._added_beside(weight)
        matrix, bias = (None, None) if added is None else (added.matrix.tensor(), added.bias)
        if matrix is not None and not _is_finite(matrix):
            raise _broken(adapter_names)
        if old is not None:
            matrix = -old.matrix.tensor() if matrix is None else matrix - old.matrix.tensor()
            if old.bias is not None:
                bias = -old.bias if bias is None else bias - old.bias
        if bias is not None:
            base.add_bias(bias)
        if matrix is not None:
            base.add(matrix.view(weight.shape))
        self._added = added


def _is_finite(*tensors: Tensor | None) -> bool:
    return all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors)


def _broken(adapter_names: Sequence[str]) -> ValueError:
    return ValueError(f"NaNs detected in the merged weights. The adapter {adapter_names[-1]} seems to be broken")
