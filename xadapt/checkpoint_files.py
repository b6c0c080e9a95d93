"""Which files of a folder hold a model's tensors: one file or shards with an index, by the names the Hub's libraries use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from xadapt.errors import some
from xadapt.strict_json import read_object

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_STEMS = {".safetensors": ("model", "diffusion_pytorch_model"), ".bin": ("pytorch_model", "diffusion_pytorch_model")}
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class CheckpointFiles:
    shards: tuple[Path, ...]
    index: Path | None = None
    weight_map: dict[str, Path] | None = None  # which shard has a tensor, by the index

    @property
    def pickled(self) -> bool:
        return self.shards[0].suffix in PICKLES


def find_files(path: Path, *, variant: str | None = None, allow_pickle: bool = False) -> CheckpointFiles:
    """Chooses what transformers and diffusers would: safetensors before pickles, and no variant that was not asked for.

    Raises:
        ValueError: there is nothing to read, or no telling what to read; the message lists what there is.
    """
    try:
        return _from_folder(path, variant, allow_pickle) if path.is_dir() else _from_file(path, variant, allow_pickle)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error


def _from_file(path: Path, variant: str | None, allow_pickle: bool) -> CheckpointFiles:
    if not path.is_file():
        raise ValueError(f"{path} is not there; a checkpoint is a folder or a .safetensors file.")
    if variant is not None:
        raise ValueError(f"{path} is one file, so there is no variant {variant!r} to choose; leave variant out.")
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise _pickles_only(path, [path.name])
    elif path.suffix != ".safetensors":
        raise ValueError(f"{path} is no checkpoint; it should end in .safetensors.")
    return CheckpointFiles((path,))


def _from_folder(folder: Path, variant: str | None, allow_pickle: bool) -> CheckpointFiles:
    names = sorted(entry.name for entry in folder.iterdir())
    suffixes = [".safetensors", ".bin"] if allow_pickle else [".safetensors"]
    for suffix in suffixes:
        if chosen := _choose(folder, names, suffix, variant):
            return _from_index(chosen) if chosen.suffix == ".json" else CheckpointFiles((chosen,))
    raise _nothing(folder, names, variant, suffixes)


def _choose(folder: Path, names: list[str], suffix: str, variant: str | None) -> Path | None:
    """The file, or the index of shards, that holds the asked-for variant."""
    dotted = f".{variant}" if variant is not None else ""
    found = {}
    for stem in _STEMS[suffix]:
        whole, index = f"{stem}{dotted}{suffix}", f"{stem}{suffix}.index{dotted}.json"
        order = (index, whole) if stem == "diffusion_pytorch_model" else (whole, index)  # as their libraries prefer
        present = [name for name in order if name in names]
        if present:
            found[stem] = folder / present[0]
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds two models, {' and '.join(path.name for path in found.values())}; name the one you mean: "
            f"{folder / next(iter(found.values())).name}."
        )
    return next(iter(found.values()), None)


def _nothing(folder: Path, names: list[str], variant: str | None, suffixes: list[str]) -> ValueError:
    """What to say of a folder in which nothing was chosen."""
    offers = [offer for suffix in suffixes for offer in _variants(names, suffix)]
    if offers:
        there = some(sorted({f"variant={offer!r}" if offer else "one without variant=" for offer in offers}))
        return ValueError(f"{folder} has no tensors for variant={variant!r}; there is {there}.")
    tensors = [name for name in names if name.endswith(".safetensors")]
    if any(_SHARD.search(name) for name in tensors):
        return ValueError(f"{folder} holds shards ({some(tensors)}) but no index of them; download or save it again.")
    if tensors:
        return ValueError(
            f"{folder} holds no model.safetensors or diffusion_pytorch_model.safetensors, but {some(tensors)}; "
            f"name the file: {folder / tensors[0]}."
        )
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles and ".bin" not in suffixes:
        return _pickles_only(folder, pickles)
    if pickles:
        return ValueError(f"{folder} holds none of the usual names, but {some(pickles)}; name the file.")
    return ValueError(f"{folder} holds no checkpoint; it holds {some(names) or 'nothing'}.")


def _variants(names: list[str], suffix: str) -> set[str]:
    """The variants there are; "" is the plain one."""
    stems = "|".join(_STEMS[suffix])
    pattern = re.compile(
        rf"(?:{stems})(?:\.(?P<whole>.+))?{re.escape(suffix)}"
        rf"|(?:{stems}){re.escape(suffix)}\.index(?:\.(?P<sharded>.+))?\.json"
    )
    matches = (pattern.fullmatch(name) for name in names if not _SHARD.search(name))
    return {match["whole"] or match["sharded"] or "" for match in matches if match}


def _pickles_only(path: Path, pickles: list[str]) -> ValueError:
    return ValueError(
        f"{path} holds its tensors as a pickle only ({some(pickles)}), which can run code when read carelessly. "
        "If you trust it, pass allow_pickle=True (it is read with weights_only=True)."
    )


def _from_index(index: Path) -> CheckpointFiles:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map (tensor name → file); download or save it again.")
    suffix = ".bin" if ".bin.index." in index.name else ".safetensors"
    strays = [name for name in weight_map.values() if not isinstance(name, str)]
    if strays:
        raise ValueError(f"{index} gives {strays[0]!r} as the name of a shard; download or save it again.")
    files = {name: index.parent / _inside(index, name, suffix) for name in dict.fromkeys(weight_map.values())}
    absent = sorted(name for name, path in files.items() if not path.is_file())
    if absent:
        raise ValueError(
            f"{index} names shards that are not there: {some(absent)}. The download or the copy is incomplete."
        )
    shards = tuple(sorted(set(files.values())))
    return CheckpointFiles(shards, index, {tensor: files[name] for tensor, name in weight_map.items()})


def _inside(index: Path, name: str, suffix: str) -> str:
    """A shard's name that stays in the index's folder, on any system. Where a link there points is its owner's affair."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.anchor or ".." in windows.parts or "\0" in name:
        raise ValueError(f"{index} names the shard {name!r}, which leaves its folder; such an index is not followed.")
    if posix.suffix != suffix:
        raise ValueError(f"{index} names the shard {name!r}; its shards should end in {suffix}.")
    return str(posix)
