"""A user's images, encoded once and kept on disk, as batches."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from torch import nn

from xadapt.contract import Base
from xadapt.errors import some
from xadapt.files import save_tensors

from .bars import bar
from .conditions import Flat, View, family_of, nested
from .draws import seed_of
from .dropping import EMPTY_TEXT
from .encoding import ImageEncoder, PipelineEncoder, centre, own_pipeline
from .examples import Example, decoded, examples_of
from .source import IPAdapterSource
from .stream import Numbered
from .targets import unwrapped

if TYPE_CHECKING:
    from .methods import TrainA4A

_log = logging.getLogger("xadapt")
_AT_ONCE = 8  # images that are encoded together
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises for damaged files


def batches_from(options: TrainA4A, data: Any, target: Base) -> Iterable[Any]:
    """What `TrainA4A.batches` returns."""
    examples = examples_of(data, options.image_column, options.caption_column)
    if examples is not None:
        return Encodable(replace(options, pipeline=options.pipeline or own_pipeline(target)), examples)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data= is a folder of images with captions, .tar shards, a `datasets` dataset, or an iterable of batches; got "
            f"{type(data).__name__}."
        )
    return data


class Encodable:
    """Images and captions that become batches as soon as the IP-Adapter is known, which says how images are embedded."""

    def __init__(self, options: TrainA4A, examples: Iterable[Example]) -> None:
        if options.batch_size < 1:
            raise ValueError(f"batch_size={options.batch_size}: a batch has at least one sample.")
        for name, what in (("pipeline", "the target's pipeline"), ("image_encoder", "the IP-Adapter's image encoder")):
            if not getattr(options, name):
                raise ValueError(f"Images have to be encoded: name the folder or id of {what}, {name}='…'.")
        self._options, self._examples = options, examples

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("These images are not encoded yet. Pass this to TrainA4A.fit, which knows the IP-Adapter.")

    def encoded(self, source: IPAdapterSource, target: nn.Module, accelerator: Accelerator) -> CachedBatches:
        """The batches. Each process encodes its share of what is not on disk already.

        Raises:
            ValueError: no image can be read, or the encoders are not those of the target and the IP-Adapter.
        """
        options = self._options
        if accelerator.num_processes > 1 and not options.cache:
            raise ValueError("Several processes share what is encoded through a folder: name one, cache='…'.")
        images, pipeline = ImageEncoder(options.image_encoder, source), PipelineEncoder(options.pipeline, target)
        size = options.resolution or pipeline.resolution
        pipeline.check_resolution(size)
        cache = Cache(options.cache, f"{images.fingerprint()} {pipeline.fingerprint()} {source.kind.pooled} {size}")
        for encoder in (images, pipeline):
            encoder.to(accelerator.device)
        encoding = _Encoding(cache, images, pipeline, size)
        keys = encoding.run(self._examples, accelerator)
        if accelerator.is_main_process and "empty" not in cache:
            texts = {f"{EMPTY_TEXT}.{name}": one for name, one in pipeline.empty().items()}
            cache.write("empty", {**images.empty(), **texts})
        accelerator.wait_for_everyone()
        skipped = gather_object(encoding.skipped)
        keys = [key for key in keys if key in cache]  # another process may have failed at one
        if skipped and accelerator.is_main_process:
            _tell(skipped, len(keys), cache)
        if not keys:
            raise ValueError(f"None of the images can be read: {some([f'{n} ({why})' for n, why in skipped])}.")
        return CachedBatches(cache, keys, options.batch_size, unwrapped(target), skipped)


class Cache:
    """Encoded samples by key, each in a safetensors file of its own that is whole or not there.

    Args:
        folder: where it lies; "" is a temporary folder that goes with this object.
        settings: everything the encoded numbers depend on beside the sample itself.
    """

    def __init__(self, folder: str, settings: str) -> None:
        self.folder = Path(folder or tempfile.mkdtemp(prefix="xadapt-a4a-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lasts = bool(folder)
        if not folder:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._settings = settings

    def key(self, content: bytes | Image.Image, caption: str) -> str:
        digest = hashlib.sha256(content if isinstance(content, bytes) else f"{content.mode} {content.size}".encode())
        if isinstance(content, Image.Image):
            digest.update(content.tobytes())
        digest.update(f"\0{caption}".encode())
        return digest.hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def write(self, key: str, tensors: Flat) -> None:
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def read(self, key: str) -> Flat:
        return load_file(self._path(key))

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(f"{key} {self._settings}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}.safetensors"


class _Encoding:
    """One pass over the examples."""

    def __init__(self, cache: Cache, images: ImageEncoder, pipeline: PipelineEncoder, size: int) -> None:
        self._cache, self._images, self._pipeline, self._size = cache, images, pipeline, size
        self._waiting: list[tuple[str, str, Image.Image, View, str]] = []
        self.skipped: list[tuple[str, str]] = []  # name and reason, of this process's share

    def run(self, examples: Iterable[Example], accelerator: Accelerator) -> list[str]:
        """The keys of all examples, in their order, those of other processes included."""
        keys: dict[str, None] = {}  # one image with one caption counts once
        total = len(examples) if isinstance(examples, Sized) else None
        with bar("Encoding", total, show=accelerator.is_main_process) as advance:
            for number, example in enumerate(examples):
                ours = number % accelerator.num_processes == accelerator.process_index
                try:
                    content = example.content()
                except _UNREADABLE as error:
                    if ours:
                        self._skip(example.name, error)
                else:
                    key = self._cache.key(content, example.caption)
                    if ours and key not in keys and key not in self._cache:
                        self._add(key, example, content)
                    keys[key] = None
                advance(f"{len(self.skipped)} skipped" if self.skipped else "")
            self._flush()
        return list(keys)

    def _add(self, key: str, example: Example, content: bytes | Image.Image) -> None:
        try:
            image = decoded(content)
            view = centre(image, self._size)
        except _UNREADABLE as error:
            self._skip(example.name, error)
            return
        self._waiting.append((key, example.name, image, view, example.caption))
        if len(self._waiting) == _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        keys, names, images, views, captions = zip(*self._waiting, strict=True)
        self._waiting = []
        encoded = {**self._images.encode(images), **self._pipeline.encode(views, captions)}
        for row, (key, name) in enumerate(zip(keys, names, strict=True)):
            sample = {part: values[row] for part, values in encoded.items()}
            broken = [part for part, values in sample.items() if not bool(torch.isfinite(values).all())]
            if broken:
                self.skipped.append((name, f"encoded to NaN in {', '.join(broken)}"))
            else:
                self._cache.write(key, sample)

    def _skip(self, name: str, error: BaseException) -> None:
        if isinstance(error, UnidentifiedImageError):
            reason = "no image"  # its own words name an object in memory
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        self.skipped.append((name, reason))


def _tell(skipped: list[tuple[str, str]], kept: int, cache: Cache) -> None:
    """A warning: with the first few and all in a file, or with all where no file would last."""
    told = [f"{name} ({reason})" for name, reason in skipped]
    names = some(told, 5 if cache.lasts else len(told))
    if cache.lasts:
        path = cache.folder / "skipped.txt"
        path.write_text("".join(f"{name}\t{reason}\n" for name, reason in skipped), encoding="utf-8")
        names += f"; all are listed in {path}"
    _log.warning("%d images cannot be read and are left out, %d are trained on: %s.", len(skipped), kept, names)


class CachedBatches:
    """Batches of what is on disk, in an order of its own for each pass. A last batch that is not full is left out.

    Args:
        skipped: name and reason of what could not be read.
    """

    def __init__(
        self, cache: Cache, keys: list[str], batch_size: int, target: Any, skipped: list[tuple[str, str]]
    ) -> None:
        self.skipped = skipped
        self.samples = len(keys)
        self._cache, self._keys = cache, keys
        self._target, self._family = target, family_of(target)
        self._size = min(batch_size, len(keys))
        self._empty = nested(cache.read("empty"))

    def numbered(self, start: int, every: int, seed: int) -> Iterator[Numbered]:
        """See `Batches`."""
        batches = len(self._keys) // self._size

        @lru_cache(maxsize=1)
        def order(number: int) -> list[int]:
            generator = torch.Generator().manual_seed(seed_of(seed, "order", number))
            places: list[int] = torch.randperm(len(self._keys), generator=generator).tolist()
            return places

        for number in count(start, every):
            epoch, index = divmod(number, batches)
            yield number, self._batch(order(epoch)[index * self._size : (index + 1) * self._size])

    def _batch(self, places: list[int]) -> dict[str, Any]:
        samples = [self._cache.read(self._keys[place]) for place in places]
        batch = nested({name: torch.stack([one[name] for one in samples]) for name in samples[0]})
        batch = self._family.complete(self._target, batch)
        return {**batch, **self._empty}
