"""What can be done to an existing LoRA from weights alone."""

from .carrying import LORA_X as LORA_X
from .carrying import PINV_INPUT as PINV_INPUT
from .carrying import PINV_OUTPUT as PINV_OUTPUT
from .carrying import PROLORA as PROLORA
from .methods import COPY as COPY

__all__ = ["COPY", "LORA_X", "PINV_INPUT", "PINV_OUTPUT", "PROLORA"]
