"""CLIP-I, CLIP-T, DINO-I: raw cosines of normalised embeddings (DreamBooth, section 4.1). No clamp, no scale.

Images are resized by PIL, bicubic, and cropped to the centre: one implementation for every judge, wherever it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.dreambooth.settings import Judge

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixels(
    images: Sequence[Image], resize: int, side: int, statistics: tuple[tuple[float, ...], tuple[float, ...]]
) -> Tensor:
    """Normalised images (n, 3, side, side): the shorter edge resized to `resize`, then the centre."""
    from PIL.Image import Resampling

    found = []
    for image in images:
        width, height = image.size
        factor = resize / min(width, height)
        scaled = image.convert("RGB").resize((round(width * factor), round(height * factor)), Resampling.BICUBIC)
        left, top = (scaled.width - side) // 2, (scaled.height - side) // 2
        square = scaled.crop((left, top, left + side, top + side))
        found.append(torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in statistics)
    return (torch.stack(found) - mean) / std


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosines (n, m) of the rows of (n, d) and (m, d)."""
    return torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).T


@dataclass
class Scorer:
    """The judges, loaded."""

    judge: Judge
    clip: Any
    tokenizer: Any
    dino: Any
    classifier: Any
    device: torch.device

    @torch.inference_mode()
    def clip_images(self, images: Sequence[Image]) -> Tensor:
        side = self.clip.config.vision_config.image_size
        return _tensor(self.clip.get_image_features(pixels(images, side, side, CLIP_PIXELS).to(self.device)))

    @torch.inference_mode()
    def clip_texts(self, texts: Sequence[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        given = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return _tensor(self.clip.get_text_features(**given))

    @torch.inference_mode()
    def dino_images(self, images: Sequence[Image]) -> Tensor:
        found: Tensor = self.dino(self._dino_pixels(images, self.dino)).last_hidden_state[:, 0]
        return found

    @torch.inference_mode()
    def is_subject(self, images: Sequence[Image], subject: str) -> list[float]:
        """1 where the classifier says that it is the subject."""
        names = self.classifier.config.label2id
        if subject not in names:
            known = ", ".join(map(str, list(names)[:10]))
            raise ValueError(f"the classifier {self.judge.classifier} has no label {subject!r}; it has {known} ...")
        found = self.classifier(self._dino_pixels(images, self.classifier)).logits.argmax(-1)
        return [float(index == names[subject]) for index in found.tolist()]

    def _dino_pixels(self, images: Sequence[Image], model: Any) -> Tensor:
        resize = max(self.judge.dino_resize, model.config.image_size)
        return pixels(images, resize, model.config.image_size, IMAGENET_PIXELS).to(self.device)

    def rows(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        references: Sequence[Image],
        subject: str,
        batch: int = 64,
    ) -> list[dict[str, float]]:
        """One per image: clip_t to its prompt, clip_i and dino_i as means over the subject's real images."""
        real_clip, real_dino = self.clip_images(references), self.dino_images(references)
        found: list[dict[str, float]] = []
        for start in range(0, len(images), batch):
            some = images[start : start + batch]
            seen = self.clip_images(some)
            texts = self.clip_texts(prompts[start : start + batch])
            columns = {
                "clip_t": cosine(seen, texts).diagonal().tolist(),
                "clip_i": cosine(seen, real_clip).mean(1).tolist(),
                "dino_i": cosine(self.dino_images(some), real_dino).mean(1).tolist(),
            }
            if self.classifier is not None:
                columns["subject"] = self.is_subject(some, subject)
            found += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return found


def load_scorer(judge: Judge, device: torch.device) -> Scorer:
    """The judges, from the hub or from folders, in float32."""
    from transformers import AutoModelForImageClassification, CLIPModel, CLIPTokenizer, ViTModel

    clip: Any = CLIPModel.from_pretrained(judge.clip)
    dino: Any = ViTModel.from_pretrained(judge.dino, add_pooling_layer=False)
    classifier: Any = None
    if judge.classifier is not None:
        classifier = AutoModelForImageClassification.from_pretrained(judge.classifier)
    loaded = [each.eval().requires_grad_(False).to(device) for each in (clip, dino, classifier) if each is not None]
    tokenizer = CLIPTokenizer.from_pretrained(judge.clip)
    return Scorer(judge, loaded[0], tokenizer, loaded[1], loaded[2] if classifier is not None else None, device)


def _tensor(output: Any) -> Tensor:
    """The embedding: what transformers 5 wraps, and 4 did not."""
    return output if isinstance(output, Tensor) else output.pooler_output
