"""Which subjects there are, their class words, and the prompts that are asked of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.frame.settings import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Subject:
    """One subject. `prompts` have {} where the class word goes."""

    name: str
    class_word: str
    prompts: tuple[str, ...]

    def prompt(self, template: str, token: str | None = None) -> str:
        """The template with the class word, and the token before it if there is one."""
        return template.format(f"{token} {self.class_word}" if token else self.class_word)


def read_subjects(file: str) -> dict[str, Subject]:
    """All subjects of a file in benchmarks/dreambooth/data (by its stem) or of a path, in the file's order.

    Raises:
        ValueError: there is no such file, or it is not laid out like those.
    """
    path = FOLDER / f"{file}.toml" if (FOLDER / f"{file}.toml").is_file() else Path(file)
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in FOLDER.glob("*.toml")))
        raise ValueError(
            f"subjects_file = {file!r}: no such file. Give {known}, or a path to one like those in {FOLDER}."
        )
    try:
        groups = tomllib.loads(path.read_text(encoding="utf-8"))
        found = {
            name: Subject(name, word, tuple(group["prompts"]))
            for group in groups.values()
            for name, word in group["subjects"].items()
        }
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no file of subjects ({error!r}). It has groups, each with `subjects` (name = class word) and "
            f"`prompts` (with {{}} for the class word), as {FOLDER / 'dreambooth.toml'} shows."
        ) from None
    for subject in found.values():
        lacking = [prompt for prompt in subject.prompts if prompt.count("{}") != 1]
        if lacking:
            raise ValueError(f"{path}: write {{}} once, where the class word goes, in {lacking[0]!r}.")
    return found


def chosen(file: str, names: tuple[str, ...]) -> list[Subject]:
    """The named subjects of a file, or all.

    Raises:
        ValueError: one of them has no class word there.
    """
    known = read_subjects(file)
    for name in names:
        if name not in known:
            raise ValueError(
                f"subject {name!r} has no class word in {file!r}{did_you_mean(name, known)} Subjects there: "
                f'{", ".join(known)}. For one of your own, copy data/dreambooth.toml, add `{name} = "class word"`, and '
                "pass the copy as --subjects_file."
            )
    return [known[name] for name in names] if names else list(known.values())
