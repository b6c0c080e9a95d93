"""Merge: a checkpoint with an adapter folded into its weights, written file by file without loading the model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xadapt.base import CheckpointBase
from xadapt.carried_along import saved_modules
from xadapt.contract import Adapter
from xadapt.errors import some
from xadapt.folding import Layer, layers_of
from xadapt.matrix import Dense
from xadapt.merge_files import FilePlan, WorkFolder, plan_files
from xadapt.merge_shard import Change, Summand, bytes_of, write_shard
from xadapt.opening import check_choices, open_for, pipeline_of
from xadapt.sources import AdapterSource, adapters_from, is_path, listed
from xadapt.update import stores_transpose
from xadapt.version import __version__


@dataclass(frozen=True)
class MergePlan:
    """What a merge reads and writes. Nothing has been read but headers."""

    base: str
    out: Path
    layers: tuple[str, ...]
    """The layers that change, by module path."""
    files: tuple[FilePlan, ...]

    @property
    def bytes_changed(self) -> int:
        return sum(file.bytes_changed for file in self.files)

    @property
    def bytes_written(self) -> int:
        return sum(file.size for file in self.files if file.action != "left out")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "base": self.base,
            "out": str(self.out),
            "layers": list(self.layers),
            "files": [{**asdict(file), "path": str(file.path)} for file in self.files],
            "bytes_changed": self.bytes_changed,
            "bytes_written": self.bytes_written,
        }


@dataclass(frozen=True)
class _Merge:
    """A merge that is known to fit."""

    plan: MergePlan
    base: CheckpointBase
    root: Path
    changes: tuple[Change, ...]
    state: str
    """Of the base's files, at the time at which they were looked at."""
    key: str


def merge(
    adapter: AdapterSource | Sequence[AdapterSource],
    base: Any,
    out: str | PathLike[str],
    *,
    component: str | None = None,
    weights: Sequence[float] | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    progress: bool = False,
) -> MergePlan:
    """Writes the base's checkpoint with the adapter in its weights: the same files, shards, names and dtypes.

    Only the adapted layers are calculated, each in float32 with one rounding at the end; all other bytes are copied, and
    whether they hold NaN is not asked. Memory is a few strips of rows per thread for LoRAs, in any space. What PEFT has to
    merge itself (DoRA, LoHa, OFT …) is made one layer at a time, whatever the number of threads, and takes about 25 times
    the largest adapted tensor of a bfloat16 base.

    The result appears under `out` when it is whole, and not before. After a kill the next call with the same arguments
    goes on where the last finished shard ends; any other end leaves nothing.

        xadapt.merge("my-adapter/", "llama-instruct/", "llama-instruct-mine/")

    Args:
        adapter: a PEFT folder, a LoRA file, a PeftModel, or several of these, of any PEFT type that its file tells
            whole; the types that take something out of the base's weights when they begin are refused.
        base: a checkpoint's folder, a pipeline's folder with `component`, or a hub id. A pipeline is written whole.
        out: a folder that does not exist yet.
        component: which part the adapter is for, of a pipeline and of a LoRA file that holds several.
        weights: how each of several adapters counts; 1 by default.
        variant: "fp16" merges into the files with that in their names; weights of other variants stay behind.
        allow_pickle: also read an adapter from .bin and .pt files. Only tensors are unpickled.

    Returns:
        What was written.

    Raises:
        ValueError: the adapter does not fit, the base is quantised or not safetensors, a tied weight would change for all
            that share it, a merged tensor would hold NaN or infinity, or `out` exists.
        OSError: there is no room or no permission. Nothing is left.
    """
    prepared = _prepare(adapter, base, Path(out), component, weights, variant, allow_pickle)
    with WorkFolder(Path(out), prepared.key) as work:
        for file in prepared.plan.files:
            if file.action == "merge":
                source = prepared.root / file.path
                with work.unfinished(file.path) as part:
                    if part is not None:
                        write_shard(prepared.base.checkpoint, source, part, prepared.changes, progress)
            elif file.action == "copy":
                work.copy(prepared.root / file.path, file.path)
        if _state(prepared.root, prepared.plan.files) != prepared.state:
            raise ValueError(f"Files of {prepared.base.name} have changed while they were merged; nothing was written.")
        work.finish()
    return prepared.plan


