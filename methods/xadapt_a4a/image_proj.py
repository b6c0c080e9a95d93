"""The kinds of image projection there are, how they are told apart, and the input each one wants.

Telling them apart and renaming their keys is diffusers' own code, so that a file means here what it means there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models import embeddings
from torch import Tensor, nn

FULL_FACE_TOKENS = (
    257  # 256 patches of the image encoder and its class token; the file does not say, diffusers fixes it too
)


@dataclass(frozen=True)
class ProjectionKind:
    """One kind of image projection."""

    name: str
    build: Callable[..., Any]  # diffusers' class
    options: Callable[[Any], dict[str, int]]  # the arguments that a live one was built with
    pooled: bool
    """Whether it takes one vector per image, (B, E), or the encoder's hidden states, (B, S, E)."""

    width: Callable[[Mapping[str, int]], int]  # E, from the options
    tokens: Callable[[Mapping[str, int]], int]  # N, from the options

    def wants(self, options: Mapping[str, int]) -> str:
        """The encoder and which of its outputs, in words."""
        width = self.width(options)
        if self.name.startswith("faceid"):
            return f"the {width} numbers of insightface's face embedding (buffalo_l, `face.normed_embedding`)"
        if self.pooled:
            return f"`image_embeds` of width {width} from {_POOLED.get(width, 'its CLIPVisionModelWithProjection')}"
        return (
            f"`hidden_states[-2]` of width {width}, all {FULL_FACE_TOKENS} rows, "
            f"from {_HIDDEN.get(width, 'its CLIPVisionModelWithProjection')}"
        )


_POOLED = {1024: "OpenCLIP ViT-H/14 (h94/IP-Adapter, models/image_encoder)", 1280: "OpenCLIP ViT-bigG/14 (sdxl_models)"}
_HIDDEN = {1280: "OpenCLIP ViT-H/14 (h94/IP-Adapter, models/image_encoder)", 1664: "OpenCLIP ViT-bigG/14 (sdxl_models)"}


def _base_options(module: Any) -> dict[str, int]:
    return {
        "image_embed_dim": module.image_embeds.in_features,
        "cross_attention_dim": module.norm.normalized_shape[0],
        "num_image_text_embeds": module.num_image_text_embeds,
    }


def _full_options(module: Any) -> dict[str, int]:
    return {
        "image_embed_dim": module.ff.net[0].proj.in_features,
        "cross_attention_dim": module.norm.normalized_shape[0],
    }


def _plus_options(module: Any) -> dict[str, int]:
    return {
        "embed_dims": module.proj_in.in_features,
        "output_dims": module.proj_out.out_features,
        "hidden_dims": module.proj_in.out_features,
        "heads": module.layers[0].attn.heads,
        "depth": len(module.layers),
        "num_queries": module.latents.shape[1],
    }


def _faceid_options(module: Any) -> dict[str, int]:
    hidden, width = module.ff.net[0].proj.weight.shape
    return {
        "image_embed_dim": width,
        "cross_attention_dim": module.cross_attention_dim,
        "mult": hidden // width,
        "num_tokens": module.num_tokens,
    }


def _faceid_plus_options(module: Any) -> dict[str, int]:
    return {
        "embed_dims": module.proj_in.out_features,
        "output_dims": module.proj_out.out_features,
        "hidden_dims": module.proj_in.in_features,
        "id_embeddings_dim": module.proj.net[0].proj.in_features,
        "heads": module.layers[0].attn.heads,
        "depth": len(module.layers),
        "num_tokens": module.num_tokens,
    }


_ALL = (
    ProjectionKind(
        "base",
        embeddings.ImageProjection,
        _base_options,
        pooled=True,
        width=lambda options: options["image_embed_dim"],
        tokens=lambda options: options["num_image_text_embeds"],
    ),
    ProjectionKind(
        "full",
        embeddings.IPAdapterFullImageProjection,
        _full_options,
        pooled=False,
        width=lambda options: options["image_embed_dim"],
        tokens=lambda options: FULL_FACE_TOKENS,
    ),
    ProjectionKind(
        "plus",
        embeddings.IPAdapterPlusImageProjection,
        _plus_options,
        pooled=False,
        width=lambda options: options["embed_dims"],
        tokens=lambda options: options["num_queries"],
    ),
    ProjectionKind(
        "faceid",
        embeddings.IPAdapterFaceIDImageProjection,
        _faceid_options,
        pooled=True,
        width=lambda options: options["image_embed_dim"],
        tokens=lambda options: options["num_tokens"],
    ),
    ProjectionKind(
        "faceid_plus",
        embeddings.IPAdapterFaceIDPlusImageProjection,
        _faceid_plus_options,
        pooled=True,
        width=lambda options: options["id_embeddings_dim"],
        tokens=lambda options: options["num_tokens"],
    ),
)
KINDS: dict[str, ProjectionKind] = {kind.name: kind for kind in _ALL}


def get_kind(name: str) -> ProjectionKind:
    """The kind of that name; ValueError names all."""
    if name not in KINDS:
        raise ValueError(f"{name!r} is no kind of image projection. Known: {', '.join(KINDS)}.")
    return KINDS[name]


def convert(tensors: Mapping[str, Tensor]) -> tuple[ProjectionKind, nn.Module]:
    """The image projection of an IP-Adapter file, loaded, and its kind.

    Raises:
        ValueError: the tensors are none that diffusers knows.
    """
    converter: Any = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
    try:
        module = converter(None, dict(tensors), low_cpu_mem_usage=False)  # touches `self` only with low_cpu_mem_usage
    except (KeyError, RuntimeError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"The image_proj.* tensors ({', '.join(sorted(tensors)[:5])}, …) are no image projection that diffusers can read "
            f"({type(error).__name__}: {reason}). Known kinds: {', '.join(KINDS)}."
        ) from error
    kind = next(kind for kind in _ALL if type(module) is kind.build)
    return kind, module
