"""The PEFT methods that have an input and an output form beside LoRA, by PEFT type."""

from __future__ import annotations

HOSTS: tuple[str, ...] = (
    "ADALORA",
    "ADAMSS",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "GRALORA",
    "HRA",
    "IA3",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "PEANUT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
)

# The options of a method that are ranks, where it is not just `r`. OFT's r is a number of blocks, 0 where their size is
# given; LoKr takes one above the width for factors that are whole matrices.
RANKS: dict[str, tuple[str, ...]] = {"ADALORA": ("init_r", "target_r"), "OFT": (), "LOKR": ()}
