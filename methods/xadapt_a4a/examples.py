"""Images with captions, from what people keep them in: folders, webdataset's tar shards, `datasets`."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xadapt.errors import did_you_mean, some
from xadapt.strict_json import parse_object

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTIONS = ("text", "caption", "prompt")  # what columns of captions are called, the first that is there
_TEXTS = (".txt", ".caption")


@dataclass(frozen=True)
class Example:
    """One image, read when it is asked for, and what it shows in words."""

    name: str  # what messages call it
    content: Callable[[], bytes | Image.Image]
    caption: str


def examples_of(data: Any, image_column: str = "", caption_column: str = "") -> Iterable[Example] | None:
    """The examples in a folder, in tar shards or in a `datasets` dataset; None where `data` is nothing of the kind.

    What is returned can be gone through again.

    Raises:
        ValueError: there is no image, or captions are missing.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        if path.is_dir():
            shards = sorted(path.glob("*.tar"))
            if shards:
                return TarShards(shards, caption_column)
            if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
                return DatasetExamples(_from_disk(path), str(path), image_column, caption_column)
            return _folder(path, caption_column)
        if path.suffix == ".tar" and path.is_file():
            return TarShards([path], caption_column)
        if path.exists():
            raise ValueError(f"{path} is no data to train on; pass a folder of images, .tar shards, or a dataset.")
        return DatasetExamples(_from_hub(str(data)), str(data), image_column, caption_column)
    if hasattr(data, "column_names") and hasattr(data, "__getitem__"):
        return DatasetExamples(data, "The dataset", image_column, caption_column)
    return None


def _folder(folder: Path, caption_column: str) -> list[Example]:
    """Of NAME.jpg with NAME.txt beside it, or of a metadata.jsonl or metadata.csv with `file_name` and the caption."""
    rows = _metadata(folder)
    found: list[Example] = []
    without: list[str] = []
    if rows is not None:
        column = _caption_column(list(rows[0]) if rows else [], caption_column, str(folder))
        pairs = [(folder / str(row.get("file_name", "")), row.get(column)) for row in rows]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
        pairs = [(path, _text_beside(path)) for path in paths]
    for path, caption in pairs:
        name = Path(os.path.relpath(path, folder)).as_posix()
        if caption is None:
            without.append(name)
        found.append(Example(name, path.read_bytes, str(caption or "").strip()))
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGES)}) and no .tar shards.")
    if without:
        raise ValueError(
            f"{len(without)} of the {len(found)} images in {folder} have no caption: {some(without)}. Write it into NAME.txt beside "
            f"NAME{Path(without[0]).suffix}, or give all in metadata.jsonl, one line per image: "
            '{"file_name": "a.jpg", "text": "what it shows"}. An empty text is a caption, too.'
        )
    return found