def plan_merge(
    adapter: AdapterSource | Sequence[AdapterSource],
    base: Any,
    out: str | PathLike[str],
    *,
    component: str | None = None,
    weights: Sequence[float] | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> MergePlan:
    """What `merge` would read and write. Reads the adapter and the base's headers, writes nothing. Arguments as there."""
    return _prepare(adapter, base, Path(out), component, weights, variant, allow_pickle).plan


def _prepare(
    adapter: AdapterSource | Sequence[AdapterSource],
    base: Any,
    out: Path,
    component: str | None,
    weights: Sequence[float] | None,
    variant: str | None,
    allow_pickle: bool,
) -> _Merge:
    check_choices(component, variant, listed(adapter), [base])
    opened = open_for(base, component, allow_pickle, variant)
    if not isinstance(opened, CheckpointBase):
        raise ValueError(
            f"merge() writes a checkpoint, and {opened.name} is in memory: xadapt.load(model, adapter) and "
            "merge_and_unload() merge there; or pass the folder that it was loaded from."
        )
    _check_mergeable(opened)
    if os.path.lexists(out):  # a link to nothing too
        raise ValueError(f"{out} exists already; choose a new folder for the merged checkpoint.")
    adapters = adapters_from(adapter, component, allow_pickle)
    layers = layers_of(adapters, opened, weights)
    for layer in layers:
        layer.rehearse()
    changes = (*_layer_changes(layers, opened), *_replacements(adapters, opened, weights))
    root = _root(base, opened, component)
    if root.resolve() in out.resolve().parents:
        raise ValueError(f"{out} lies in the base itself, {root}; choose a folder beside it.")
    files = plan_files(root, opened, changes)
    plan = MergePlan(opened.name, out, tuple(layer.path for layer in layers), files)
    state = _state(root, files)
    return _Merge(plan, opened, root, changes, state, _key(adapters, weights, state))


def _root(base: Any, opened: CheckpointBase, component: str | None) -> Path:
    """The folder that is written: the pipeline's where a component of one was asked for, or else the base's own."""
    is_itself = is_path(base) and Path(base) == opened.folder
    if component is None or is_itself or pipeline_of(opened) is None:
        return opened.folder
    return opened.folder.parent


def _check_mergeable(base: CheckpointBase) -> None:
    if base.config.get("quantization_config"):
        raise ValueError(
            f"{base.name} is quantised; a merge would round every adapted weight again. Merge into the checkpoint before "
            "quantisation and quantise the result, or export a LoRA: xadapt export."
        )
    pickled = [shard.name for shard in base.checkpoint.shards if shard.suffix != ".safetensors"]
    if pickled:
        raise ValueError(
            f"{base.name} is a pickle ({some(pickled)}); save it as safetensors first: from_pretrained, then save_pretrained."
        )


def _layer_changes(layers: Sequence[Layer], base: CheckpointBase) -> list[Change]:
    weights, changes = base.weights(), []
    for layer in layers:
        tied = base.tied(layer.weight_name)
        if tied:
            raise ValueError(
                f"{layer.weight_name} and {some(list(tied))} are one tensor in {base.name}: merging into it would change all of "
                "them, and the adapter is for one. Untie them first (tie_word_embeddings=False, save_pretrained), or "
                "export a LoRA: xadapt export."
            )
        weight, bias = base.stored_name(layer.weight_name), layer.bias_name and base.stored_name(layer.bias_name)
        names = (weight,) if bias is None else (weight, bias)
        changes.append(Change(names, partial(_summands, layer, weights, weight, bias), layer.is_large))
    return changes


def _summands(layer: Layer, weights: Mapping[str, Tensor], weight: str, bias: str | None) -> dict[str, Summand]:
    """What is added to the tensors of one layer, in the layout in which they are stored."""
    update = layer.update(weights)
    summands: dict[str, Summand] = {
        weight: update.matrix.transposed if stores_transpose(layer.module) else update.matrix
    }
    if update.bias is not None:
        if bias is None:
            raise ValueError(
                f"{layer.path} has no bias, and the adapter adds a constant to its output (lora_bias=True): the checkpoint has "
                "no place for it. Run the adapter unmerged, or train with lora_bias=False."
            )
        summands[bias] = Dense(update.bias[:, None])
    return summands


def _replacements(adapters: Sequence[Adapter], base: CheckpointBase, weights: Sequence[float] | None) -> list[Change]:
    """Modules that an adapter brings along whole (modules_to_save)."""
    changes = []
    for adapter in adapters:
        for name, tensor in saved_modules(adapter).items():
            if len(adapters) > 1:
                raise ValueError(f"One of several adapters brings {name} along whole: that cannot be added up.")
            if weights is not None and weights[0] != 1:
                raise ValueError(
                    f"The adapter brings {name} along whole (modules_to_save), which takes the place of the base's and cannot "
                    f"count weights=[{weights[0]}]: leave weights out."
                )
            _check_tied_replacement(name, saved_modules(adapter), base)
            stored = base.stored_name(name)
            shape = base.checkpoint.entries[stored].shape
            if tuple(tensor.shape) != shape:
                raise ValueError(f"The adapter brings {name} along as {tuple(tensor.shape)}; {base.name} has {shape}.")
            changes.append(Change((stored,), partial(_replacement, stored, tensor)))
    return changes


def _check_tied_replacement(name: str, saved: Mapping[str, Tensor], base: CheckpointBase) -> None:
    others = [other for other in base.tied(name) if other not in saved or not torch.equal(saved[other], saved[name])]
    if others:
        raise ValueError(
            f"The adapter brings {name} along whole, and it is one tensor with {some(others)} in {base.name}, which would "
            "change too. Untie them first (tie_word_embeddings=False, save_pretrained)."
        )


def _replacement(name: str, tensor: Tensor) -> dict[str, Summand]:
    return {name: tensor}


def _state(root: Path, files: Sequence[FilePlan]) -> str:
    """Which files these are and what becomes of them, as far as can be told without reading them."""
    lines = []
    for file in files:
        path = root / file.path
        try:
            stat = path.stat()
        except OSError as error:
            raise ValueError(f"{path} cannot be read any more ({error}); has the base changed?") from error
        lines.append(f"{path.resolve()} {file.action} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}")
    return "\n".join(lines)


def _key(adapters: Sequence[Adapter], weights: Sequence[float] | None, state: str) -> str:
    """What tells this merge from another one: everything that the result depends on. The same in every process."""
    digest = hashlib.sha256(f"{__version__} {weights and [float(weight) for weight in weights]}\n{state}".encode())
    for adapter in adapters:
        digest.update(json.dumps(adapter.config.to_dict(), sort_keys=True, default=_in_order).encode())
        for name, tensor in sorted(adapter.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor.contiguous()))
    return digest.hexdigest()


def _in_order(value: object) -> Any:
    """Sets have another order in every process."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else repr(value)
