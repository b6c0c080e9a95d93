"""Tokenizers in memory: letters, and one token for each word that matters. No files, and nothing is trained."""

from __future__ import annotations

import string
from typing import Any

LENGTH = 16
"""Tokens of a prompt."""


def clip_tokenizer(words: list[str]) -> Any:
    """A CLIPTokenizer that knows these words whole, and any other by its letters."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + ".,-'_"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH, pad_token="<|endoftext|>")
    tokenizer.add_tokens(_whole(words))
    return tokenizer


def t5_tokenizer(words: list[str]) -> Any:
    """A T5 tokenizer of the same kind."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [*special, *((letter, -3.0) for letter in string.ascii_lowercase + string.digits + ".,-'_")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)
    tokenizer.add_tokens(_whole(words))
    return tokenizer


def _whole(words: list[str]) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(word, single_word=True, lstrip=True, rstrip=True) for word in words]
