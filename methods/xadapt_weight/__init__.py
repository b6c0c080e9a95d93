"""What can be done to an existing LoRA from weights alone."""

from .methods import COPY as COPY

__all__ = ["COPY"]
