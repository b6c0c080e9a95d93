"""Prompts without answers, continued by the adapted source: what it was taught to say is then part of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xadapt.contract import Adapter, Base
from xadapt.data.batches import Batches, on_device, rows_in
from xadapt.data.counting import IGNORED
from xadapt.wearing import wearing


@torch.no_grad()
def continued(
    source: Base, adapter: Adapter, batches: Iterable[Mapping[str, Any]], tokens: int
) -> list[dict[str, Any]]:
    """Each sample with `tokens` more tokens, which the adapted source finds most likely one by one. Labels say that these count
    and the prompts do not: what would come after a part of a prompt is nothing that the adapter was taught.

    Args:
        batches: dicts with input_ids (samples, length), and attention_mask where there is padding. Those with labels say what
            counts already, and stay as they are.

    Raises:
        ValueError: a batch holds more than token ids and their mask, or the model cannot generate.
    """
    model: Any = source.module()
    if not hasattr(model, "generate"):
        raise ValueError(f"{source.name} is no language model that generates; leave continue_tokens at 0.")
    made = []
    with wearing(model, adapter):
        for batch in batches:
            if "labels" in batch:
                made.append(dict(batch))
                continue
            if set(batch) - {"input_ids", "attention_mask"} or "input_ids" not in batch:
                raise ValueError(
                    f"Only token ids can be continued, and this batch holds {', '.join(batch)}. Pass input_ids and attention_mask, or "
                    "leave continue_tokens at 0."
                )
            made.append(_continued(model, on_device(batch, model), tokens))
    return made


def continued_data(source: Base, adapter: Adapter, data: Batches, tokens: int) -> Batches:
    """Data of the user's, continued, with how it is said in reports. ValueError as `continued`."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"continue_tokens={tokens!r}: a whole number from 0 on.")
    made = tuple(continued(source, adapter, data.batches, tokens))
    return Batches(made, f"{data.said}, continued by {tokens} tokens, which alone count", rows_in(made))


def _continued(model: Any, batch: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    ids, mask = _padded_left(ids, mask)
    longer = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    labels = longer.clone()
    labels[:, : ids.shape[1]] = IGNORED
    seen = torch.cat([mask, mask.new_ones(mask.shape[0], tokens)], dim=1)
    return {"input_ids": longer, "attention_mask": seen, "labels": labels}


def _padded_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padding moved to the front, where nothing is generated behind it."""
    order = mask.long().argsort(dim=1, stable=True)  # zeros first, the others in their order
    return ids.gather(1, order), mask.gather(1, order)
