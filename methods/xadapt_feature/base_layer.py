"""Base layers as Φ sees them: their widths, the axis of their features, and how their weight is read and written."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xadapt.peft_internals import BaseTunerLayer, QuantizationBackend
from xadapt.update import calculating_in, to_stored

from .spaces import Space

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class BaseLayer:
    """A plain linear. Weights are handed in and out as (out, in, *kernel), whatever layout the layer stores."""

    feature_axis = -1

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @property
    def in_features(self) -> int:
        return cast(int, self.layer.in_features)

    @property
    def out_features(self) -> int:
        return cast(int, self.layer.out_features)

    @property
    def widest(self) -> int:
        """The largest rank that is no mistake: that of the wider side, which may be the one that Φ is not on."""
        return max(self.in_features, self.out_features)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.layer, "bias", None))

    def check(self, space: Space) -> None:
        """Raise ValueError if Φ cannot act there."""

    def read(self) -> Tensor:
        """The weight in a dtype to calculate in: float64 stays, everything smaller becomes float32."""
        weight = to_stored(self.layer, cast(Tensor, self.layer.weight).data)
        return weight.to(calculating_in(weight))

    def add(self, update: Tensor) -> None:
        """weight += update, rounded once, in place: parameters that share the storage stay tied."""
        cast(Tensor, self.layer.weight).data.add_(to_stored(self.layer, update))

    def check_padding(self, space: Space) -> None:
        """Raise ValueError if a constant that the adapter adds to this layer's features is no bias of its output."""

    def check_constant(self, space: Space) -> None:
        """Raise ValueError if this layer has no place for a constant that the adapter adds to its features."""
        if self.bias is None:
            raise ValueError(
                f"The adapter adds a constant (lora_bias=True), but {type(self.layer).__name__} has no bias that could "
                "hold it: it cannot be merged. Run it unmerged, or train with lora_bias=False."
            )

    def add_bias(self, update: Tensor) -> None:
        cast(Tensor, self.bias).data.add_(update)


class Conv1DLayer(BaseLayer):
    """transformers' Conv1D (GPT-2) is a linear that stores its weight as (in, out)."""

    @property
    def in_features(self) -> int:
        return cast(Tensor, self.layer.weight).shape[0]

    @property
    def out_features(self) -> int:
        return cast(Tensor, self.layer.weight).shape[1]


class EmbeddingLayer(BaseLayer):
    """An embedding is a linear over one-hot rows: it has output features only."""

    @property
    def in_features(self) -> int:
        return cast(int, self.layer.num_embeddings)

    @property
    def out_features(self) -> int:
        return cast(int, self.layer.embedding_dim)

    @property
    def widest(self) -> int:
        return self.out_features  # the rows are no features

    def check(self, space: Space) -> None:
        if space.name == "input":
            raise ValueError(
                "an embedding reads token ids, not features, so it has no input space; use OutputAdaConfig for it."
            )
        if getattr(self.layer, "max_norm", None) is not None:
            raise ValueError("an embedding with max_norm rewrites its own weight; set max_norm=None.")


class ConvLayer(BaseLayer):
    """Φ acts on the channels, as a 1×1 convolution before or after."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.feature_axis = -1 - len(cast("tuple[int, ...]", layer.kernel_size))

    @property
    def in_features(self) -> int:
        return cast(int, self.layer.in_channels)

    @property
    def out_features(self) -> int:
        return cast(int, self.layer.out_channels)

    def check(self, space: Space) -> None:
        if self.layer.groups != 1:
            raise ValueError(
                f"a convolution with groups={self.layer.groups}: Φ mixes channels across the groups, and no grouped "
                "convolution can hold the result; leave it out with exclude_modules."
            )
        if space.name == "input" and self.layer.padding_mode != "zeros":
            raise ValueError(
                f"a convolution with padding_mode={self.layer.padding_mode!r} has no input adaptation here, only zero "
                "padding has; use OutputAdaConfig, or leave it out with exclude_modules."
            )

    def check_padding(self, space: Space) -> None:
        padding = cast("str | tuple[int, ...]", self.layer.padding)
        if space.name == "input" and (padding == "same" or (padding != "valid" and any(padding))):
            raise ValueError(
                "The adapter adds a constant (lora_bias=True) to a convolution's input features; at the padded border "
                "that is no bias, so it cannot be merged. Run it unmerged, or train with lora_bias=False."
            )


class QuantizedLayer(BaseLayer):
    """A quantised linear, read and written through PEFT's own backend for it."""

    def __init__(self, layer: nn.Module, owner: BaseTunerLayer, backend: QuantizationBackend) -> None:
        super().__init__(layer)
        self.owner = owner  # some backends put a new layer in the place of the old one
        self.backend = backend

    def read(self) -> Tensor:
        if not self.backend.supports_merge:
            raise ValueError(
                f"PEFT's {self.backend.backend_name} backend cannot read or write the weight of "
                f"{type(self.layer).__name__}, so the adapter cannot be merged; run it unmerged."
            )
        return self.backend.get_base_weight(self.owner.get_base_layer()).float()

    def add(self, update: Tensor) -> None:
        weight = self.backend.get_base_weight(self.owner.get_base_layer())
        self.backend.set_base_weight(self.owner, (weight.float() + update).to(weight.dtype))
        self.layer = self.owner.get_base_layer()


class UnsupportedLayer(ValueError):
    """Φ cannot act on this kind of layer."""


def describe(
    layer: nn.Module, owner: BaseTunerLayer | None = None, backend: QuantizationBackend | None = None
) -> BaseLayer:
    """The `BaseLayer` for a module.

    Raises:
        UnsupportedLayer: it is no linear, convolution or embedding.
    """
    if backend is not None and owner is not None:
        return QuantizedLayer(layer, owner, backend)
    if isinstance(layer, Conv1D):
        return Conv1DLayer(layer)
    if isinstance(layer, nn.Embedding):
        return EmbeddingLayer(layer)
    if isinstance(layer, CONVOLUTIONS):
        return ConvLayer(layer)
    if isinstance(layer, nn.Linear) or backend is not None or _computes_linear(layer):
        return BaseLayer(layer)
    raise UnsupportedLayer(
        f"{type(layer).__name__} is no layer that can be adapted in feature space: nn.Linear, transformers' Conv1D, "
        "nn.Conv1d/2d/3d, nn.Embedding and the quantised linears that PEFT knows can be."
    )


def _computes_linear(layer: nn.Module) -> bool:
    """Linear by its class name and widths: the rule by which PEFT recognises third-party linears."""
    return "Linear" in type(layer).__name__ and hasattr(layer, "in_features") and hasattr(layer, "out_features")
