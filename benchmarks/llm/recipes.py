"""What an adapter is trained on: examples of prompt and response, and how they become tokens and labels."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.llm import commonsense, prompts
from benchmarks.llm.settings import Data

IGNORE = -100
Example: TypeAlias = tuple[str, str]  # prompt, response


@dataclass(frozen=True)
class Text:
    """How examples become tokens."""

    loss_on_prompt: bool
    ending: str = ""  # between the response and the end-of-text token


TEXTS = {
    # LLM-Adapters trains on the prompt as well; PiSSA's scripts on the response, a line feed and the end of the text.
    "commonsense": Text(loss_on_prompt=True),
    "math": Text(loss_on_prompt=False, ending="\n"),
    "code": Text(loss_on_prompt=False, ending="\n"),
    "sorting": Text(loss_on_prompt=False),
}


def examples(recipe: str, data: Data, count: int, seed: int) -> list[Example]:
    """All examples of a recipe, shuffled by the seed. `count`: how many the recipe that generates its own makes."""
    found = READERS[recipe](data, count)
    random.Random(seed).shuffle(found)
    return found


def fingerprint(found: Sequence[Example]) -> str:
    """A hash of the examples in any order."""
    each = sorted(hashlib.sha256(f"{prompt}\0{response}".encode()).digest() for prompt, response in found)
    return hashlib.sha256(b"".join(each)).hexdigest()[:16]


def tokenise(example: Example, text: Text, tokenizer: Any, length: int) -> dict[str, list[int]]:
    """`input_ids`, `attention_mask` and `labels` of one example, cut at `length` tokens; no end where it was cut."""
    prompt, response = example
    before: list[int] = tokenizer(prompt)["input_ids"]
    whole: list[int] = tokenizer(prompt + response + text.ending)["input_ids"]
    if whole[-1] != tokenizer.eos_token_id:
        whole = [*whole, tokenizer.eos_token_id]
    whole = whole[:length]
    shared = _shared(before, whole)  # a tokenizer may join the prompt's end with the response's beginning
    labels = list(whole) if text.loss_on_prompt else [IGNORE] * shared + whole[shared:]
    return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _commonsense(data: Data, count: int) -> list[Example]:
    rows = commonsense.read(data.commonsense, commonsense.TRAINING, ("instruction", "input", "output"))
    if any(row["input"] for row in rows):
        raise ValueError("commonsense_170k has no separate inputs, and this file has: it is another one.")
    return [(prompts.commonsense_training(row["instruction"]), row["output"]) for row in rows]


def _pissa(subset: str, split: str) -> Callable[[Data, int], list[Example]]:
    def read(data: Data, count: int) -> list[Example]:
        from datasets import load_dataset

        rows = load_dataset(data.pissa, data_dir=subset, split=split)
        query, answer = ("instruction", "output") if "instruction" in rows.column_names else ("query", "response")
        return [(prompts.plain(row[query]), row[answer]) for row in rows]

    return read


def _sorting(data: Data, count: int) -> list[Example]:
    from benchmarks.llm.tiny import training_examples

    return training_examples(count)


READERS: dict[str, Callable[[Data, int], list[Example]]] = {
    "commonsense": _commonsense,
    "math": _pissa("metamath", "train[:100000]"),
    "code": _pissa("python", "train"),
    "sorting": _sorting,
}
