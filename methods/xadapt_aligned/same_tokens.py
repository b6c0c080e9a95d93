"""Whether two bases mean the same by a token id: without that, features at the same position have nothing to do with each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from xadapt.contract import Base, Siblings

FILE = "tokenizer.json"


def check_tokenizers(bases: Siblings) -> None:
    """ValueError where both bases' folders have a tokenizer, and the two have other tokens. Without files nothing is said."""
    source, target = (_vocabulary(base) for base in (bases.source, bases.target))
    if source is None or target is None or source == target:
        return
    differ = [token for token in source if target.get(token) != source[token]]
    example = f", {differ[0]!r} for one" if differ else ""
    raise ValueError(
        f"The tokenizers differ: {bases.source.name} has {len(source)} tokens, {bases.target.name} has {len(target)}, and "
        f"{len(differ)} of the source's are others in the target{example}. What is learnt from data needs two bases that read the "
        "same token ids; without data there are copy, lora_x and prolora."
    )


def check_ids(batch: Mapping[str, Any], networks: Mapping[str, nn.Module]) -> None:
    """ValueError where a token id of the batch lies outside of a network's vocabulary."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or not ids.numel():
        return
    for role, network in networks.items():
        size = vocabulary_size(network)
        if size is not None and int(ids.max()) >= size:
            raise ValueError(
                f"The batch has token id {int(ids.max())}, and the {role}'s vocabulary has {size} tokens: the data was made "
                "with another tokenizer, or the two bases' tokenizers differ."
            )


def vocabulary_size(network: nn.Module) -> int | None:
    """Rows of the token table, or None where there is none."""
    try:
        table: Any = network.get_input_embeddings()  # type: ignore[operator]  # typed as a Tensor or a Module
    except (AttributeError, NotImplementedError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _vocabulary(base: Base) -> dict[str, int] | None:
    folder = getattr(base, "folder", None)  # bases on disk have one
    path = Path(folder) / FILE if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no tokenizer ({type(error).__name__}: {error}). Download it again.") from error
    if isinstance(found, list):  # Unigram: [token, score] by id
        return {entry[0]: number for number, entry in enumerate(found)}
    return dict(found)
