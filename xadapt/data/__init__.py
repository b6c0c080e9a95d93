"""The user's data as batches: dicts of arguments for a base's forward. `open_data` reads whatever it is."""

from .amount import Amount
from .batches import Batches
from .opening import open_data

__all__ = ["Amount", "Batches", "open_data"]
