"""A fingerprint of the base an adapter was trained on: enough to tell it from its siblings, and cheap to take."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

BLOCKS, NUMBERS = 16, 64  # what is hashed of a weight: this many stretches of this many numbers, evenly spread

Match = Literal["same", "differs", "other shape", "unknown"]


@dataclass(frozen=True)
class LayerPrint:
    """What is kept of one weight."""

    shape: tuple[int, ...]
    dtype: str
    digest: str
    """Of the numbers, whatever the dtype they are kept in: float16 and float32 files of one model agree where float16 can
    hold the numbers. Empty where the weight could not be read (quantised, or not loaded)."""

    def as_text(self) -> str:
        """One line of a config: `4096x4096 bfloat16 91c0…`."""
        return " ".join(("x".join(map(str, self.shape)), self.dtype, self.digest)).strip()

    @classmethod
    def from_text(cls, text: str) -> LayerPrint:
        """Inverse of `as_text`.

        Raises:
            ValueError: it is no such line.
        """
        match = re.fullmatch(r"(\d+(?:x\d+)*) ((?:b?float|u?int|bool)\w*)(?: ([0-9a-f]+))?", text)
        if match is None:
            raise ValueError(f"{text!r} is no fingerprint of a layer, such as '64x64 float32 0123456789abcdef'.")
        return cls(tuple(int(size) for size in match[1].split("x")), match[2], match[3] or "")

    def compare(self, other: LayerPrint) -> Match:
        if self.shape != other.shape:
            return "other shape"
        if not self.digest or not other.digest:
            return "unknown"
        return "same" if self.digest == other.digest else "differs"


def layer_print(weight: Tensor) -> LayerPrint:
    """The fingerprint of a weight in the layout in which it is stored. Reads about a thousand numbers of it."""
    dtype = str(weight.dtype).removeprefix("torch.")
    return LayerPrint(tuple(weight.shape), dtype, _digest(weight))


def _digest(weight: Tensor) -> str:
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return ""
    flat = weight.detach().reshape(-1)
    starts = [round(block * (flat.numel() - NUMBERS) / (BLOCKS - 1)) for block in range(BLOCKS)]
    blocks = [flat[max(0, start) : max(0, start) + NUMBERS] for start in starts]
    numbers: Any = torch.cat(blocks).float().cpu().numpy()
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def compare(recorded: Mapping[str, str], weights: Mapping[str, Tensor]) -> dict[str, Match]:
    """Each recorded layer against the same one of another base; `weights` by layer path + `.weight`."""
    return {
        path: LayerPrint.from_text(text).compare(layer_print(weights[f"{path}.weight"]))
        if f"{path}.weight" in weights
        else "unknown"
        for path, text in recorded.items()
    }
