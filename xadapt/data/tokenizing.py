"""Texts as token ids that both models understand alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xadapt.base import CheckpointBase
from xadapt.contract import Base

from .texts import Sample


def tokenizer_of(base: Base) -> Any | None:
    """The tokenizer in the folder of a base; None where there is none, as with live models."""
    if not isinstance(base, CheckpointBase):
        return None
    if not any(base.folder.glob("tokenizer*")) and not any(base.folder.glob("*.model")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(base.folder), local_files_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"The tokenizer of {base.name} cannot be opened: {type(error).__name__}: {error}") from error


def encode(
    samples: Sequence[Sample], source: Base | None, target: Base, given: Any, max_tokens: int
) -> list[list[int]]:
    """The token ids of each sample, by the tokenizers of both bases, which have to agree on these very texts.

    Args:
        given: a tokenizer of the user's own, for live models; it is then taken for both.

    Raises:
        ValueError: there is no tokenizer, the two cut a text differently, or an id is above a model's vocabulary.
    """
    bases = [base for base in (source, target) if base is not None]
    tokenizers = [(target, given)] if given is not None else [(b, found) for b in bases if (found := tokenizer_of(b))]
    if not tokenizers:
        raise ValueError(
            f"Neither {' nor '.join(base.name for base in bases)} has a tokenizer beside it. Pass tokenizer=…, or token ids "
            "(a tensor of integers) as data."
        )
    texts = [_text(sample, [tokenizer for _, tokenizer in tokenizers]) for sample in samples]
    cut = [[_ids(tokenizer, text)[:max_tokens] for text in texts] for _, tokenizer in tokenizers]
    if len(cut) > 1:
        _check_alike(texts, tokenizers, cut)
    ids = [one for one in cut[0] if one]
    if not ids:
        raise ValueError("The data is empty: no text gives a single token.")
    for base in bases:
        check_ids(max(max(one) for one in ids), base)
    return ids


def check_ids(largest: int, base: Base) -> None:
    """Refuses ids that a base's embedding has no row for."""
    config: Any = getattr(base, "config", {})
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise ValueError(
            f"The data has the token id {largest}, and {base.name} has a vocabulary of {size}: is it another model's tokenizer?"
        )


def _check_alike(texts: Sequence[str], tokenizers: Sequence[tuple[Base, Any]], cut: Sequence[list[list[int]]]) -> None:
    (one, first), (other, second) = tokenizers
    for text, ours, theirs in zip(texts, cut[0], cut[1], strict=True):
        if ours != theirs:
            place = next(
                (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            shown = text if len(text) <= 60 else f"{text[:60]}…"
            raise ValueError(
                f"The tokenizers differ: {shown!r} is {_shown(first, ours, place)} for {one.name} and {_shown(second, theirs, place)} "
                f"for {other.name}, from token {place} on. An adapter cannot be compared on inputs that the two models read "
                "differently."
            )


def _shown(tokenizer: Any, ids: Sequence[int], place: int) -> str:
    some = list(ids[place : place + 3])
    return f"{tokenizer.convert_ids_to_tokens(some)} {some}" if some else "at its end"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=True)["input_ids"])


def _text(sample: Sample, tokenizers: Sequence[Any]) -> str:
    if isinstance(sample, str):
        return sample
    template = next((one for one in reversed(tokenizers) if getattr(one, "chat_template", None)), None)
    if template is None:
        raise ValueError(
            'The data has "messages", and no tokenizer of the two models has a chat template to write them out with: pass rows '
            'with "text" instead.'
        )
    return str(template.apply_chat_template(sample, tokenize=False))
