"""The photographs of a subject: from the hub, or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.frame.settings import did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def subject_images(images: str, subject: str) -> list[Image]:
    """RGB images of a subject, in the order of their file names.

    Args:
        images: a folder that holds one folder per subject (also as `dataset/<subject>`, the layout of the repository),
            or the id of a data set on the hub with one config per subject.

    Raises:
        ValueError: the folder has another layout, or no images of this subject.
    """
    folder = Path(images).expanduser()
    if folder.is_dir():
        return _from_folder(folder, subject)
    if folder.is_absolute() or images.startswith((".", "~")):
        raise ValueError(f"images = {images!r}: there is no such folder.")
    return _from_hub(images, subject)


def _from_folder(folder: Path, subject: str) -> list[Image]:
    from PIL import Image, ImageOps

    root = folder / "dataset" if (folder / "dataset").is_dir() else folder
    own = root / subject
    if not own.is_dir():
        there = sorted(each.name for each in root.iterdir() if each.is_dir())
        has = f"folders there: {', '.join(there[:40])}" if there else "there are no folders in it"
        raise ValueError(
            f"{root} has no folder {subject!r}{did_you_mean(subject, there)} Wanted is {root}/{subject}/*.jpg; {has}."
        )
    paths = sorted(path for path in own.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{own} holds no images ({', '.join(SUFFIXES)}).")
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(ImageOps.exif_transpose(image).convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image ({error}). Remove it, or download it again.") from None
    return found


def _from_hub(name: str, subject: str) -> list[Image]:
    from datasets import load_dataset

    rows = load_dataset(name, subject, split="train")
    if "image" not in rows.column_names:
        raise ValueError(f"{name} ({subject}) has the columns {', '.join(rows.column_names)}; wanted is `image`.")
    return [row["image"].convert("RGB") for row in rows]
