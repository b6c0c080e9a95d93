"""What `xadapt inspect` says of an IP-Adapter and of an A4A adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xadapt.contract import Adapter

from .matching import fingerprint_of
from .source import IPAdapterSource


def ip_adapter_facts(adapter: Adapter) -> Mapping[str, str]:
    """Of what kind it is, which encoder it wants, and the layers it has."""
    source = IPAdapterSource.load(adapter.tensors)
    return {**_source_facts(source), "fingerprint": fingerprint_of(source)}


def a4a_facts(adapter: Adapter) -> Mapping[str, str]:
    """Where it comes from, what it is for, and what it was built with."""
    told = adapter.config
    source = IPAdapterSource(told["projection_kind"], told["projection_options"], told["adapter_dims"])
    return {
        "carried from": f"{told['ip_adapter'] or 'an IP-Adapter that it does not name'} ({told['ip_adapter_fingerprint']})",
        **_source_facts(source),
        "for": f"{told['target_class']} ({told['target_fingerprint'] or 'no fingerprint'})",
        "its layers": _layers(told["target_dims"]),
        "mapping": f"{told['mapping']}, depth {told['depth']}",
    }


def _source_facts(source: IPAdapterSource) -> dict[str, str]:
    return {
        "image projection": f"{source.kind.name}, {source.num_tokens} tokens of width {source.context_dim}",
        "wants": source.kind.wants(source.options),
        "source layers": _layers(source.adapter_dims),
    }


def _layers(widths: Sequence[int]) -> str:
    return f"{len(widths)} of widths {', '.join(map(str, sorted(set(widths))))}"
