"""An interrupted transfer of a large model goes on where it stopped: its finished layers lie beside the place it writes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xadapt.contract import Adapter
from xadapt.fingerprint import layer_print
from xadapt.journal import Journal, keeping
from xadapt.origin import fingerprint_of
from xadapt.siblings import Pair
from xadapt.version import __version__

from .layers import adapted_layers


@contextmanager
def resumable(adapter: Adapter, bases: Pair, method: str, options: Mapping[str, Any], out: Path) -> Iterator[None]:
    """Layers that a method finishes are kept in `.NAME.layers` until the end of the block. Only what cannot be caught, a kill, a
    power cut or the user's Ctrl-C, leaves them there; the same transfer to the same place then takes them up."""
    journal = Journal(out.parent / f".{out.name}.layers", _key(adapter, bases, method, options))
    try:
        with keeping(journal):
            yield
    except Exception:
        journal.clear()
        raise
    journal.clear()


def _key(adapter: Adapter, bases: Pair, method: str, options: Mapping[str, Any]) -> str:
    """Everything that a layer's result depends on."""
    here = adapted_layers(adapter, bases.source) if bases.has_source else ()
    pairs = [(path, line.target) for path in here for line in bases.modules.of(path)]
    tensors = hashlib.sha256()
    for name, tensor in sorted(adapter.tensors.items()):
        tensors.update(f"{name} {layer_print(tensor).as_text()} ".encode())
    return json.dumps(
        {
            "version": __version__,
            "method": method,
            "options": dict(options),
            "config": str(adapter.config),
            "adapter": tensors.hexdigest(),
            "source": fingerprint_of(bases.source, here) if here else {},
            "target": fingerprint_of(bases.target, [target for _, target in pairs]),
            "map": pairs,
        },
        sort_keys=True,
        default=str,
    )
