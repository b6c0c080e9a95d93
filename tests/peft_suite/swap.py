"""A pytest plugin (`-p swap`) under which PEFT's own tests meet our config wherever they say `LoraConfig`.

The tests import `LoraConfig` from `peft`; here that name is bound to the class to test before any of them is imported.
PEFT itself imports its classes from where they are defined, so nothing inside PEFT changes.

A test belongs to the yardstick if it makes a `LoraConfig` while it runs, or is parametrised with one. The run with
LoRA finds these out; the runs with our configs repeat exactly those that LoRA passed.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest

LORA = peft.LoraConfig
NAME = os.environ["PEFT_SUITE_CONFIG"]  # LoraConfig or one of ours
REPORT = Path(os.environ["PEFT_SUITE_REPORT"])
ONLY = os.environ.get("PEFT_SUITE_ONLY")  # a file of test ids, one a line


def _config() -> Any:
    if NAME == "LoraConfig":
        return LORA
    import xadapt

    return getattr(xadapt, NAME)


CONFIG = _config()
if os.environ.get("PEFT_SUITE_LIFT"):
    from xadapt_feature import checks

    # r above the layer's width is refused by us, and many of PEFT's tests have r=8 on a layer of width 5.
    assert callable(checks._check_rank)
    checks._check_rank = lambda *_: None  # type: ignore[assignment]
peft.LoraConfig = CONFIG  # type: ignore[misc]

made = 0  # configs of the class under test, so far
outcomes: dict[str, dict[str, Any]] = {}


def _count() -> None:
    original = CONFIG.__post_init__

    @functools.wraps(original)
    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        global made
        made += type(self) is CONFIG
        original(self, *args, **kwargs)

    CONFIG.__post_init__ = counting


_count()


class _AllSeen(dict[str, int]):
    """For PEFT's `hub_online_once`: every model has been fetched already, so nothing goes online."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def _id(item_or_report: Any) -> str:
    """The test's id, the same whichever config is under test."""
    return str(item_or_report.nodeid).replace(NAME, "LoraConfig")


def _configs(values: Any) -> Iterator[Any]:
    """PEFT config classes and instances in a test's parameters."""
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from _configs(value)
    elif isinstance(values, functools.partial):
        yield from _configs(values.func)
    elif isinstance(values, peft.PeftConfig) or (isinstance(values, type) and issubclass(values, peft.PeftConfig)):
        yield values


def _is_ours(config: Any) -> bool:
    return config is CONFIG or type(config) is CONFIG


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    utils = sys.modules.get("tests.testing_utils")
    if utils is not None:
        utils._HUB_MODEL_ACCESSES = _AllSeen()  # type: ignore[attr-defined]
    only = None if ONLY is None else set(Path(ONLY).read_text().splitlines())
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        callspec: Any = getattr(item, "callspec", None)
        params = [] if callspec is None else list(_configs(list(callspec.params.values())))
        other = params and not any(map(_is_ours, params))
        (dropped if other or (only is not None and _id(item) not in only) else kept).append(item)
        item.user_properties.append(("parametrised", any(map(_is_ours, params))))
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = made
    yield
    entry = outcomes.setdefault(_id(item), {"outcome": "error", "reason": "did not run"})
    entry["uses"] = made > before or dict(item.user_properties).get("parametrised", False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _id(report)
    if report.when == "call" or (report.when == "setup" and not report.passed):
        reason = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (f"{Path(crash.path).name}:{crash.lineno}: {crash.message}" if crash else str(report.longrepr))[
                :2000
            ]
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        outcomes[name] = {"outcome": report.outcome, "reason": reason}
    elif report.when == "teardown" and report.failed:
        outcomes[name] = {"outcome": "failed", "reason": f"teardown: {report.longrepr}"[:2000]}


def pytest_sessionfinish(session: pytest.Session) -> None:
    temporary = REPORT.with_suffix(".tmp")
    temporary.write_text(json.dumps(outcomes, indent=1, sort_keys=True))
    os.replace(temporary, REPORT)
