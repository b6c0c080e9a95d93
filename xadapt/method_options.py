"""The options of a method: the fields of the dataclass that builds it, by name, from Python or from text."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any

from xadapt import registry
from xadapt.contract import Method
from xadapt.errors import did_you_mean, some


def fields_of(method: Method) -> tuple[dataclasses.Field[Any], ...]:
    """The options. A method whose `build` is no dataclass has none that could be told."""
    build: Any = method.build
    return dataclasses.fields(build) if dataclasses.is_dataclass(build) else ()


def build(method: Method, options: Mapping[str, Any]) -> Any:
    """The method with these options.

    Raises:
        TypeError: it has no such option; the message says which methods have it, or what is nearest.
        ValueError: a value is not allowed.
    """
    known = [field.name for field in fields_of(method)]
    unknown = [name for name in options if name not in known]
    if unknown:
        hint = of_others(unknown[0]) or did_you_mean(unknown[0], known)
        raise TypeError(f"The method {method.name!r} has no option {unknown[0]!r}. {hint}")
    return method.build(**options)


def of_others(option: str) -> str:
    """What follows "no such option" where other methods have it; empty where none has. Imports all that are installed."""
    having = [
        name
        for name, method in registry.load_all()[0].items()
        if any(field.name == option for field in fields_of(method))
    ]
    if not having:
        return ""
    example = "" if len(having) == 1 else ", for example"
    return f"{some(having)} {'has' if len(having) == 1 else 'have'} it: method={having[0]!r}{example}."


PREFIX = "method_"


def unprefixed(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the method calls them: `method_map` is its `map`, where a verb has a `map` of its own.

    Raises:
        TypeError: one is given twice.
    """
    known = {field.name for field in fields_of(method)}
    found: dict[str, Any] = {}
    for name, value in options.items():
        bare = name.removeprefix(PREFIX)
        own = bare if bare in known and name not in known else name
        if own in found:
            raise TypeError(f"{own} and {PREFIX}{own} are one option of the method {method.name!r}; give it once.")
        found[own] = value
    return found


def chosen(method: Method, step: Any) -> dict[str, Any]:
    """Every option of a built method with its value, those left at their default included; JSON's types only."""
    return {field.name: _plain(getattr(step, field.name, None)) for field in fields_of(method)}


def type_of(method: Method, field: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The simple type that an option is written in on the command line (str where there is none), and whether it may be None."""
    try:
        hint: Any = typing.get_type_hints(method.build)[field.name]
    except Exception:  # a name that is imported for type checkers alone
        hint = type(field.default) if field.default not in (None, dataclasses.MISSING) else str
    parts = [part for part in typing.get_args(hint) if part is not type(None)] if _is_union(hint) else [hint]
    optional = _is_union(hint) and type(None) in typing.get_args(hint)
    simple = next((part for part in (bool, int, float, str) if part in parts), str)
    if float in parts and simple is int:
        simple = float
    return simple, optional


def help_of(method: Method) -> dict[str, str]:
    """What stands under each option's field in the source: the text for a command line's help."""
    told: dict[str, str] = {}
    for cls in reversed(getattr(method.build, "__mro__", ())):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError, SyntaxError, ValueError):  # no source at hand
            continue
        for field, text in itertools.pairwise(getattr(body, "body", [])):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    told[name] = " ".join(said.split())
    return told


def parse(text: str, simple: type, optional: bool) -> Any:
    """A value from the command line.

    Raises:
        ValueError: it is no such value.
    """
    if optional and text.lower() in ("none", "null"):
        return None
    if simple is bool:
        truths = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in truths:
            raise ValueError(f"{text!r} is neither true nor false")
        return truths[text.lower()]
    return simple(text)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
