"""The A4A adapter: an IP-Adapter's features, carried to the attention layers of another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from xadapt.version import __version__

from .alignment import Alignment
from .branch import Branch
from .coupling import CouplingProjection, coupling_dim
from .files import read_ip_adapter
from .matching import fingerprint_of
from .reference import ReferenceAdapter
from .source import IPAdapterSource
from .targets import find_attention_layers, target_fingerprint, unwrapped
from .upgraded import MAX_ROWS, build_mapping
from .versions import check_version


class A4AModel(ReferenceAdapter):
    """An adapter for an adapter: `from_ip_adapter` makes a fresh one, `from_pretrained` opens a trained one.

        adapter = A4AModel.from_pretrained("a4a-sdxl/")
        bank = adapter.encode(image_embeds)  # once per reference
        with adapter.attached(pipe.unet, bank, scale=0.8):
            pipe(prompt)

    The arguments of the constructor are its config, with which it can be built without the IP-Adapter and the target.

    Args:
        projection_kind, projection_options, adapter_dims, faceid_plus_v2: the source, see `IPAdapterSource`.
        target_layers, target_dims: the target's attention layers by path, and their widths.
        mapping: "attention" is the paper's; "linear" its ablation (Sec. 8.3); "layerwise" has one map per layer of the target,
            from the one layer of the source at the same relative depth, instead of from all.
        depth: R, the number of rounds of Eq. 9.
        head_dim, ffn_ratio: the size of an attention head in it, and how much wider its FFN is.
        coupling_ratio: the coupling space's width as a multiple of the least common multiple (0.5, 1 or 2 in the paper).
        coupling_width: that width itself, instead.
        share: "width" has one linear layer per distinct width in projection and alignment, "layer" one per layer.
        projection, alignment: "interpolate" and "pool" are the paper's training-free ablations (Sec. 8.2).
        max_rows: the most rows that the mapping's attention may run over.
        ip_adapter, target_class, ip_adapter_fingerprint, target_fingerprint, xadapt_version: where it comes from.
    """

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]  # in some of diffusers' versions
    def __init__(
        self,
        *,
        projection_kind: str,
        projection_options: dict[str, int],
        adapter_dims: Sequence[int],
        target_layers: Sequence[str],
        target_dims: Sequence[int],
        faceid_plus_v2: bool = False,
        depth: int = 4,
        head_dim: int = 64,
        ffn_ratio: int = 4,
        coupling_ratio: float = 1.0,
        coupling_width: int | None = None,
        share: str = "width",
        projection: str = "linear",
        alignment: str = "linear",
        mapping: str = "attention",
        max_rows: int = MAX_ROWS,
        ip_adapter: str = "",
        target_class: str = "",
        ip_adapter_fingerprint: str = "",
        target_fingerprint: str = "",
        xadapt_version: str = __version__,
    ) -> None:
        super().__init__(target_layers, target_dims, target_class)
        check_version(xadapt_version, "This adapter")
        self.source = IPAdapterSource(projection_kind, projection_options, adapter_dims, faceid_plus_v2)
        dim = coupling_width or coupling_dim(adapter_dims, coupling_ratio)
        tokens = self.source.num_tokens

        def branch() -> Branch:
            rows = len(adapter_dims) * tokens, len(target_dims) * tokens
            return Branch(
                CouplingProjection(adapter_dims, dim, share=share, mode=projection),
                build_mapping(
                    mapping,
                    *rows,
                    dim,
                    tokens=tokens,
                    depth=depth,
                    head_dim=head_dim,
                    ffn_ratio=ffn_ratio,
                    max_rows=max_rows,
                ),
                Alignment(dim, target_dims, share=share, mode=alignment),
            )

        self.key_branch, self.value_branch = branch(), branch()

    @classmethod
    def from_ip_adapter(
        cls,
        ip_adapter: str | PathLike[str] | Mapping[str, Any],
        target: nn.Module,
        *,
        allow_pickle: bool = False,
        **options: Any,
    ) -> A4AModel:
        """A fresh adapter, to be trained: the IP-Adapter as it is, everything after it random.

        Args:
            ip_adapter: a published file (.safetensors; .bin with allow_pickle), or its state dict.
            target: the denoiser to carry it to: `pipe.unet` or `pipe.transformer`. Only its layers are looked at.
            options: depth, coupling_ratio, share, …: see the class.

        Raises:
            ValueError: the file is no IP-Adapter, or the target has no layer that could take it.
        """
        source = IPAdapterSource.from_tensors(
            read_ip_adapter(ip_adapter, allow_pickle=allow_pickle), shortcut=options.get("faceid_plus_v2", False)
        )
        target = unwrapped(target)
        layers = find_attention_layers(target)
        model: A4AModel = cls(
            projection_kind=source.kind.name,
            projection_options=source.options,
            adapter_dims=list(source.adapter_dims),
            target_layers=[layer.name for layer in layers],
            target_dims=[layer.width for layer in layers],
            ip_adapter="" if isinstance(ip_adapter, Mapping) else Path(ip_adapter).name,
            target_class=type(target).__name__,
            ip_adapter_fingerprint=fingerprint_of(source),
            target_fingerprint=target_fingerprint(layers),
            **options,
        )
        model.source = source
        return model

    def randomize_source(self) -> None:
        """Puts fresh weights in the place of the pretrained IP-Adapter's: the control that says whether they matter."""
        old = self.source
        shortcut = bool(getattr(old.image_proj, "shortcut", False))
        self.source = IPAdapterSource(old.kind.name, old.options, old.adapter_dims, shortcut).to(self.device)
        config: dict[str, Any] = {"ip_adapter": "random weights", "ip_adapter_fingerprint": fingerprint_of(self.source)}
        self.register_to_config(**config)  # type: ignore[no-untyped-call]  # diffusers' mixins have no types

    def maps_of(self, image_embeds: Tensor, clip_embeds: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """k̄_i, v̄_i of one reference per row: projection, mapping and alignment of all layers' features at once."""
        features = self.source(image_embeds, clip_embeds)
        keys, values = ([pair[half] for pair in features] for half in (0, 1))
        return list(zip(self.key_branch(keys), self.value_branch(values), strict=True))

    def param_groups(
        self, lr1: float = 1e-4, lr2: float = 1e-5, lr3: float = 1e-5, *, train_pta: bool = True
    ) -> list[dict[str, Any]]:
        """The optimiser's groups (A4A, Sec. 3.4); each parameter is in one of them. Freezes the source unless train_pta.

        Args:
            lr1: of the learnable features and the blocks.
            lr2: of projection and alignment.
            lr3: of the pretrained adapter.
        """
        self.source.requires_grad_(train_pta)
        branches = (self.key_branch, self.value_branch)
        groups = {
            "mapping": (lr1, [p for branch in branches for p in branch.mapping.parameters()]),
            "projection": (
                lr2,
                [p for branch in branches for part in (branch.projection, branch.alignment) for p in part.parameters()],
            ),
            "source": (lr3, list(self.source.parameters()) if train_pta else []),
        }
        return [{"name": name, "lr": lr, "params": params} for name, (lr, params) in groups.items() if params]
