"""The version, in a module of its own: the build reads it, and plug-ins import it without touching `xadapt/__init__.py`."""

__version__ = "0.1.0"
