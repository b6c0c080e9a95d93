"""The bank: what an A4A adapter computes once per reference, k̄ and v̄ for every attention layer of its target."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xadapt.files import save_tensors
from xadapt.finite import is_finite

Maps = tuple[tuple[Tensor, Tensor], ...]
_FORMAT = "xadapt.a4a.bank/1"


@dataclass(frozen=True, eq=False)
class Bank:
    """The maps of B samples. Reusable over denoising steps, prompts and seeds."""

    layers: tuple[str, ...]
    """The target's layers by path, one map each."""

    positive: Maps
    """Of each layer (k̄, v̄), (B, M, d̂_i) each. M is N times the number of references per sample."""

    negative: Maps | None = None
    """The same for the empty image, with a batch of B, or of 1 for all. Guidance needs it."""

    references: int = 1
    """How many reference images each sample has."""

    adapter: str = ""
    """The fingerprint of the A4A adapter that computed it. "" under training, where it would be outdated at once."""

    @property
    def batch(self) -> int:
        return self.positive[0][0].shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(key.shape[-1] for key, _ in self.positive)

    @property
    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in self._tensors().values())

    def for_call(self, *, guidance: bool, num_images_per_prompt: int = 1) -> Maps:
        """The maps in the order in which pipelines lay out their batch: [negative; positive] under guidance, and within each
        half every sample num_images_per_prompt times in a row.
        """
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int):
            raise TypeError(f"num_images_per_prompt={num_images_per_prompt!r} should be a whole number.")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt} should be at least 1.")
        # One sample serves every row of the batch, so it is repeated when the size of the batch is known.
        times = num_images_per_prompt if self.batch > 1 else 1
        if not guidance:
            return tuple((_repeat(key, times), _repeat(value, times)) for key, value in self.positive)
        if self.negative is None:
            raise ValueError(
                "Guidance needs the maps of the empty image, and this bank has none. Encode them with it: "
                "encode(image_embeds, negative_image_embeds=…), the encoder's hidden states of an all-zero image; "
                "or attach with guidance=False."
            )
        return tuple(
            (_halves(no_key, key, times), _halves(no_value, value, times))
            for (no_key, no_value), (key, value) in zip(self.negative, self.positive, strict=True)
        )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Bank:
        """The same maps elsewhere."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def detach(self) -> Bank:
        """The same maps without the graph that computed them."""
        return self._map(Tensor.detach)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one .safetensors file, whole or not at all."""
        path = Path(path)
        about = {"format": _FORMAT, "layers": json.dumps(self.layers), "adapter": self.adapter}
        about["references"] = str(self.references)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        try:
            save_tensors(tensors, partial, metadata=about)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Bank:
        """Inverse of `save`.

        Raises:
            ValueError: it is no such file, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as a saved bank ({error}); save it again.") from error
        if about.get("format") != _FORMAT:
            raise ValueError(f"{path} is no bank of maps; Bank.save writes one.")
        broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        if broken:
            raise ValueError(f"{path}: {', '.join(broken[:5])} hold NaN or infinity; encode the reference again.")
        layers = tuple(json.loads(about["layers"]))
        halves = {
            half: tuple((tensors[f"{half}.{i}.key"], tensors[f"{half}.{i}.value"]) for i in range(len(layers)))
            for half in ("positive", "negative")
            if f"{half}.0.key" in tensors
        }
        return cls(layers, halves["positive"], halves.get("negative"), int(about["references"]), about["adapter"])

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{half}.{index}.{part}": tensor
            for half, maps in (("positive", self.positive), ("negative", self.negative))
            for index, pair in enumerate(maps or ())
            for part, tensor in zip(("key", "value"), pair, strict=True)
        }

    def _map(self, change: Any) -> Bank:
        def changed(maps: Maps) -> Maps:
            return tuple((change(key), change(value)) for key, value in maps)

        negative = None if self.negative is None else changed(self.negative)
        return replace(self, positive=changed(self.positive), negative=negative)


def beside(tensor: Tensor, references: int) -> Tensor:
    """(B, n·N, d̂) from (B·n, N, d̂): a sample's references are attended to together, in one softmax."""
    return tensor.reshape(-1, references * tensor.shape[1], tensor.shape[2])


def as_many(negative: Sequence[tuple[Tensor, Tensor]], positive: Sequence[tuple[Tensor, Tensor]]) -> Maps:
    """The maps of the empty image, with as many tokens as those of the references.

    Raises:
        ValueError: they are neither for as many samples and references, nor for one.
    """
    (batch, tokens), (given, given_tokens) = (maps[0][0].shape[:2] for maps in (positive, negative))
    if given not in (1, batch) or tokens % given_tokens:
        raise ValueError(
            f"The references make {batch} samples of {tokens} tokens, the negative embeddings {given} of {given_tokens}. Give as "
            "many negative as positive ones, or one for all."
        )
    # The same tokens several times over weigh in the softmax as they do once.
    times = tokens // given_tokens
    return tuple((key.repeat(1, times, 1), value.repeat(1, times, 1)) for key, value in negative)


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=0)


def _halves(negative: Tensor, positive: Tensor, times: int) -> Tensor:
    negative = negative.expand(positive.shape[0], -1, -1)
    return torch.cat([_repeat(negative, times), _repeat(positive, times)])
