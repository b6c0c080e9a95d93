"""Whether what an A4A adapter is given belongs to it: the target, the bank, the embeddings' form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from xadapt.fingerprint import layer_print

from .bank import Bank
from .targets import AttentionLayer


def fingerprint_of(module: nn.Module) -> str:
    """A few numbers of each of its weights, hashed."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        printed = layer_print(tensor)
        digest.update(f"{name} {printed.shape} {printed.digest}".encode())
    return digest.hexdigest()[:16]


def check_target(
    target: nn.Module, layers: Sequence[AttentionLayer], wanted: Sequence[tuple[str, int]], wanted_class: str
) -> None:
    """ValueError unless the target's layers are those the adapter was made for, by path and width."""
    given = [(layer.name, layer.width) for layer in layers]
    if given == list(wanted):
        return
    first = next((pair for pair in zip(given, wanted, strict=False) if pair[0] != pair[1]), None)
    detail = (
        f"{first[0][0]} of width {first[0][1]} stands where {first[1][0]} of width {first[1][1]} should"
        if first
        else "the first of them agree"
    )
    raise ValueError(
        f"This adapter is for {wanted_class} with {len(wanted)} attention layers; {type(target).__name__} has "
        f"{len(given)}: {detail}. Attach it to the model it was made for, or train one for this: "
        "A4AModel.from_ip_adapter(…, target=…)."
    )


def check_bank(bank: object, layers: Sequence[str], widths: Sequence[int], fingerprint: Callable[[], str]) -> None:
    """TypeError or ValueError unless the maps are for these layers, and of the adapter with that fingerprint."""
    if not isinstance(bank, Bank):
        raise TypeError(f"attach() takes a Bank, got {type(bank).__name__}: bank = adapter.encode(image_embeds).")
    if bank.layers != tuple(layers) or bank.widths != tuple(widths):
        raise ValueError(
            f"These maps are for another target: {len(bank.layers)} layers of widths {sorted(set(bank.widths))}, this "
            f"adapter's target has {len(layers)} of {sorted(set(widths))}. Encode the reference with this adapter."
        )
    if bank.adapter and bank.adapter != fingerprint():
        raise ValueError(
            "These maps were computed by another adapter, or by this one before its weights changed. Encode the reference "
            "again: bank = adapter.encode(image_embeds)."
        )


def check_masks(masks: object, references: int) -> None:
    """TypeError or ValueError unless there is one mask for each reference."""
    if masks is None:
        return
    wanted = "masks should be one per reference, (references, height, width), with 1 where it acts and 0 where not"
    if not isinstance(masks, Tensor):
        raise TypeError(f"{wanted}; got {type(masks).__name__}.")
    if masks.ndim != 3 or masks.shape[0] != references:
        raise ValueError(f"{wanted}; there are {references} references per sample, and masks of {tuple(masks.shape)}.")
    if not bool(masks.isfinite().all()):
        raise ValueError(f"{wanted}; these hold NaN or infinity.")


def diffusers_halves(embeds: Sequence[Tensor], negative: Tensor | None) -> tuple[Tensor, Tensor]:
    """(positive, negative) from what prepare_ip_adapter_image_embeds returns under guidance."""
    if negative is not None or len(embeds) != 1 or embeds[0].shape[0] % 2:
        raise ValueError(
            f"A list of image_embeds is diffusers' form: one tensor, [negative; positive], and no other negative. Got "
            f"{[tuple(one.shape) for one in embeds]}. Without guidance pass the tensor itself; for several adapters, each "
            "encodes its own."
        )
    negative_half, positive_half = embeds[0].chunk(2)
    return positive_half, negative_half
