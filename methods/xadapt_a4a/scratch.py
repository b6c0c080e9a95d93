"""IP-Adapters on the target itself, in the same trainer: the baselines that A4A has to beat.

`IPAdapterModel.fresh` is trained from scratch (the paper's IP-Adapter*); `from_ip_adapter` opens the one that was published for
this very target (the paper's PTA-UM), where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from xadapt.files import save_tensors
from xadapt.version import __version__

from .coupling import check_choice
from .files import read_ip_adapter
from .matching import fingerprint_of
from .reference import ReferenceAdapter
from .source import IPAdapterSource
from .targets import AttentionLayer, find_attention_layers, target_fingerprint, unwrapped
from .versions import check_version

INITS = ("copy", "plain")
# What published files call the parts that diffusers has renamed.
_BASE_NAMES = {"image_embeds": "proj", "norm": "norm"}


class IPAdapterModel(ReferenceAdapter):
    """Image projection and k, v projections of the target's own widths, and nothing between them.

    Args:
        projection_kind, projection_options, faceid_plus_v2: the image projection, see `IPAdapterSource`.
        target_layers, target_dims: the target's attention layers by path, and their widths.
        layer_ids: the numbers that these layers have in a published file.
        ip_adapter, target_class, ip_adapter_fingerprint, target_fingerprint, xadapt_version: where it comes from.
    """

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]  # in some of diffusers' versions
    def __init__(
        self,
        *,
        projection_kind: str,
        projection_options: dict[str, int],
        target_layers: Sequence[str],
        target_dims: Sequence[int],
        layer_ids: Sequence[int],
        faceid_plus_v2: bool = False,
        ip_adapter: str = "",
        target_class: str = "",
        ip_adapter_fingerprint: str = "",
        target_fingerprint: str = "",
        xadapt_version: str = __version__,
    ) -> None:
        super().__init__(target_layers, target_dims, target_class)
        check_version(xadapt_version, "This adapter")
        self.source = IPAdapterSource(projection_kind, projection_options, target_dims, faceid_plus_v2)
        self._ids = tuple(layer_ids)

    @classmethod
    def fresh(
        cls,
        target: nn.Module,
        projection_kind: str,
        projection_options: Mapping[str, int],
        *,
        init: str = "copy",
        faceid_plus_v2: bool = False,
    ) -> IPAdapterModel:
        """An untrained one.

        Args:
            projection_options: the sizes of the image projection; its output width has to be the one that the target's keys read
                for init="copy".
            init: "copy" starts from the target's own to_k and to_v, as the official training code does; "plain" as torch does.

        Raises:
            ValueError: there is nothing to copy: a layer has no to_k of the tokens' width.
        """
        check_choice("init", init, INITS)
        target = unwrapped(target)
        layers = find_attention_layers(target)
        model = cls._around(
            target,
            layers,
            projection_kind=projection_kind,
            projection_options=dict(projection_options),
            faceid_plus_v2=faceid_plus_v2,
            ip_adapter=f"from scratch, init={init}",
        )
        if init == "copy":
            for layer, to_k, to_v in zip(layers, model.source.to_k_ip, model.source.to_v_ip, strict=True):
                _copy(layer, "to_k", to_k)
                _copy(layer, "to_v", to_v)
        return model

    @classmethod
    def from_ip_adapter(
        cls,
        ip_adapter: str | PathLike[str] | Mapping[str, Any],
        target: nn.Module,
        *,
        allow_pickle: bool = False,
        faceid_plus_v2: bool = False,
    ) -> IPAdapterModel:
        """An IP-Adapter that was trained on this very target, as it is.

        Raises:
            ValueError: it was made for other layers.
        """
        source = IPAdapterSource.from_tensors(
            read_ip_adapter(ip_adapter, allow_pickle=allow_pickle), shortcut=faceid_plus_v2
        )
        target = unwrapped(target)
        layers = find_attention_layers(target)
        widths = tuple(layer.width for layer in layers)
        if source.adapter_dims != widths:
            raise ValueError(
                f"This IP-Adapter has {len(source.adapter_dims)} layers of widths {sorted(set(source.adapter_dims))}, "
                f"{type(target).__name__} {len(widths)} of {sorted(set(widths))}. It was trained on another model: carry it over "
                "with A4AModel.from_ip_adapter(…, target=…)."
            )
        model = cls._around(
            target,
            layers,
            projection_kind=source.kind.name,
            projection_options=source.options,
            faceid_plus_v2=faceid_plus_v2,
            ip_adapter="" if isinstance(ip_adapter, Mapping) else Path(ip_adapter).name,
            ip_adapter_fingerprint=fingerprint_of(source),
        )
        model.source = source
        return model

    @classmethod
    def _around(cls, target: nn.Module, layers: Sequence[AttentionLayer], **config: Any) -> IPAdapterModel:
        model: IPAdapterModel = cls(
            target_layers=[layer.name for layer in layers],
            target_dims=[layer.width for layer in layers],
            layer_ids=layer_ids(target, layers),
            target_class=type(target).__name__,
            target_fingerprint=target_fingerprint(layers),
            **config,
        )
        return model

    def maps_of(self, image_embeds: Tensor, clip_embeds: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """k_i, v_i of one reference per row, as diffusers' own processors compute them at each step."""
        maps: list[tuple[Tensor, Tensor]] = self.source(image_embeds, clip_embeds)
        return maps

    def param_groups(self, lr: float = 1e-4) -> list[dict[str, Any]]:
        """The optimiser's groups: one, as in the official training code."""
        return [{"name": "ip_adapter", "lr": lr, "params": list(self.source.parameters())}]

    def published(self) -> dict[str, Tensor]:
        """The tensors by the names of a published .safetensors file.

        Raises:
            ValueError: the image projection is not of kind "base": diffusers' converter for the others goes one way.
        """
        if self.source.kind.name != "base":
            raise ValueError(
                f"The published layout can be written for kind 'base', this is {self.source.kind.name!r}. save_pretrained keeps it."
            )
        tensors = {}
        for name, tensor in self.source.image_proj.state_dict().items():
            part, _, parameter = name.rpartition(".")
            tensors[f"image_proj.{_BASE_NAMES[part]}.{parameter}"] = tensor
        for number, to_k, to_v in zip(self._ids, self.source.to_k_ip, self.source.to_v_ip, strict=True):
            tensors[f"ip_adapter.{number}.to_k_ip.weight"] = to_k.weight
            tensors[f"ip_adapter.{number}.to_v_ip.weight"] = to_v.weight
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def save_ip_adapter(self, path: str | PathLike[str]) -> None:
        """Writes `published()` as a file that diffusers, ComfyUI and A4A read, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_tensors(self.published(), partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def layer_ids(target: nn.Module, layers: Sequence[AttentionLayer]) -> list[int]:
    """The layers' numbers in a published file: their places among all attention processors, self-attention counted."""
    processors: Any = getattr(target, "attn_processors", None)
    if processors is None:
        return [2 * index + 1 for index in range(len(layers))]
    names = [name.removesuffix(".processor") for name in processors]
    return [names.index(layer.name) for layer in layers]


def _copy(layer: AttentionLayer, name: str, into: Any) -> None:
    given = getattr(layer.module, name)
    if given.weight.shape != into.weight.shape:
        raise ValueError(
            f"init='copy' starts from the target's own weights, but {layer.name}.{name} is {tuple(given.weight.shape)} where the "
            f"adapter needs {tuple(into.weight.shape)}: its tokens should be {given.weight.shape[1]} wide. Set the projection's output "
            "width to that, or write init='plain'."
        )
    with torch.no_grad():
        into.weight.copy_(given.weight)
