"""Batches with what is to be said of them, and how they reach a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .counting import IGNORED, with_neutral, without_labels


@dataclass(frozen=True)
class Batches:
    """What a model is run on. Can be gone through any number of times."""

    batches: tuple[Mapping[str, Any], ...]
    said: str
    """For reports: where it comes from and how much it is."""

    rows: int
    """Token positions, padding left out; of a denoiser, images or latents."""

    random: bool = False
    """Drawn from a model's config rather than read: latents, times and conditioning of no picture."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def token_batches(
    ids: Sequence[Sequence[int]], batch: int, pad: int = 0, asked: Sequence[int] = ()
) -> tuple[dict[str, Tensor], ...]:
    """Token ids of any lengths as input_ids and attention_mask (samples, length), padded at the right.

    Args:
        asked: of each sample, how many of the first tokens are a prompt. Given that, there are labels as well, which leave these out.
    """
    made = []
    for start in range(0, len(ids), batch):
        some = ids[start : start + batch]
        length = max(map(len, some))
        input_ids, mask = torch.full((len(some), length), pad), torch.zeros(len(some), length, dtype=torch.long)
        labels = torch.full((len(some), length), IGNORED)
        for row, one in enumerate(some):
            input_ids[row, : len(one)] = torch.as_tensor(one)
            mask[row, : len(one)] = 1
            if asked:
                told = asked[start + row]
                labels[row, told : len(one)] = torch.as_tensor(one[told:])
        made.append({"input_ids": input_ids, "attention_mask": mask} | ({"labels": labels} if asked else {}))
    return tuple(made)


def rows_in(batches: Iterable[Mapping[str, Any]]) -> int:
    """Token positions without padding; the size of the first tensor's first axis where there are no tokens."""
    count = 0
    for batch in batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if isinstance(mask, Tensor):
            count += int(mask.sum())
        elif isinstance(ids, Tensor):
            count += ids.numel()
        else:
            count += next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)
    return count


def beside(data: Batches, neutral: Batches) -> Batches:
    """The data, and neutral inputs beside them that methods learn from and nothing is judged by."""
    said = f"{data.said}; beside them, not to be judged by, {neutral.said}"
    return Batches(with_neutral(data.batches, neutral.batches), said, data.rows + neutral.rows, data.random)


def on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch where the model is, without labels; floating-point tensors in the model's dtype."""
    given = without_labels(batch)
    parameter = next((one for one in model.parameters() if one.is_floating_point()), None)
    if parameter is None or parameter.is_meta:
        return given
    return {name: _moved(value, parameter) for name, value in given.items()}


def _moved(value: Any, like: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(like) if value.is_floating_point() else value.to(like.device)
    if isinstance(value, Mapping):
        return {name: _moved(one, like) for name, one in value.items()}
    return value
