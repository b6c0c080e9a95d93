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
    "HIRA",
    "HRA",
    "IA3",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "PEANUT",
    "PSOFT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
)
