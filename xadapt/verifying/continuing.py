"""Prompts without answers, continued by the adapted source: what it was taught to say is then part of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xadapt.contract import Adapter, Base
from xadapt.data.batches import Batches, on_device, rows_in
from xadapt.data.counting import IGNORED, anything_counts
from xadapt.wearing import wearing


@torch.no_grad()
def continued(
    source: Base, adapter: Adapter, batches: Iterable[Mapping[str, Any]], tokens: int
) -> list[dict[str, Any]]:
    """Each sample with up to `tokens` more, which the adapted source finds most likely one by one, to its end token. Labels say
    that these count and the prompts do not: what would come after a part of a prompt is nothing that the adapter was taught.

    Args:
        batches: dicts with input_ids (samples, length), and attention_mask where there is padding. Those with labels say what
            counts already; where that is nothing, they stay as they are.

    Raises:
        ValueError: a batch holds more than token ids and their mask, or the model cannot generate.
    """
    model: Any = source.module()
    if not hasattr(model, "generate"):
        raise ValueError(f"{source.name} is no language model that generates; leave continue_tokens at 0.")
    made = []
    with wearing(model, adapter):
        for batch in batches:
            if not anything_counts(batch):
                made.append(dict(batch))
                continue
            if "labels" in batch:
                raise ValueError("The data says already what its answers are, by labels; leave continue_tokens out.")
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
    return Batches(made, f"{data.said}, continued by up to {tokens} tokens, which alone count", rows_in(made))


def _continued(model: Any, batch: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    ids, mask = _padded_left(ids, mask)
    longer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    said = longer[:, ids.shape[1] :]
    ended = torch.isin(said, _ends_of(model, said)).long()
    within = (ended.cumsum(1) - ended == 0).long()  # up to the first end token
    seen = torch.cat([mask, within], dim=1)
    labels = torch.where(within.bool(), said, IGNORED)
    labels = torch.cat([torch.full_like(ids, IGNORED), labels], dim=1)
    order = (1 - seen).argsort(dim=1, stable=True)  # padding at the right: absolute positions start at the first token
    longer, seen, labels = (part.gather(1, order) for part in (longer, seen, labels))
    return {"input_ids": longer, "attention_mask": seen, "labels": labels}


def _ends_of(model: Any, like: Tensor) -> Tensor:
    ends = model.generation_config.eos_token_id
    return like.new_tensor([] if ends is None else ends).view(-1)


def _padded_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padding moved to the front, where nothing is generated behind it."""
    order = mask.long().argsort(dim=1, stable=True)  # zeros first, the others in their order
    return ids.gather(1, order), mask.gather(1, order)
