"""Which methods are installed: a lazy look at the entry points of the group "xadapt.methods".

Listing names imports no plug-in; loading one imports that one only. A plug-in that fails is reported by name, with its error
and the distribution it came from, and never keeps the others from working. Nothing here imports torch.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import EntryPoint, entry_points

from xadapt.contract import Kind, Method
from xadapt.errors import did_you_mean
from xadapt.kinds import PeftKind

GROUP = "xadapt.methods"


class PluginError(ValueError):
    """A plug-in is installed but cannot be used; the message says which, from where, and why."""


def methods() -> tuple[str, ...]:
    """The names of all installed methods, sorted. Imports none of them."""
    return tuple(sorted(_installed()))


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: no such method is installed; the message suggests the nearest name.
        PluginError: it is installed, but its plug-in is broken or two distributions claim the name.
    """
    installed = _installed()
    if name not in installed:
        raise ValueError(f"No method is called {name!r}. {did_you_mean(name, tuple(sorted(installed)))}")
    return _load(name, installed[name])


def load_all() -> tuple[dict[str, Method], dict[str, PluginError]]:
    """Every method that works and every one that does not, by name."""
    working: dict[str, Method] = {}
    broken: dict[str, PluginError] = {}
    for name, found in sorted(_installed().items()):
        try:
            working[name] = _load(name, found)
        except PluginError as error:
            broken[name] = error
    return working, broken


def kinds() -> tuple[Kind, ...]:
    """Every adapter kind that a working method reads or writes, once each."""
    return tuple(dict.fromkeys(kind for method in load_all()[0].values() for kind in method.kinds))


def kind_of(peft_type: str) -> PeftKind | None:
    """The kind that serves a PEFT type, or None. Of several, the one with the longest name: it says the most.

    Raises:
        PluginError: two plug-ins mean different things by the same kind name.
    """
    known = (kind for kind in kinds() if isinstance(kind, PeftKind))
    serving = sorted((kind for kind in known if kind.serves(peft_type)), key=lambda kind: len(kind.name))
    if not serving:
        return None
    kind = serving[-1]
    rivals = [rival for rival in serving if rival.name == kind.name]
    if len(rivals) > 1:
        owners = [name for name, method in load_all()[0].items() if any(rival in method.kinds for rival in rivals)]
        raise PluginError(
            f"The methods {', '.join(owners)} bring different kinds called {kind.name!r}. "
            "Uninstall all but one of them, or let them import the same Kind."
        )
    return kind


def _installed() -> dict[str, list[EntryPoint]]:
    """Entry points by name. More than one under a name means that distributions disagree."""
    found: defaultdict[str, list[EntryPoint]] = defaultdict(list)
    for entry_point in entry_points(group=GROUP):
        found[entry_point.name].append(entry_point)
    return dict(found)


def _load(name: str, found: list[EntryPoint]) -> Method:
    if len(found) > 1:
        claims = " and ".join(f"{_distribution(entry)} ({entry.value})" for entry in found)
        raise PluginError(f"The method name {name!r} is claimed by {claims}. Uninstall one of them.")
    (entry,) = found
    origin = f"The plug-in for method {name!r} (from {_distribution(entry)}: {entry.value})"
    try:
        method = entry.load()
    except Exception as error:  # whatever a third party's module raises on import must not take the others down
        raise PluginError(f"{origin} could not be imported: {type(error).__name__}: {error}") from error
    if not isinstance(method, Method):
        raise PluginError(f"{origin} is {type(method).__name__!r}; it must be an xadapt.contract.Method.")
    if method.name != name:
        raise PluginError(f"{origin} calls itself {method.name!r}; entry point and Method.name must agree.")
    return method


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"
