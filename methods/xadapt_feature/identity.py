"""The stand-in linears on which PEFT's own layers are hosted (Revisit Model Adaptation, Eq. 4: Φθ applied to an identity layer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def device_and_dtype(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes. Packed (quantised) weights answer with their compute dtype, or float32."""
    weight = next((w for n in ("weight", "qweight", "W_q") if isinstance(w := getattr(layer, n, None), Tensor)), None)
    if weight is None:
        weight = next(layer.parameters())
    dtype = getattr(layer, "compute_dtype", None) or weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:  # int8, uint8, float8
        dtype = torch.get_default_dtype()
    return weight.device, dtype


class _StandIn(nn.Linear):
    """A bias-free linear without a parameter: its weight is made on demand, beside the layer it stands for."""

    def __init__(self, in_features: int, out_features: int, beside: nn.Module) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", None)
        self._beside = (beside,)  # in a tuple, or it would become a child module

    def beside(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the layer that it stands for."""
        return device_and_dtype(self._beside[0])


class IdentityLinear(_StandIn):
    """y = x, with the identity matrix as its weight. Holds no tensor: nothing to save, move or train."""

    def __init__(self, features: int, beside: nn.Module) -> None:
        super().__init__(features, features, beside)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in nn.Linear; here it is made when asked for  # nn.Linear declares an attribute
        device, dtype = self.beside()
        return torch.eye(self.in_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # A fresh tensor: some of PEFT's layers (AdaLoRA, C3A, GraLoRA, LoRA's mixed batches) add to it in place.
        return x.clone()


class ZeroLinear(_StandIn):
    """y = 0: what a parameter-space LoRA is hosted on when its base layer is called elsewhere."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in nn.Linear; here it is made when asked for
        device, dtype = self.beside()
        return torch.zeros(self.out_features, self.in_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)
