"""From the words of a preset to a PEFT config, and from a finished adapter to either model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.dreambooth.settings import Adaptation, PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from xadapt.contract import Adapter


@dataclass(frozen=True, kw_only=True)
class Adapting:
    """What is trained on the layers: a PEFT method, in parameter or feature space."""

    method: PeftMethod
    adaptation: Adaptation
    rank: int
    alpha: float
    targets: tuple[str, ...]
    feature_rank: int = 0
    """Of hybrid adaptation (Eq. 6): how much of the rank is in feature space; 0 and all of it are the two ends."""
    hybrid_space: str = "output"

    def __post_init__(self) -> None:
        if self.adaptation in ("hybrid", "lora-x") and self.method != "lora":
            raise ValueError(
                f'{self.adaptation} adaptation is one of LoRA, not of {self.method}; set methods = ["lora"].'
            )
        if self.adaptation == "hybrid" and not 0 <= self.feature_rank <= self.rank:
            raise ValueError(f"a split of {self.feature_rank} of rank {self.rank}; give 0 to {self.rank}.")

    def config(self) -> PeftConfig:
        """The config, with the initialisation of diffusers' training scripts."""
        import xadapt

        if self.adaptation == "param":
            return self._stock()
        if self.adaptation == "hybrid":
            if self.feature_rank == 0:
                return self._stock()
            if self.feature_rank == self.rank:
                return self._in_space(self.hybrid_space)
            return xadapt.HybridAdaConfig(
                r=self.rank, feature_r=self.feature_rank, space=self.hybrid_space, **self._lora_options()
            )
        if self.adaptation == "lora-x":
            return self._lora_x()
        return self._in_space(self.adaptation)

    def _in_space(self, space: str) -> PeftConfig:
        import xadapt

        return xadapt.feature_space(self._stock(), space)

    def _stock(self) -> PeftConfig:
        from peft import LoHaConfig, LoKrConfig, LoraConfig

        if self.method == "loha":
            return LoHaConfig(r=self.rank, alpha=self.alpha, target_modules=list(self.targets))  # type: ignore[arg-type]  # annotated int, but any number works
        if self.method == "lokr":
            return LoKrConfig(r=self.rank, alpha=self.alpha, target_modules=list(self.targets))  # type: ignore[arg-type]  # likewise
        return LoraConfig(r=self.rank, use_dora=self.method == "dora", **self._lora_options())

    def _lora_options(self) -> dict[str, Any]:
        return {
            "lora_alpha": self.alpha,
            "init_lora_weights": "gaussian",
            "target_modules": list(self.targets),
        }

    def _lora_x(self) -> PeftConfig:
        try:
            from xadapt_lorax import LoraXConfig
        except ImportError:
            raise ValueError(
                "the plug-in xadapt_lorax is not installed, so LoRA-X cannot be trained. As a projection of a trained LoRA it is "
                'in xadapt_weight: transfers = ["lora_x"].'
            ) from None
        return LoraXConfig(r=self.rank, target_modules=list(self.targets))


LORAX = "lorax"
"""The transfer of adapters that were trained as LoRA-X: on another base, their plain copy may have the wrong signs."""


@contextmanager
def on_base(base: nn.Module, folder: Path) -> Iterator[None]:
    """The adapter of a folder in place on the base, which is then left as it was."""
    import xadapt

    device = next(base.parameters()).device
    with _expecting_another_base():  # offloaded weights are on no device until they are needed
        model = xadapt.load(base, folder, torch_device="cpu" if device.type == "meta" else device)
    try:
        model.eval()
        yield
    finally:
        model.unload()


@contextmanager
def carried(base: nn.Module, source: nn.Module, folder: Path, method: str) -> Iterator[dict[str, Any]]:
    """The adapter of a folder, carried from `source` to `base` by a transfer method and in place there.

    Yields what was measured on the way: mean relative error of the layers, and how many were left out.
    """
    import xadapt
    from xadapt.contract import Transfer
    from xadapt.live_base import LiveBase
    from xadapt.registry import get
    from xadapt.siblings import Pair

    step = get(method).build()
    if not isinstance(step, Transfer):
        raise ValueError(f"{method} has to be fitted on data; name a transfer by weights alone here (xadapt methods).")
    found = step.transfer(xadapt.read_adapter(folder), Pair(LiveBase(source), LiveBase(base)))
    errors = [float(each["error"]) for each in found.evidence.values() if "error" in each]
    model = _attach(base, found.adapter)
    try:
        yield {"error": sum(errors) / len(errors) if errors else None, "left_out": len(found.left_out)}
    finally:
        model.unload()


@contextmanager
def _expecting_another_base() -> Iterator[None]:
    """Without the note that the base is another one: here that is the question."""

    def unsurprising(record: logging.LogRecord) -> bool:
        return "was trained on" not in record.msg

    log = logging.getLogger("xadapt")
    log.addFilter(unsurprising)
    try:
        yield
    finally:
        log.removeFilter(unsurprising)


def _attach(base: nn.Module, adapter: Adapter) -> Any:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    with warnings.catch_warnings():
        # pinv_output holds a constant where the layer has no bias, which only a merge could not take.
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
        model = get_peft_model(base, adapter.config)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors.items()}
    wrong = sorted(get_peft_model_state_dict(model).keys() ^ tensors.keys())
    if wrong:
        model.unload()
        raise ValueError(f"the carried adapter does not fit the target: {', '.join(wrong[:4])}.")
    set_peft_model_state_dict(model, tensors)
    return model.eval()
