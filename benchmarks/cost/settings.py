"""What is measured: one cell per stack, width, rank, mode and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

VARIANTS = ("floor", "lora", "input", "output")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One comparison: all variants on the same stack with the same input, step by step in turn."""

    stack: str  # "llama" or "dit"
    width: int
    rank: int
    layers: int
    tokens: int  # per sample
    batch: int
    compiled: bool
    device: str
    dtype: str  # of the base; the adapter is float32, as PEFT casts it

    def name(self) -> str:
        mode = "compile" if self.compiled else "eager"
        return f"{self.stack} d={self.width} r={self.rank} {self.dtype} {mode} {self.device}"


def cells(device: str, short: bool = False) -> list[Cell]:
    """The committed comparison for a device; `short` is the one that tests run."""
    if short:
        return [
            Cell(
                stack=stack,
                width=64,
                rank=4,
                layers=1,
                tokens=16,
                batch=2,
                compiled=False,
                device=device,
                dtype="float32",
            )
            for stack in ("llama", "dit")
        ]
    if device == "cpu":
        grid = product(("llama", "dit"), ((256, 4), (512, 4)), (4, 16, 64), (False,), ("float32",))
        compiled = product(("llama", "dit"), ((512, 2),), (16,), (True,), ("float32",))
        tokens, batch = 256, 2
    else:
        grid = product(("llama", "dit"), ((1024, 8), (2048, 8), (4096, 4)), (4, 16, 64), (False,), ("bfloat16",))
        compiled = product(("llama", "dit"), ((2048, 8),), (16,), (True,), ("bfloat16",))
        tokens, batch = 2048, 4
    return [
        Cell(
            stack=stack,
            width=width,
            rank=rank,
            layers=layers,
            tokens=tokens,
            batch=batch,
            compiled=compile_,
            device=device,
            dtype=dtype,
        )
        for stack, (width, layers), rank, compile_, dtype in (*grid, *compiled)
    ]
