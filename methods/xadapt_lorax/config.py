"""The config of LoRA-X."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from peft import PeftConfig

from xadapt.peft_internals import PeftType

FORMS = ("full", "diagonal")


@dataclass
class LoraXConfig(PeftConfig):
    """ΔW = U M Vᵀ, with U (out, r) and V (in, r) the base weight's leading singular vectors, which stay; M (r, r) trains, from zero.

    On a sibling the same M stands between the sibling's own vectors: that is its transfer. U and V are not saved, but taken from
    the base each time, by one SVD of each adapted layer. The options that choose the layers are those of `LoraConfig`.
    """

    r: int = field(default=16, metadata={"help": "How many singular directions; at most the layer's smaller width."})
    form: str = field(
        default="full", metadata={"help": "M is a whole matrix ('full'), or 'diagonal': singular values."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the linears to adapt, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of layers to leave out, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; all by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, if it is not one of the usual ones."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole and save beside the adapter."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        import_module("xadapt_lorax.tuner")  # late, since it imports this module; unpickling comes by here as well
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT's is untyped
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r={self.r!r}: a number of directions is a positive integer, for example r=16.")
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}: write form='full' or form='diagonal'.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where to count, layers_to_transform what: pass both.")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self.peft_type = PeftType("LORAX")
