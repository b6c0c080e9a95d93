"""The `xadapt` command: one file per verb beside this one, listed in VERBS.

A verb module defines `NAME`, `add(parser)` and `run(arguments) -> exit code`; its docstring's first line is its help text. Where its
options depend on others that are typed, it has `add_typed(parser, argv)` as well, and `of_other_methods(flag)`, which says whose flag one
is that it has not.
Verbs import torch inside `run` if they need it, never at the top: `xadapt --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from xadapt.cli import check, export, inspect, merge, methods, transfer, verify
from xadapt.errors import did_you_mean
from xadapt.refused import Refused
from xadapt.version import __version__

VERBS = (check, transfer, verify, inspect, export, merge, methods)

REFUSED = 3

_EPILOG = """examples:
  xadapt check my-adapter/ --source llama/ --target instruct/    what it would meet there, and which method to take
  xadapt transfer my-adapter/ --source llama/ --target instruct/ --out there/
  xadapt verify my-adapter/ there/ --source llama/ --target instruct/ --data lines.txt
  xadapt inspect my-adapter/ --base llama-instruct/              what it is, and whether it was trained there
  xadapt export my-adapter/ --base llama-instruct/ --out lora/   the plain LoRA that it is on that base
  xadapt merge my-adapter/ --base llama-instruct/ --out merged/  that checkpoint with the adapter in its weights
  xadapt methods                                                 what is installed, as a table

exit codes: 0 done, 2 a mistake in what was asked, 3 refused (the verdict, a part would be missing, it loses), 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0; 2 for a mistake in what was asked, told in one line; 3 where it was understood and
    refused, by the verdict or because a part would be missing."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        parser, of_verbs = _parsers(argv)
    except ValueError as error:
        print(f"xadapt {argv[0]}: {error}", file=sys.stderr)
        return 2
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    if not argv[0].startswith("-") and argv[0] not in of_verbs:
        parser.error(f"there is no verb {argv[0]!r}. {did_you_mean(argv[0], tuple(of_verbs))}")
    if argv[0] in of_verbs:
        verb = next(verb for verb in VERBS if argv[0] == verb.NAME)
        _check_flags(of_verbs[argv[0]], argv[1:], getattr(verb, "of_other_methods", lambda flag: ""))
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except Refused as error:
        print(f"xadapt {arguments.verb}: refused: {error}", file=sys.stderr)
        return REFUSED
    except (ValueError, TypeError, OSError) as error:
        print(f"xadapt {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"xadapt {arguments.verb}: interrupted", file=sys.stderr)
        return 130


def _check_flags(parser: argparse.ArgumentParser, argv: Sequence[str], whose: Callable[[str], str]) -> None:
    """Exits with whose a flag is that the verb has not, or what is near to it; argparse would first miss what the flag was to say."""
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    for given in argv:
        if given == "--":
            return
        flag = given.partition("=")[0]
        if " " in flag:  # a value, as for argparse
            continue
        if flag.startswith("--") and not any(one.startswith(flag) for one in known):  # a beginning is enough
            hint = "" if flag.replace("_", "-") in known else whose(flag)
            parser.error(f"there is no flag {flag}. {hint or did_you_mean(flag, known)}")


def _parsers(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command's, and each verb's."""
    parser = argparse.ArgumentParser(
        prog="xadapt",
        description="Train an adapter once, in feature space. Carry it to every sibling of the model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xadapt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    of_verbs: dict[str, argparse.ArgumentParser] = {}
    for verb in VERBS:
        text = (verb.__doc__ or "").strip()
        verb_parser = verbs.add_parser(verb.NAME, help=text.splitlines()[0], description=text)
        verb.add(verb_parser)
        if argv and argv[0] == verb.NAME and hasattr(verb, "add_typed"):
            verb.add_typed(verb_parser, argv[1:])
        verb_parser.set_defaults(run=verb.run)
        of_verbs[verb.NAME] = verb_parser
    return parser, of_verbs
