"""The header of a safetensors file, with every promise it makes about the file checked. Reads no tensor."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from xadapt.strict_json import parse_object

LONGEST = 100_000_000  # bytes; the safetensors library refuses longer headers too

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
_LARGEST = 2**62  # of a dimension: what fits the index types of torch and safetensors


@dataclass(frozen=True)
class Entry:
    """What a checkpoint says about one tensor."""

    name: str
    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All tensors of one file, in file order, and its free-form metadata."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks a file's header.

    Raises:
        ValueError: the file is cut short or damaged, or its header contradicts itself or the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _length(path, file.read(8), size)
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    described = parse_object(text, f"The header of {path}")
    metadata = described.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is no object of strings")
    placed = [_placed(path, name, description) for name, description in described.items()]
    placed.sort(key=lambda item: item[0])
    _check_places(path, placed, size - 8 - length)
    return Header(tuple(entry for _, entry in placed), metadata)


def _length(path: Path, prefix: bytes, size: int) -> int:
    """How long the JSON is, by the 8 bytes before it."""
    if len(prefix) < 8:
        raise _damaged(path, f"it is cut short: {size} bytes, and the header's length alone takes 8")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > LONGEST:
        raise _damaged(path, f"its header claims {length:,} bytes; {LONGEST:,} are allowed")
    if length > size - 8:
        raise _damaged(path, f"it is cut short: its header claims {length:,} bytes, the file has {size - 8:,}")
    return length


def _placed(path: Path, name: str, description: Any) -> tuple[tuple[int, int], Entry]:
    """(start, end) in the data part, and what lies there."""
    if not isinstance(description, dict) or description.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = description["dtype"], description["shape"], description["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"{path}: {name!r} has dtype {dtype!r}, which torch has no counterpart for. Known: {', '.join(_DTYPES)}."
        )
    if not _are_counts(shape):
        raise _damaged(path, f"{name!r} has the shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name!r} has the data_offsets {offsets!r}")
    start, end = offsets
    bits = 4 if dtype == "F4" else 8 * _DTYPES[dtype].itemsize
    if prod(shape) * bits != 8 * (end - start):
        raise _damaged(path, f"{name!r} of dtype {dtype} and shape {shape} does not take {end - start} bytes")
    if dtype == "F4":  # torch packs two of them into one element
        if not shape or shape[-1] % 2:
            raise _damaged(path, f"{name!r} of dtype F4 has the shape {shape}, whose last dimension must be even")
        shape = [*shape[:-1], shape[-1] // 2]
    return (start, end), Entry(name, path, _DTYPES[dtype], tuple(shape), end - start)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST for item in value)


def _check_places(path: Path, placed: list[tuple[tuple[int, int], Entry]], size: int) -> None:
    """The tensors fill the data part exactly: they do not overlap, and nothing is between, before or after them."""
    reached, before = 0, "the start"
    for (start, end), entry in placed:
        if end > size:
            raise _damaged(
                path, f"it is cut short: {entry.name!r} ends at byte {end:,} of its data, which has {size:,}"
            )
        if start < reached:
            raise _damaged(path, f"{entry.name!r} overlaps {before}")
        if start > reached:
            raise _damaged(path, f"there is a hole of {start - reached:,} bytes between {before} and {entry.name!r}")
        reached, before = end, repr(entry.name)
    if reached != size:
        raise _damaged(path, f"{size - reached:,} bytes after {before} belong to no tensor")


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}. Copy, download or save it again.")
