"""From images and captions to what training reads: latents, image embeddings, the target's own conditions.

What a target is told about a prompt is computed by its own pipeline (`encode_prompt`), so that it is what it sees at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xadapt.contract import Base
from xadapt.errors import some
from xadapt.opening import INDEX
from xadapt.strict_json import read_object

from .conditions import Flat, View, family_of
from .matching import fingerprint_of
from .source import IPAdapterSource
from .targets import unwrapped


def centre(image: Image.Image, size: int) -> View:
    """The largest square in the middle, size by size."""
    original = image.height, image.width
    ratio = size / min(original)
    height, width = (max(size, round(side * ratio)) for side in original)
    top, left = (height - size) // 2, (width - size) // 2
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return View(resized.crop((left, top, left + size, top + size)), original, (top, left))


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W) from -1 to 1."""
    arrays = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def own_pipeline(target: Base) -> str:
    """The folder of the pipeline that a target on disk is a part of; "" where it stands alone, or is in memory."""
    folder: Path | None = getattr(target, "folder", None)
    if folder is None or not (folder.parent / "scheduler" / "scheduler_config.json").is_file():
        return ""
    index = read_object(folder.parent / INDEX) if (folder.parent / INDEX).is_file() else {}
    return str(folder.parent) if folder.name in index else ""


class ImageEncoder:
    """The IP-Adapter's image encoder.

    Raises:
        ValueError: it is not the one that this IP-Adapter wants, or the adapter wants faces, which no such encoder embeds.
    """

    def __init__(self, name: str, source: IPAdapterSource) -> None:
        # PIL resizes as it did when IP-Adapters were trained, and alike on every machine
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        wanted = f"This IP-Adapter (kind {source.kind.name!r}) wants {source.kind.wants(source.options)}"
        if source.kind.name.startswith("faceid"):
            raise ValueError(
                f"{wanted}. Embed the faces yourself and pass batches that are ready: a list of dicts with image_embeds, latents, "
                "encoder_hidden_states, …"
            )
        if not name:
            raise ValueError(f"{wanted}. Name that encoder's folder or id: image_encoder='…'.")
        self._pooled = source.kind.pooled
        model: Any = CLIPVisionModelWithProjection.from_pretrained(name, dtype=torch.float32)
        self.model: Any = model.eval()
        config = self.model.config
        width = config.projection_dim if self._pooled else config.hidden_size
        if width != source.embed_dim:
            raise ValueError(f"{wanted}; {name} gives a width of {width}. Name the right encoder: image_encoder='…'.")
        try:
            self._processor: Any = CLIPImageProcessorPil.from_pretrained(name)
        except OSError:  # published image encoders come without the processor's settings, which are CLIP's
            side = config.image_size
            self._processor = CLIPImageProcessorPil(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            )

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Flat:
        """image_embeds: (B, E), or (B, S, E) where the adapter takes hidden states."""
        return {"image_embeds": self._embed(self._pixels(images))}

    @torch.no_grad()
    def empty(self) -> Flat:
        """negative_image_embeds, (1, S, E), of an all-zero image, where the adapter takes hidden states; else nothing."""
        if self._pooled:
            return {}
        side = self.model.config.image_size
        return {"negative_image_embeds": self._embed(torch.zeros(1, 3, side, side))}

    def fingerprint(self) -> str:
        return f"{fingerprint_of(self.model)} {self._processor.to_json_string()}"

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        found: Tensor = self._processor(list(images), return_tensors="pt").pixel_values
        return found

    def _embed(self, values: Tensor) -> Tensor:
        output = self.model(values.to(self.model.device), output_hidden_states=not self._pooled)
        embeds: Tensor = output.image_embeds if self._pooled else output.hidden_states[-2]
        return embeds


class PipelineEncoder:
    """The VAE and the text encoders of the target's pipeline.

    Raises:
        ValueError: it is no pipeline of this target, or one whose conditions are not known here.
    """

    def __init__(self, name: str, target: nn.Module) -> None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        target = unwrapped(target)
        if not name:
            raise ValueError(
                f"Images and captions have to be encoded as {type(target).__name__} knows them: name the folder or id of its "
                "pipeline, pipeline='…'."
            )
        self._family = family_of(target)
        index: Any = DiffusionPipeline.load_config(name)
        part = next((one for one in ("unet", "transformer") if one in index), None)
        if part is None or index[part][1] != type(target).__name__:
            held = f"{part} is a {index[part][1]}" if part else f"it has {some(sorted(index))}"
            raise ValueError(
                f"{name} is no pipeline of {type(target).__name__}: {held}. Name the target's own: pipeline='…'."
            )
        unneeded: dict[str, Any] = {one: None for one in ("safety_checker", "feature_extractor") if one in index}
        if "safety_checker" in index:
            unneeded["requires_safety_checker"] = False
        self.pipe: Any = DiffusionPipeline.from_pretrained(name, **{part: target}, **unneeded)
        self.target: Any = target
        self._parts: list[Any] = [
            one for key, one in self.pipe.components.items() if isinstance(one, nn.Module) and key != part
        ]
        for one in self._parts:
            one.float().eval().requires_grad_(False)  # SDXL's VAE overflows in float16

    @property
    def resolution(self) -> int:
        """The images' size that the target was trained on, in pixels."""
        side = self.target.config.sample_size if "sample_size" in self.target.config else 128
        return int(side if isinstance(side, int) else side[0]) * self._factor

    @property
    def _factor(self) -> int:
        return int(2 ** (len(self.pipe.vae.config.block_out_channels) - 1))

    def check_resolution(self, size: int) -> None:
        """ValueError unless the latents of such images fit the target."""
        step = self._factor * self._family.multiple(self.target)
        if size < step or size % step:
            near = max(step, round(size / step) * step)
            raise ValueError(
                f"resolution={size} gives latents that the target cannot take; write a multiple of {step}: {near}."
            )

    @torch.no_grad()
    def encode(self, views: Sequence[View], captions: Sequence[str]) -> Flat:
        """latents, (B, C, h, w), and the conditions, one row per sample each."""
        latents = self._latents(pixels([view.image for view in views]))
        return {"latents": latents, **self._family.conditions(self.pipe, list(captions), views, self._device)}

    @torch.no_grad()
    def empty(self) -> Flat:
        """What of the conditions comes from the prompt, (1, …) each, for the prompt that pipelines take when none is given."""
        return self._family.empty(self.pipe, self._device)

    def fingerprint(self) -> str:
        return " ".join([type(self.pipe).__name__, *(fingerprint_of(one) for one in self._parts)])

    def to(self, device: torch.device) -> None:
        for one in self._parts:
            one.to(device)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.pipe.vae.device
        return device

    def _latents(self, values: Tensor) -> Tensor:
        config = self.pipe.vae.config
        found: Tensor = self.pipe.vae.encode(values.to(self._device)).latent_dist.mode()
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shape = 1, -1, 1, 1
            found = (found - torch.tensor(mean).view(shape).to(found)) / torch.tensor(std).view(shape).to(found)
        found = (found - (config.get("shift_factor") or 0.0)) * config.scaling_factor
        return found
