"""What a stock LoRA adds to each layer of a base, from its tensors alone: ΔW = s·BA, whatever the base."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from peft import PeftConfig
from torch import Tensor

from xadapt.factors import VARIANTS, Factors, factors_of, is_plain
from xadapt.update import Fold, Update, calculating_in

# Initialisations that take something out of the base weight, which loading would do again on every other base.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")

# LoRA's variants that PEFT's merge tells of without the base's weights: core attaches them, and refuses by itself what
# changes the model's structure. The others read the weights, or act on more than one layer's features.
TOLD_BY_MERGING = (
    "use_dora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
)


def updates(config: PeftConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Fold] | None:
    """The fold of each layer, or None for LoRA's variants, whose factors are not all there is to them.

    Raises:
        ValueError: the adapter belongs to a base that its initialisation has changed, or needs the base's weights.
    """
    check_start(config)
    odd = [name for name in VARIANTS if getattr(config, name, None) and name not in TOLD_BY_MERGING]
    if odd:
        raise ValueError(
            f"This LoRA was trained with {', '.join(odd)}, and what it adds cannot be told from its file alone. Let PEFT merge "
            "it: PeftModel.from_pretrained(model, folder).merge_and_unload(), then save_pretrained."
        )
    if not is_plain(config):
        return None
    factors = factors_of(config, tensors)
    return None if factors is None else {path: partial(_fold, found) for path, found in factors.items()}


def check_start(config: PeftConfig) -> None:
    """ValueError for an initialisation that takes something out of the base weight: loading would take it out of every other base too."""
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"This LoRA was trained with init_lora_weights={start!r}, which takes a part out of the base weight: its factors "
            "alone are no update of the base. Convert it where it was trained: save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…), see PEFT's guide to PiSSA."
        )


def _fold(factors: Factors, weight: Tensor, bias: Tensor | None) -> Update:
    like = calculating_in(weight)
    return Update(factors.matrix(like), factors.offset(like))
