"""A base on disk: its tensors are streamed from the checkpoint, and the network is loaded only if it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xadapt.blueprint import read_blueprint
from xadapt.checkpoint import Checkpoint
from xadapt.dequantise import QuantisedCheckpoint
from xadapt.naming import Naming, name_tensors, nearest


class CheckpointBase:
    """A folder with config.json and safetensors, as transformers or diffusers save it. `open_base` opens one."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        name: str | None = None,
        variant: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.folder, self.config = folder, config
        self.name = name or str(folder)
        self.revision = _revision(folder)
        self._blueprint = read_blueprint(folder, config)
        self.library = self._blueprint.library
        self.checkpoint = Checkpoint.open(folder, variant=variant, allow_pickle=allow_pickle)
        self._variant, self._allow_pickle = variant, allow_pickle
        self._loaded: tuple[tuple[Any, Any], nn.Module] | None = None
        quantisation = config.get("quantization_config")
        self._quantised = QuantisedCheckpoint(self.checkpoint, quantisation) if isinstance(quantisation, dict) else None

    def weights(self) -> Mapping[str, Tensor]:
        """The tensors by the names that the live model's state dict has for them. Each is read when it is looked up."""
        return StoredWeights(self.name, self.checkpoint, self._naming, self._quantised)

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls a tensor of the live model.

        Raises:
            ValueError: it has no such tensor, or has it in several parts: quantised.
        """
        stored = StoredWeights(self.name, self.checkpoint, self._naming, self._quantised).stored(name)
        if stored not in self.checkpoint:
            raise ValueError(f"{name!r} is quantised and lies in several tensors of {self.name}; weights() joins them.")
        return stored

    def tied(self, name: str) -> tuple[str, ...]:
        """The other names of the same tensor in the live model.

        Where the checkpoint stores both and they differ, transformers does not tie them, whatever the config says.
        """
        stored = self._naming.stored
        return tuple(
            other
            for other in self._naming.tied.get(name, ())
            if name not in stored
            or stored[name] == stored[other]
            or torch.equal(self.weights()[name], self.weights()[other])
        )

    def skeleton(self) -> nn.Module:
        """The network without data, on the meta device: a fresh one on every call, in eval mode."""
        return self._blueprint.build()

    def modules(self) -> Mapping[str, nn.Module]:
        """Every module of the skeleton by its path. Shared between calls: for looking at, not for changing."""
        return dict(self._pristine.named_modules())

    def module(self, *, device_map: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The live network, loaded by its library at the first call. Other options load it anew."""
        options = (device_map, dtype)
        if self._loaded is None or self._loaded[0] != options:
            self._loaded = (options, self._load(device_map, dtype))
        return self._loaded[1]

    def _load(self, device_map: Any, dtype: torch.dtype | None) -> nn.Module:
        pickled = self.checkpoint.shards[0].suffix != ".safetensors"
        options = {"local_files_only": True, "use_safetensors": not pickled}
        named = {"device_map": device_map, "variant": self._variant}
        named["torch_dtype" if self.library == "diffusers" else "dtype"] = dtype
        options |= {key: value for key, value in named.items() if value is not None}
        module: nn.Module = self._blueprint.cls.from_pretrained(self.folder, **options)
        return module.eval()

    @cached_property
    def _pristine(self) -> nn.Module:
        return self.skeleton()

    @cached_property
    def _naming(self) -> Naming:
        stored = self._quantised.names if self._quantised else self.checkpoint
        return name_tensors(self._pristine, self.library, stored, sharded=self.checkpoint.index is not None)


class StoredWeights(Mapping[str, Tensor]):
    """A checkpoint's tensors by their names in the live model. What has no one tensor on disk is absent."""

    def __init__(
        self, source: str, checkpoint: Checkpoint, naming: Naming, quantised: QuantisedCheckpoint | None
    ) -> None:
        self._source, self._checkpoint, self._naming, self._quantised = source, checkpoint, naming, quantised

    def __getitem__(self, name: str) -> Tensor:
        key = self.stored(name)
        shape = self._naming.shapes[name]
        if key in self._checkpoint and (self._quantised is None or not self._quantised.is_quantised(key)):
            self._check_shape(name, self._checkpoint.entries[key].shape, shape)
            return self._checkpoint[key]
        assert self._quantised is not None
        tensor = self._quantised.weight(key)
        self._check_shape(name, tuple(tensor.shape), shape)
        return tensor

    def stored(self, name: str) -> str:
        """The tensor's name in the checkpoint, or a ValueError that says why it has none."""
        key = self._naming.stored.get(name)
        if key is None:
            raise ValueError(self._why_absent(name))
        return key

    def _why_absent(self, name: str) -> str:
        naming = self._naming
        if name not in naming.shapes:
            return f"{self._source} has no tensor {name!r}. {nearest(name, naming.shapes)}"
        if naming.is_converted(name):
            return (
                f"{name!r} is not in {self._source} as it is: transformers makes it of other tensors while it loads the "
                "model (a WeightConverter merges or splits them). Load it with module() and pass the live model."
            )
        if name in naming.tied:
            return f"{name!r} is tied to {', '.join(naming.tied[name])}, and none of them is in {self._source}."
        if self._quantised is not None:
            return (
                f"{name!r} is not in {self._source} as one tensor; the checkpoint is quantised by {self._quantised.scheme}. "
                "Load it with module() and pass the live model, or use the checkpoint before quantisation."
            )
        return (
            f"{name!r} is not in {self._source}: loading the model would fill it at random. "
            "Is the checkpoint whole, and config.json its own?"
        )

    def _check_shape(self, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if stored != wanted:
            raise ValueError(
                f"{name!r} has the shape {stored} in {self._source}, but its config.json describes {wanted}; "
                "one of the two files is another model's."
            )

    def __contains__(self, name: object) -> bool:
        return name in self._naming.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._naming.stored)

    def __len__(self) -> int:
        return len(self._naming.stored)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is get)


def _revision(folder: Path) -> str | None:
    """The commit, where the folder lies in the Hub's cache: …/snapshots/<commit>/…"""
    match = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", folder.absolute().as_posix())
    return match[1] if match else None
