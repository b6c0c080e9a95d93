"""Which of the installed methods carries an adapter, decided per layer and per adapter from what is measured."""

from .methods import AUTO as AUTO

__all__ = ["AUTO"]
