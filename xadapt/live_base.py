"""A base that is loaded already: any nn.Module, quantised and offloaded ones included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from xadapt.dequantise import backend_of, base_weight
from xadapt.naming import named_tensors, nearest, tied_names
from xadapt.rehearsal import without_data


class LiveBase:
    """A live module, seen as a base. The module is only looked at."""

    revision: str | None = None

    def __init__(self, module: nn.Module) -> None:
        if isinstance(module, PeftModel):
            raise ValueError(
                "A PeftModel is a base with adapters in it; pass the base before they were attached, or model.unload()."
            )
        self._module = module
        config: Any = getattr(module, "config", None)
        told = config.to_dict() if hasattr(config, "to_dict") else config
        self.config: Mapping[str, Any] = dict(told) if isinstance(told, Mapping) else {}
        self.library = _library(module)
        path = getattr(config, "_name_or_path", None) or self.config.get("_name_or_path")
        self.name = f"the live {type(module).__name__}" + (f" ({path})" if path else "")

    def weights(self) -> Mapping[str, Tensor]:
        """The module's tensors by their state-dict names; those of quantised layers are de-quantised one at a time."""
        return LiveWeights(self._module, self.name)

    def tied(self, name: str) -> tuple[str, ...]:
        """The other names of the same tensor."""
        return self._tied.get(name, ())

    def skeleton(self) -> nn.Module:
        """The same tree of modules without data: a fresh one on every call, in eval mode."""
        skeleton = without_data(self._module)
        if skeleton is None:
            raise ValueError(
                f"{self.name} cannot be copied (copy.deepcopy fails); pass its checkpoint's folder instead."
            )
        return skeleton.eval()

    def modules(self) -> Mapping[str, nn.Module]:
        """Every module by its path: for looking at, not for changing."""
        return dict(self._module.named_modules())

    def module(self, *, device_map: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The module itself."""
        if device_map is not None or dtype is not None:
            raise ValueError(f"{self.name} is loaded already; move it with .to(…), and leave device_map and dtype out.")
        return self._module

    @cached_property
    def _tied(self) -> dict[str, tuple[str, ...]]:
        return tied_names(self._module)


class LiveWeights(Mapping[str, Tensor]):
    """A module's tensors by their state-dict names. Nothing is copied but what is quantised or offloaded."""

    def __init__(self, module: nn.Module, source: str) -> None:
        self._module, self._source = module, source
        quantised = {path: backend for path, layer in module.named_modules() if (backend := backend_of(layer))}
        self._backends = {f"{path}.weight" if path else "weight": backend for path, backend in quantised.items()}
        names = [
            name
            for name, _ in named_tensors(module)
            if name.rpartition(".")[0] not in quantised or name.rpartition(".")[2] in ("weight", "bias")
        ]
        self._names = dict.fromkeys((*names, *self._backends))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise ValueError(f"{self._source} has no tensor {name!r}. {nearest(name, self._names)}")
        path, _, attribute = name.rpartition(".")
        owner = self._module.get_submodule(path)
        with _onloaded(owner):
            if backend := self._backends.get(name):
                return base_weight(owner, backend, name)
            tensor: Tensor = getattr(owner, attribute).detach()
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} of {self._source} is on the meta device: it was never loaded. "
                "Load the model with from_pretrained, or pass its checkpoint's folder."
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is get)


def _onloaded(layer: nn.Module) -> AbstractContextManager[Any]:
    """The layer's data in memory, where accelerate has put it on the disk or on another device."""
    hook = getattr(layer, "_hf_hook", None)
    if not getattr(hook, "offload", False):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(layer, execution_device="cpu")  # type: ignore[no-any-return]  # accelerate is untyped


def _library(module: nn.Module) -> str:
    roots = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    return next((library for library in ("transformers", "diffusers") if library in roots), "torch")
