"""LoRA file layouts: read and write a plain LoRA as a PEFT folder, a diffusers file or a kohya file."""

from xadapt.layouts.minimal import minimal_config
from xadapt.layouts.plain import LoraFile, PlainLora
from xadapt.layouts.reading import read_lora
from xadapt.layouts.writing import write_diffusers, write_kohya, write_peft

__all__ = [
    "LoraFile",
    "PlainLora",
    "minimal_config",
    "read_lora",
    "write_diffusers",
    "write_kohya",
    "write_peft",
]