def _metadata(folder: Path) -> list[dict[str, Any]] | None:
    if (folder / "metadata.jsonl").is_file():
        lines = (folder / "metadata.jsonl").read_bytes().splitlines()
        rows = [
            parse_object(line, f"{folder / 'metadata.jsonl'}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    elif (folder / "metadata.csv").is_file():
        with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        return None
    nameless = next((number for number, row in enumerate(rows, 1) if not row.get("file_name")), None)
    if nameless is not None:
        raise ValueError(f"{folder}: row {nameless} of its metadata has no file_name.")
    return rows


def _text_beside(path: Path) -> str | None:
    beside = next((path.with_suffix(suffix) for suffix in _TEXTS if path.with_suffix(suffix).is_file()), None)
    return None if beside is None else beside.read_text(encoding="utf-8", errors="replace")


def _caption_column(columns: list[str], asked: str, where: str) -> str:
    """The column of captions: the one asked for, or the first usual one."""
    if asked:
        if asked not in columns:
            raise ValueError(f"{where} has no column {asked!r} for captions. {did_you_mean(asked, columns)}")
        return asked
    usual = next((name for name in CAPTIONS if name in columns), None)
    if usual is None:
        raise ValueError(
            f"{where} has no captions: none of {', '.join(CAPTIONS)} is among {', '.join(columns) or 'no columns'}. If they are "
            "called otherwise, name the column: caption_column='…'."
        )
    return usual


class TarShards:
    """webdataset's shards: files of one sample share a name up to the first dot, and follow each other."""

    def __init__(self, shards: list[Path], caption_column: str) -> None:
        self._shards, self._column = shards, caption_column

    def __iter__(self) -> Iterator[Example]:
        found = 0
        for shard in self._shards:
            for key, parts in _samples(shard):
                image = next((parts[suffix] for suffix in IMAGES if suffix in parts), None)
                if image is None:
                    continue
                found += 1
                name = f"{shard.name}:{key}"
                yield Example(name, lambda image=image: image, self._caption(parts, name))  # type: ignore[misc]  # mypy cannot type a lambda's default
        if not found:
            raise ValueError(f"{some([str(one) for one in self._shards])} hold no images ({', '.join(IMAGES)}).")

    def _caption(self, parts: Mapping[str, bytes], name: str) -> str:
        for suffix in _TEXTS:
            if suffix in parts and not self._column:
                return parts[suffix].decode("utf-8", errors="replace").strip()
        if ".json" in parts:
            row = parse_object(parts[".json"], f"{name}.json")
            return str(row[_caption_column(list(row), self._column, f"{name}.json")])
        raise ValueError(
            f"{name} has no caption: beside its image there is {', '.join(sorted(parts))}, and .txt, .caption or a .json with it is wanted."
        )


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Each sample's files by their suffix."""
    try:
        with tarfile.open(shard) as tar:
            key = ""
            parts: dict[str, bytes] = {}
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != key and parts:
                    yield key, parts
                    parts = {}
                key = name
                opened = tar.extractfile(member)
                parts[f".{suffix.lower()}"] = opened.read() if opened else b""
            if parts:
                yield key, parts
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard} is no whole tar file ({error}); download or write it again.") from error


class DatasetExamples:
    """Of a `datasets` dataset, or whatever has rows by number and column_names."""

    def __init__(self, dataset: Any, where: str, image_column: str, caption_column: str) -> None:
        columns = dataset.column_names
        if isinstance(columns, Mapping):
            raise ValueError(
                f"{where} has several splits: {', '.join(columns)}. Pass one: dataset[{next(iter(columns))!r}]."
            )
        if not len(dataset):
            raise ValueError(f"{where} is empty.")
        self._captions = _caption_column(columns, caption_column, where)
        self._images = _image_column(dataset, image_column, where)
        self._dataset = _undecoded(dataset, self._images)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Example]:
        for number in range(len(self)):
            row = self._dataset[number]
            caption = row[self._captions]
            if caption is None:
                raise ValueError(f"Row {number} has no caption in {self._captions!r}. Fill it, or filter the dataset.")
            image = row[self._images]
            yield Example(f"row {number}", lambda image=image: _content(image), str(caption))  # type: ignore[misc]  # mypy cannot type a lambda's default


def _image_column(dataset: Any, asked: str, where: str) -> str:
    columns: list[str] = dataset.column_names
    if asked:
        if asked not in columns:
            raise ValueError(f"{where} has no column {asked!r} for images. {did_you_mean(asked, columns)}")
        return asked
    features = getattr(dataset, "features", None) or {}
    typed = [name for name in columns if type(features.get(name)).__name__ == "Image"]
    named = [name for name in ("image", "jpg", "png") if name in columns]
    if not typed and not named:
        raise ValueError(f"{where} has no column of images among {', '.join(columns)}. Name it: image_column='…'.")
    return (typed or named)[0]


def _undecoded(dataset: Any, column: str) -> Any:
    """So that one broken image does not end the reading: it is decoded here, not in `datasets`."""
    feature: Any = (getattr(dataset, "features", None) or {}).get(column)
    if type(feature).__name__ != "Image":
        return dataset
    return dataset.cast_column(column, type(feature)(decode=False))


def _content(image: Any) -> bytes | Image.Image:
    """A cell's image: bytes, an image, a path, or `datasets`' {"bytes", "path"}."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if isinstance(image, bytes | Image.Image):
        return image
    raise OSError(f"a {type(image).__name__} is no image")


def _from_disk(path: Path) -> Any:
    return _datasets().load_from_disk(str(path))


def _from_hub(name: str) -> Any:
    if name == "random":  # what other methods and verbs take
        raise ValueError("A4A learns from images with captions, not from random latents: pass a folder of them.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"{name} is not there. Pass a folder of images, .tar shards, or a dataset's id such as owner/name."
        )
    return _datasets().load_dataset(name, split="train")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Datasets by their id or from save_to_disk need `datasets`: pip install xadapt[data]"
        ) from error
    return datasets


def decoded(content: bytes | Image.Image) -> Image.Image:
    """The image, upright and in RGB.

    Raises:
        OSError, ValueError, SyntaxError: it is damaged, or no image.
    """
    from PIL import ImageOps

    image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
    return ImageOps.exif_transpose(image).convert("RGB")
