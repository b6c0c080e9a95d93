"""Texts as token ids that both models understand alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from xadapt.base import CheckpointBase
from xadapt.contract import Base

from .texts import Answered, Sample


class Encoded(NamedTuple):
    """The token ids of a sample, and how many of the first are its prompt's."""

    ids: list[int]
    asked: int


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


def encode(samples: Sequence[Sample], source: Base | None, target: Base, given: Any, max_tokens: int) -> list[Encoded]:
    """The token ids of each sample, by the tokenizers of both bases, which have to agree on these very texts.

    Behind a completion comes the end token of the first tokenizer, as adapters are taught to stop. Of a conversation, what comes
    before the last message is its prompt, if that is the assistant's and the template writes it at the end.

    Args:
        given: a tokenizer of the user's own, for live models; it is then taken for both.

    Raises:
        ValueError: there is no tokenizer, the two cut a text differently, an id is above a model's vocabulary, or the prompts alone
            are longer than `max_tokens`.
    """
    bases = [base for base in (source, target) if base is not None]
    tokenizers = [(target, given)] if given is not None else [(b, found) for b in bases if (found := tokenizer_of(b))]
    if not tokenizers:
        raise ValueError(
            f"Neither {' nor '.join(base.name for base in bases)} has a tokenizer beside it. Pass tokenizer=…, or token ids "
            "(a tensor of integers) as data."
        )
    written = [_written(sample, [tokenizer for _, tokenizer in tokenizers]) for sample in samples]
    texts = [prompt + rest for prompt, rest in written]
    chats = [not isinstance(sample, str | Answered) for sample in samples]
    cut = [
        [_ids(tokenizer, text, chat)[:max_tokens] for text, chat in zip(texts, chats, strict=True)]
        for _, tokenizer in tokenizers
    ]
    if len(cut) > 1:
        _check_alike(texts, tokenizers, cut)
    first = tokenizers[0][1]
    end = getattr(first, "eos_token_id", None)
    found = []
    for sample, (prompt, _), chat, ids in zip(samples, written, chats, cut[0], strict=True):
        ended = [*ids, end] if isinstance(sample, Answered) and end is not None and ids[-1:] != [end] else ids
        asked = _in_common(_ids(first, prompt, chat), ids) if prompt else 0
        found.append(Encoded(ended[:max_tokens], asked))
    found = [one for one in found if one.ids]
    if not found:
        raise ValueError("The data is empty: no text gives a single token.")
    if all(one.asked >= len(one.ids) for one in found):
        raise ValueError(
            f"With max_tokens={max_tokens} nothing of an answer is left, as the prompts alone are that long: raise it."
        )
    for base in bases:
        check_ids(max(max(one.ids) for one in found), base)
    return found


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


def _ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Of a conversation, the template has written the special tokens already."""
    return list(tokenizer(text, add_special_tokens=not chat)["input_ids"])


def _in_common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many of the first are the same. Of ids, the end of a prompt may be one token with the start of its answer."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _written(sample: Sample, tokenizers: Sequence[Any]) -> tuple[str, str]:
    """A prompt, "" where there is none, and the rest."""
    if isinstance(sample, str):
        return "", sample
    if isinstance(sample, Answered):
        return sample
    template = next((one for one in reversed(tokenizers) if getattr(one, "chat_template", None)), None)
    if template is None:
        raise ValueError(
            'The data has "messages", and no tokenizer of the two models has a chat template to write them out with: pass rows '
            'with "text", or with "prompt" and "completion", instead.'
        )
    if len(sample) < 2 or sample[-1]["role"] != "assistant":
        asking = sample[-1]["role"] != "assistant"
        return "", str(template.apply_chat_template(sample, tokenize=False, add_generation_prompt=asking))
    whole, before, asked = (
        str(template.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))
        for messages, asking in ((sample, False), (sample[:-1], False), (sample[:-1], True))
    )
    if not whole.startswith(before):
        return "", whole
    start = _in_common(whole, asked)  # less than all of it where a template has answers begin with a thought
    return whole[:start], whole[start:]
