"""Dataclasses from TOML presets, from JSON and from the command line, with one rule for what is accepted."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def preset_path(preset: str, folder: Path) -> Path:
    """The file of a preset: one of `folder` by its name, or a path to one of your own."""
    named = folder / f"{preset}.toml"
    if named.is_file():
        return named
    if preset.endswith(".toml"):
        if Path(preset).is_file():
            return Path(preset)
        raise ValueError(f"there is no file {preset}.")
    known = sorted(path.stem for path in folder.glob("*.toml"))
    raise ValueError(
        f"no preset {preset!r}{did_you_mean(preset, known)} Presets: {', '.join(known)}, or path/to/my.toml."
    )


def read_preset(kind: type[T], path: Path) -> T:
    """The settings that a TOML file describes; what it leaves out has the default of the dataclass."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}.") from None
    try:
        return from_plain(kind, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def from_plain(kind: Any, value: Any, where: str = "") -> Any:
    """`value`, as TOML or JSON gives it, in the type `kind`: dataclasses, tuples, dictionaries, Literal, X | None, scalars.

    Raises:
        ValueError: an unknown or a missing key, a value that is not allowed.
        TypeError: a value of another type.
    """
    if kind is Any:  # options of something that checks them itself
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (only,) = (each for each in inner if each is not type(None))
        return from_plain(only, value, where)
    if origin is Literal:
        if value not in inner:
            allowed = ", ".join(map(repr, inner))
            raise ValueError(f"{where} = {value!r}{did_you_mean(str(value), map(str, inner))} Allowed: {allowed}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} = {value!r}; give a list.")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ValueError(f"{where} has {len(value)} entries; give {len(kinds)}.")
        pairs = zip(kinds, value, strict=True)
        return tuple(from_plain(each, item, f"{where}[{index}]") for index, (each, item) in enumerate(pairs))
    if origin in (dict, Mapping) or origin is getattr(Mapping, "__origin__", Mapping):
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} = {value!r}; give a table.")
        return {key: from_plain(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    return _scalar(kind, value, where)


def did_you_mean(given: str, known: Any) -> str:
    """`; did you mean 'rank'?`, or a full stop."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _dataclass(kind: type, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{where or 'the settings'} = {value!r}; give a table.")
    known = {each.name: each for each in dataclasses.fields(kind) if each.init}
    inside = f" in {where}" if where else ""
    for key in value:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r}{inside}{did_you_mean(key, known)} Keys{inside}: {', '.join(sorted(known))}."
            )
    required = [
        name
        for name, each in known.items()
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    lacking = [name for name in required if name not in value]
    if lacking:
        raise ValueError(f"{', '.join(lacking)} must be given{inside}.")
    hints = get_type_hints(kind)
    dotted = f"{where}." if where else ""
    return kind(**{key: from_plain(hints[key], item, f"{dotted}{key}") for key, item in value.items()})


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{where} = {value!r} is {type(value).__name__}; give {kind.__name__}.")
    return value


def override(settings: T, options: Mapping[str, type], arguments: Sequence[str], prog: str) -> tuple[T, dict[str, Any]]:
    """`settings` with what the command line changes in them, and the run's own `options` (name -> dataclass).

    `--rank 8`, `--training.learning_rates '[1e-4, 3e-4]'`: the flags are the fields. `--help` lists them with defaults.
    What stands in a dictionary has its key in between: `--tasks.math.schedule.max_steps 10`.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    settings, arguments = _within_tables(settings, _written_out(arguments))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=True)
    for kind in options.values():
        parser.add_class_arguments(kind, as_group=True)
    taken = {each.name for kind in options.values() for each in dataclasses.fields(kind)}
    clash = taken & {each.name for each in dataclasses.fields(settings)}  # type: ignore[arg-type]  # T is a dataclass
    if clash:
        raise ValueError(f"{type(settings).__name__} may not have the fields {sorted(clash)}: the run has them.")
    parser.add_class_arguments(type(settings), as_group=True)
    parser.set_defaults(_dotted(settings))
    _check_flags(arguments, {option for action in parser._actions for option in action.option_strings}, settings)
    given = parser.parse_args(arguments).as_dict()
    built = {
        name: from_plain(kind, {each.name: given[each.name] for each in dataclasses.fields(kind)})
        for name, kind in options.items()
    }
    own = {each.name: given[each.name] for each in dataclasses.fields(settings)}  # type: ignore[arg-type]  # T is a dataclass
    return from_plain(type(settings), own), built


def _check_flags(arguments: Sequence[str], known: set[str], settings: Any) -> None:
    """Raises ValueError for a flag that there is not, with the nearest; argparse would only print all of them."""
    lists = {each.name for each in dataclasses.fields(settings) if isinstance(getattr(settings, each.name), tuple)}
    for argument in arguments:
        name = argument.partition("=")[0].removesuffix("+")
        if not name.startswith("--") or name in known:
            continue
        if (field := name.removeprefix("--").partition(".")[0]) in lists:
            raise ValueError(
                f"{field} is a list, so {name} names nothing: give --{field} whole, or a preset of your own."
            )
        raise ValueError(f"no option {name}{did_you_mean(name, known)} --help after the preset lists them.")


def _written_out(arguments: Sequence[str]) -> list[str]:
    """`--strict-versions` as `--strict_versions=true`: dashes and bare switches, as fingers know them."""
    found = []
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if argument.startswith("--") and argument != "--help":
            name, equals, value = argument[2:].partition("=")
            bare = not equals and following.startswith("--")
            argument = f"--{name.replace('-', '_')}{equals}{value}" + ("=true" if bare else "")
        found.append(argument)
    return found


def _within_tables(settings: T, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Applies `--field.key.rest value` for fields that are dictionaries, which jsonargparse takes only as a whole."""
    tables = {
        each.name
        for each in dataclasses.fields(settings)  # type: ignore[arg-type]  # T is a dataclass
        if isinstance(getattr(settings, each.name), dict)
    }
    content: dict[str, Any] = dataclasses.asdict(settings)  # type: ignore[call-overload]  # likewise
    rest, words = [], iter(arguments)
    for word in words:
        path, equals, value = word.removeprefix("--").partition("=")
        keys = path.split(".")
        if not word.startswith("--") or keys[0] not in tables or len(keys) == 1:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        try:
            given: Any = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            given = value  # a bare word is a string
        inside = content
        for key in keys[:-1]:
            inside = inside.setdefault(key, {})
            if not isinstance(inside, dict):
                raise ValueError(f"--{path}: {key} holds no further keys.")
        inside[keys[-1]] = given
    return from_plain(type(settings), content), rest


def _dotted(settings: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat |= _dotted(value, f"{prefix}{each.name}.")
        else:
            flat[prefix + each.name] = value
    return flat
