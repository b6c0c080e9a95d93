"""What is shipped, what is promised in pyproject.toml, and whether the two agree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from xadapt import registry
from xadapt.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.name for path in (ROOT / "methods").glob("xadapt_*"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS: dict[str, str] = PROJECT["entry-points"][registry.GROUP]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirements(*lists: list[str]) -> list[Requirement]:
    """Those on other packages: an extra may also name other extras of ours."""
    return [requirement for requirement in map(Requirement, chain(*lists)) if requirement.name != "xadapt"]


UNTRIED = "a4a-eval"  # an extra that says so beside its names, and promises no range
PROMISED = requirements(
    PROJECT["dependencies"], *(listed for extra, listed in EXTRAS.items() if extra not in ("test", UNTRIED))
)


class TestEntryPoints:
    def test_those_installed_are_those_written(self) -> None:
        installed = {
            entry.name: entry.value for entry in entry_points(group=registry.GROUP) if entry.name in ENTRY_POINTS
        }
        assert installed == ENTRY_POINTS, "pip reads entry points at installation only: pip install -e . again"

    def test_every_package_in_methods_registers_something(self) -> None:
        assert {value.split(":")[0] for value in ENTRY_POINTS.values()} == set(PACKAGES)

    def test_methods_is_a_folder_and_no_package(self) -> None:
        assert not (ROOT / "methods" / "__init__.py").exists()

    def test_the_readme_lists_what_is_registered(self) -> None:
        rows = ["| name | what it does | reads → writes | paper |", "|---|---|---|---|"]
        for name in sorted(ENTRY_POINTS):
            method = registry.get(name)
            arrow = f"{', '.join(kind.name for kind in method.reads)} → {method.writes.name}"
            rows.append(f"| `{name}` | {method.summary} | {arrow} | {method.paper} |")
        table = "\n".join(rows)
        assert f"\n\n{table}\n\n" in (ROOT / "methods" / "README.md").read_text(), f"the table should read:\n{table}"


class TestWheel:
    @pytest.fixture(scope="class")
    @classmethod
    def names(cls, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
        """The files of a freshly built wheel."""
        out = tmp_path_factory.mktemp("wheel")
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = out.glob("*.whl")
        assert wheel.name == f"xadapt-{__version__}-py3-none-any.whl"
        return zipfile.ZipFile(wheel).namelist()

    def test_it_holds_our_packages_and_nothing_else(self, names: list[str]) -> None:
        info = f"xadapt-{__version__}.dist-info"
        assert {name.split("/")[0] for name in names} == {"xadapt", *PACKAGES, info}
        assert f"{info}/licenses/LICENSE" in names

    @pytest.mark.parametrize("package", ["xadapt", *PACKAGES])
    def test_each_package_is_whole_and_typed(self, package: str, names: list[str]) -> None:
        folder = ROOT / "xadapt" if package == "xadapt" else ROOT / "methods" / package
        sources = {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}
        assert sources <= set(names)
        assert f"{package}/py.typed" in names


def test_type_checkers_of_other_projects_see_the_public_names(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from xadapt import InputAdaConfig, load\n"
        "reveal_type(InputAdaConfig(r=8))\n"
        "InputAdaConfig(rr=8)\n"
        "load(3, 'folder')\n"
    )
    # From a folder of its own; with our settings only so that the cache of `make lint` serves.
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache"), "--hide-error-context", "--no-pretty", "--no-color-output"]
    done = subprocess.run([*mypy, *cache, "user.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    types = [line for line in done.stdout.splitlines() if "note: Revealed" in line]
    assert types == ['user.py:2: note: Revealed type is "xadapt_feature.config.InputAdaConfig"'], (
        done.stdout + done.stderr
    )
    mistakes = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(mistakes) == 2, done.stdout
    assert mistakes[0].startswith('user.py:3: error: Unexpected keyword argument "rr" for "InputAdaConfig"')
    assert mistakes[1].startswith('user.py:4: error: Argument 1 to "load" has incompatible type "int"')


class TestVersions:
    @pytest.mark.parametrize("requirement", PROMISED + requirements(EXTRAS["test"]), ids=str)
    def test_everybodys_pin_is_in_range(self, requirement: Requirement) -> None:
        for pin in pins("constraints.txt")[requirement.name]:
            assert requirement.specifier.contains(pin), f"{requirement} and {pin}"

    @pytest.mark.parametrize("requirement", PROMISED, ids=str)
    def test_the_oldest_pin_is_the_lower_end(self, requirement: Requirement) -> None:
        (lower,) = (Version(spec.version) for spec in requirement.specifier if spec.operator == ">=")
        (pin,) = pins("constraints-oldest.txt")[requirement.name]
        assert pin.release[: len(lower.release)] == lower.release, f"{requirement} promises {lower}, tested is {pin}"


def pins(file: str) -> dict[str, list[Version]]:
    """Package -> its pinned version (one for each Python that needs another one)."""
    pinned: dict[str, list[Version]] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (exact,) = requirement.specifier
            assert exact.operator == "==", line
            assert requirement.url is None, line
            pinned.setdefault(requirement.name, []).append(Version(exact.version))
    return pinned
