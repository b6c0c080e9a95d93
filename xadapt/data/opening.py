"""Whatever the user calls data, as batches for the forward of two bases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xadapt.contract import Base

from .amount import Amount
from .batches import Batches, rows_in, token_batches
from .denoisers import is_denoiser, random_inputs, random_times
from .images import images_in, images_of_rows, noised_latents
from .texts import Sample, from_row, read_texts
from .tokenizing import check_ids, encode


def open_data(
    data: Any, source: Base | None, target: Base, amount: Amount | None = None, *, tokenizer: Any = None
) -> Batches:
    """The first of the data as batches that both bases can run.

        open_data("lines.txt", source, target, Amount(samples=32))

    Args:
        data: a text file (a sample a line), a .jsonl file (rows with "text", with "prompt" and "completion", or with "messages"), a
            folder of pictures, a `datasets.Dataset` of such rows or, for denoisers, of pictures, a list of texts, a tensor of token
            ids (samples, length), or batches: an iterable of dicts of arguments of the forward. "random", for denoisers: latents,
            times and conditioning drawn from the config. Where it is told what is a prompt (completions, messages whose last is
            the assistant's, batches with labels that are -100 there), behaviours are compared on the answers alone.
        amount: how much of it.
        tokenizer: for live models, which have none beside them.

    Raises:
        ValueError: the data is empty, cannot be read, or is nothing that these bases take; or `amount` or `tokenizer` say something
            that such data does not heed.
        TypeError: it is of no known sort.
    """
    much = amount or Amount()
    if isinstance(data, Batches):
        _check_heeded(much.chosen("samples", "max_tokens", "batch"), tokenizer, "batches that are open already")
        return data
    if is_denoiser(target):
        _check_heeded(much.chosen("max_tokens"), tokenizer, "a denoiser's data")
        return _for_denoiser(data, target, much)
    if isinstance(data, Tensor):
        _check_heeded([], tokenizer, "a tensor of token ids")
        return _tokens(data, source, target, much)
    if isinstance(data, str | PathLike):
        samples, said = _read(Path(data), much), str(data)
    elif hasattr(data, "column_names"):
        samples = [from_row(row, f"row {n} of the dataset") for n, row in enumerate(islice(data, much.samples))]
        said = "a dataset"
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        first = list(islice(data, much.samples))
        if not first:
            raise ValueError("The data is empty: it has no sample.")
        if all(isinstance(one, str) for one in first):
            samples, said = list(first), "texts"
        else:
            _check_heeded(much.chosen("max_tokens", "batch"), tokenizer, "batches")
            return _given(first)
    else:
        raise TypeError(f"data={type(data).__name__}: {_SORTS}.")
    if not samples:
        raise ValueError(f"The data is empty: {said} has no sample.")
    encoded = encode(samples, source, target, tokenizer, much.max_tokens)
    asked = [one.asked for one in encoded]
    batches = token_batches([one.ids for one in encoded], much.batch, asked=asked if any(asked) else ())
    rows = rows_in(batches)
    answers = f", {rows - sum(asked):,} of them in answers" if any(asked) else ""
    if lost := sum(one.asked >= len(one.ids) for one in encoded):
        answers += f" ({lost} of the prompts leave no room for one: max_tokens={much.max_tokens})"
    return Batches(batches, f"{said}: {len(encoded)} samples, {rows:,} tokens{answers}", rows)


def _check_heeded(told: Sequence[str], tokenizer: Any, what: str) -> None:
    """ValueError where something is asked for that this sort of data leaves as it is."""
    names = [*told, *(["tokenizer"] if tokenizer is not None else [])]
    if names:
        raise ValueError(f"{' and '.join(names)} would change nothing of {what}; leave {' and '.join(names)} out.")


_SORTS = (
    "data is a text or JSONL file, a folder of pictures, a datasets.Dataset, a list of texts, a tensor of token ids, or batches "
    "(dicts of the forward's arguments)"
)


def _read(path: Path, amount: Amount) -> Sequence[Sample]:
    if str(path) == "random":
        raise ValueError(
            "data='random' is for denoisers, whose inputs are noise; a language model reads a text or JSONL file."
        )
    if not path.exists():
        raise ValueError(f"{path} is not there; {_SORTS}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a language model reads text: pass a text or JSONL file.")
    return read_texts(path, amount.samples)


def _tokens(ids: Tensor, source: Base | None, target: Base, amount: Amount) -> Batches:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 2:
        raise ValueError(
            f"A tensor as data holds token ids: integers (samples, length), not {ids.dtype} {tuple(ids.shape)}."
        )
    if not ids.numel():
        raise ValueError(f"The data is empty: a tensor of shape {tuple(ids.shape)}.")
    if int(ids.min()) < 0:
        raise ValueError(f"Token ids start at 0, and the data has {int(ids.min())}.")
    kept = ids[: amount.samples, : amount.max_tokens].long()
    for base in (source, target):
        if base is not None:
            check_ids(int(kept.max()), base)
    batches = tuple({"input_ids": part} for part in torch.split(kept, amount.batch))
    return Batches(batches, f"token ids: {len(kept)} samples, {kept.numel():,} tokens", kept.numel())


def _given(batches: Sequence[Any]) -> Batches:
    wrong = next((one for one in batches if not isinstance(one, Mapping)), None)
    if wrong is not None:
        raise TypeError(f"A batch is a dict of the forward's arguments, not {type(wrong).__name__}; {_SORTS}.")
    if not any(isinstance(value, Tensor) and value.numel() for batch in batches for value in batch.values()):
        raise ValueError("The data is empty: its batches hold no tensor.")
    for number, batch in enumerate(batches):
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"Batch {number} of the data holds NaN or infinity in {name!r}.")
    rows = rows_in(batches)
    return Batches(tuple(batches), f"{len(batches)} batches as given, {rows:,} rows", rows)


def _for_denoiser(data: Any, base: Base, amount: Amount) -> Batches:
    generator = torch.Generator().manual_seed(amount.seed)
    latents: Tensor | None = None
    if isinstance(data, str) and data == "random":
        said = f"{amount.samples} random latents, times and conditionings of no picture"
        times = random_times(amount.samples, generator)
    elif isinstance(data, str | PathLike):
        folder = Path(data)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; a denoiser's data is a folder of pictures, batches, or 'random'.")
        paths = images_in(folder, amount.samples)
        times = random_times(len(paths), generator)
        latents = noised_latents(paths, base, times, generator)
        said = f"{folder}: {len(paths)} pictures, noised, with random conditioning"
    elif hasattr(data, "column_names"):
        pictures = images_of_rows(data, amount.samples)
        times = random_times(len(pictures), generator)
        latents = noised_latents(pictures, base, times, generator)
        said = f"a dataset: {len(pictures)} pictures, noised, with random conditioning"
    elif isinstance(data, Iterable) and not isinstance(data, Mapping | Tensor):
        first = list(islice(data, amount.samples))
        if not first:
            raise ValueError("The data is empty: it has no batch.")
        return _given(first)
    else:
        raise TypeError(
            f"data={type(data).__name__}: a denoiser's is a folder or dataset of pictures, batches, or 'random'."
        )
    batches = []
    for start in range(0, len(times), amount.batch):
        part = slice(start, start + amount.batch)
        batches.append(random_inputs(base, times[part], generator, None if latents is None else latents[part]))
    return Batches(tuple(batches), said, len(times), random=latents is None)
