"""Texts from files, rows and messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Answered(NamedTuple):
    """A prompt, and what follows it: this alone counts where behaviours are compared."""

    prompt: str
    completion: str


Sample = str | Answered | list[dict[str, Any]]  # a text, a prompt with its answer, or a conversation's messages

_WANTED = (
    'a row has "text": "…", "prompt": "…" and "completion": "…", or "messages": [{"role": "user", "content": "…"}, …]'
)


def read_texts(path: Path, limit: int) -> list[Sample]:
    """The first samples of a text file (a line each) or of a .jsonl file (a JSON object each). Empty lines are passed over.

    Raises:
        ValueError: a line cannot be read, which is named by its number, or there is no text at all.
    """
    found: list[Sample] = []
    for number, line in _lines(path):
        found.append(_from_json(line, f"{path}, line {number}") if path.suffix in (".jsonl", ".json") else line)
        if len(found) == limit:
            break
    if not found:
        raise ValueError(f"{path} is empty: it has no line of text.")
    return found


def from_row(row: Any, where: str) -> Sample:
    """The text, the prompt with its completion, or the messages of a row.

    Raises:
        ValueError: it has none of them.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {type(row).__name__}; {_WANTED}.")
    if "completion" in row:
        return _answered(row.get("prompt"), row["completion"], where)
    text, messages = row.get("text", row.get("prompt")), row.get("messages")
    if isinstance(text, str) and text.strip():
        return text
    if conversation := _conversation(messages):
        return conversation
    raise ValueError(f"{where} has the fields {', '.join(map(repr, row)) or 'none'} and no text in them; {_WANTED}.")


def _answered(prompt: Any, completion: Any, where: str) -> Sample:
    """A prompt and a completion, both texts or both messages."""
    if isinstance(prompt, str) and isinstance(completion, str) and completion.strip():
        return Answered(prompt, completion)
    asked, answer = _conversation(prompt), _conversation(completion)
    if asked and answer:
        return [*asked, *answer]
    raise ValueError(
        f"{where} has a completion that is empty, or not of the prompt's sort: both are texts, or both messages. Leave completion out "
        "of prompts that have none."
    )


def _conversation(messages: Any) -> list[dict[str, Any]]:
    """Messages, or nothing where they are none."""
    if not isinstance(messages, Iterable) or isinstance(messages, str):
        return []
    found = [dict(message) for message in messages if isinstance(message, Mapping)]
    return found if all(isinstance(one.get("role"), str) and "content" in one for one in found) else []


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is no text in UTF-8 ({error.reason}).") from error
            if line.strip():
                yield number, line.rstrip("\r\n")


def _from_json(line: str, where: str) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); a .jsonl file has one object a line: {_WANTED}.") from error
    return from_row(row, where)
