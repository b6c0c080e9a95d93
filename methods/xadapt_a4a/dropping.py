"""Samples without their reference, their text, or both: what guidance needs to have seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .draws import Generators, drawn
from .reference import ReferenceAdapter

EMPTY_TEXT = "empty_text"  # in a batch: the conditions of a prompt that says nothing, by their names in it, of 1 sample


@dataclass(frozen=True)
class Drops:
    """The shares of samples that lose something; at most one of the three happens to a sample."""

    image: float = 0.0
    text: float = 0.0
    both: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image", "text", "both"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"{name}_drop={share} is no share; write a number from 0 to 1, such as 0.05.")
        if self.image + self.text + self.both > 1:
            raise ValueError(
                f"image_drop, text_drop and both_drop are shares of all samples, and {self.image} + {self.text} + {self.both} is "
                "more than 1. Lower them; 0.05 each is usual."
            )

    @property
    def any_image(self) -> bool:
        return self.image + self.both > 0

    @property
    def any_text(self) -> bool:
        return self.text + self.both > 0

    def choose(self, size: int, generators: Generators) -> tuple[Tensor, Tensor]:
        """Which samples go without their reference and which without their text: two masks, (B,) each."""
        if not (self.any_image or self.any_text):
            nothing = torch.zeros(size, dtype=torch.bool)
            return nothing, nothing
        u = drawn(lambda n, generator: torch.rand(n, generator=generator), size, generators)
        both = (u >= self.image + self.text) & (u < self.image + self.text + self.both)
        return (u < self.image) | both, ((u >= self.image) & (u < self.image + self.text)) | both


def default_drop(asked: float | None, batch: Mapping[str, Any]) -> float:
    """What `None` stands for in text_drop and both_drop: IP-Adapter's 5 % where the batch says what no text is, else 0."""
    return asked if asked is not None else 0.05 if EMPTY_TEXT in batch else 0.0


def check_drops(model: ReferenceAdapter, batch: Mapping[str, Any], drops: Drops) -> None:
    """ValueError unless the batch says what an image, or a text, that is not there looks like."""
    if drops.any_image:
        wanted = [] if model.source.kind.pooled else ["negative_image_embeds"]
        wanted += ["negative_clip_embeds"] if batch.get("clip_embeds") is not None else []
        missing = [name for name in wanted if name not in batch]
        if missing:
            raise ValueError(
                f"image_drop={drops.image} needs {' and '.join(missing)} in the batch: the encoder's hidden states of an all-zero "
                "image, (1, rows, width). Or set image_drop=0; guidance will then be weaker."
            )
    if drops.any_text and EMPTY_TEXT not in batch:
        raise ValueError(
            f"text_drop={drops.text} needs {EMPTY_TEXT} in the batch: a dict with the encoder_hidden_states of an empty prompt, "
            "(1, tokens, width), and whatever else comes from the prompt. Or set text_drop=0 and both_drop=0."
        )


def without_images(batch: Mapping[str, Any], dropped: Tensor) -> tuple[Tensor, Tensor | None]:
    """image_embeds and clip_embeds, those of the dropped samples replaced by the empty image's.

    These are zeros for adapters that take one vector per image, and otherwise the batch's negative_image_embeds (and
    negative_clip_embeds).
    """
    image, clip = batch["image_embeds"], batch.get("clip_embeds")
    if not bool(dropped.any()):
        return image, clip
    image = replaced(image, dropped, batch.get("negative_image_embeds"))
    return image, None if clip is None else replaced(clip, dropped, batch["negative_clip_embeds"])


def without_text(batch: Mapping[str, Any], dropped: Tensor) -> dict[str, Any]:
    """The batch, with the conditions that `empty_text` names replaced in the dropped samples; `empty_text` is gone."""
    kept = {name: value for name, value in batch.items() if name != EMPTY_TEXT}
    if not bool(dropped.any()):
        return kept
    return _replaced_by_name(kept, dropped, batch[EMPTY_TEXT], EMPTY_TEXT)


def _replaced_by_name(given: Mapping[str, Any], dropped: Tensor, empty: Mapping[str, Any], path: str) -> dict[str, Any]:
    result = dict(given)
    for name, value in empty.items():
        if name not in given:
            raise ValueError(f"{path} holds {name!r}, which the batch itself lacks; it has {', '.join(given)}.")
        if isinstance(value, Mapping):
            result[name] = _replaced_by_name(given[name], dropped, value, f"{path}.{name}")
        elif value.shape[1:] != given[name].shape[1:]:
            raise ValueError(
                f"{path}.{name} has the shape {tuple(value.shape)}, and the batch's own {tuple(given[name].shape)}; pad the empty "
                "prompt to as many tokens as the others."
            )
        else:
            result[name] = replaced(given[name], dropped, value)
    return result


def replaced(values: Tensor, dropped: Tensor, empty: Tensor | None) -> Tensor:
    """(B, …), with `empty`, (1, …) or None for zeros, in the place of the dropped samples."""
    lost = dropped.view(-1, *[1] * (values.ndim - 1)).to(values.device)
    return torch.where(lost, values.new_zeros(()) if empty is None else empty.to(values), values)
