"""The plain weight of a quantised layer, by PEFT's own routine for it; and quantised weights taken from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from xadapt.checkpoint import Checkpoint
from xadapt.peft_internals import QuantizationBackend, resolve_quantization_backend


def backend_of(layer: nn.Module) -> QuantizationBackend | None:
    """PEFT's backend for a quantised layer, or None for a plain one."""
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=_no_way_back)


def base_weight(layer: nn.Module, backend: QuantizationBackend, name: str) -> Tensor:
    """The layer's weight as plain floats. `name` is what messages call it."""
    try:
        with torch.no_grad():
            return backend.get_base_weight(layer).detach()
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{name} is quantised by {backend.backend_name}, which PEFT cannot de-quantise ({error}); "
            "use a checkpoint that is not quantised, or is quantised by torchao or bitsandbytes."
        ) from error


def _no_way_back() -> Any:
    raise AssertionError("PEFT asks for this only to quantise a weight again, which never happens here")


class QuantisedCheckpoint:
    """The weights of a quantised checkpoint under the names they had before each was split in several tensors.

    Knows torchao's layout and transformers' fp8. What another scheme quantised is refused at the look-up; what it left alone is read.
    """

    def __init__(self, checkpoint: Checkpoint, quantisation: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        method = quantisation.get("quant_method", "an unnamed scheme")
        bits = next((n for n in (4, 8) if quantisation.get(f"load_in_{n}bit")), None)
        self.scheme = f"{method} ({bits} bits)" if bits else str(method)
        self._descriptions = _torchao_descriptions(checkpoint) if method == "torchao" else {}
        self._parts = {name: _parts(name, told) for name, told in self._descriptions.items()}
        self.names = tuple(
            dict.fromkeys((*self._parts, *(checkpoint.keys() - {p for parts in self._parts.values() for p in parts})))
        )

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is no plain one: torchao says so, others are known by dtypes short of 16 bits."""
        if name in self._parts:
            return True
        dtype = self._checkpoint.entries[name].dtype
        return dtype != torch.bool and (dtype.itemsize < 2 or not (dtype.is_floating_point or dtype == torch.int64))

    def weight(self, name: str) -> Tensor:
        """One weight, de-quantised if it has to be. Reads the tensors of that weight only."""
        if not self.is_quantised(name):
            return self._checkpoint[name]
        if name in self._parts:
            return self._from_torchao(name)
        if self.scheme == "fp8" and f"{name}_scale_inv" in self._checkpoint:
            return self._from_fp8(name)
        raise ValueError(
            f"{name!r} is quantised by {self.scheme}, which is not read from disk (torchao's safetensors and fp8 in blocks "
            "are). Load the model with module() and pass the live model, or use the checkpoint before quantisation."
        )

    def _from_torchao(self, name: str) -> Tensor:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        told = self._descriptions[name]
        try:
            parts = {part: self._checkpoint[part] for part in self._parts[name]}
            weights, _ = unflatten_tensor_state_dict(
                parts, {"tensor_names": json.dumps([name]), name: json.dumps(told)}
            )
            layer = nn.Module()
            layer.weight = nn.Parameter(weights[name], requires_grad=False)
        except Exception as error:  # torchao trusts what it reads
            raise ValueError(f"{name!r} is not stored as torchao would ({type(error).__name__}: {error}).") from error
        backend = backend_of(layer)
        if backend is None:
            raise ValueError(f"{name!r} is a {told['_type']} of torchao, which this PEFT does not know.")
        return base_weight(layer, backend, name)

    def _from_fp8(self, name: str) -> Tensor:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        to_floats: Any = Fp8Dequantize  # has no types
        stored = {"weight": [self._checkpoint[name]], "weight_scale_inv": [self._checkpoint[f"{name}_scale_inv"]]}
        try:
            (weight,) = to_floats(None).convert(stored).values()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name!r} does not fit its scales in {name}_scale_inv ({error}).") from error
        except KeyError:
            weight = None
        if not isinstance(
            weight, Tensor
        ):  # before 5.20, transformers wants the parts under other names and hands back a list
            raise ValueError(
                f"{name!r} is fp8 in blocks, which this version of transformers does not de-quantise one by one: "
                "pip install -U transformers."
            )
        return weight


def _torchao_descriptions(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """What torchao wrote into the headers about each weight that it quantised."""
    if find_spec("torchao") is None:
        raise ValueError("The checkpoint is quantised by torchao, which is not installed: pip install torchao.")
    described: dict[str, dict[str, Any]] = {}
    for shard in checkpoint.shards:
        for name, text in checkpoint.metadata(shard).items():
            if "." not in name:
                continue
            try:
                told = json.loads(text)
            except (ValueError, RecursionError):  # metadata are free-form: not torchao's
                continue
            if isinstance(told, dict) and isinstance(told.get("_tensor_data_names"), list):
                described[name] = told
    absent = [part for name, told in described.items() for part in _parts(name, told) if part not in checkpoint]
    if absent:
        raise ValueError(
            f"The checkpoint lacks {absent[0]!r}, a part of a quantised weight; download or save it again."
        )
    return described


def _parts(name: str, told: Mapping[str, Any]) -> list[str]:
    module, _, parameter = name.rpartition(".")
    return [f"{module}._{parameter}_{part}" for part in told["_tensor_data_names"]]
