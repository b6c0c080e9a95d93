"""The registry, with real entry points: distributions written to a folder that is put on the path."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xadapt import registry
from xadapt.contract import Method
from xadapt.registry import PluginError

HERE = Path(__file__).parent
Install = Callable[[str, str, str], None]
OURS = {"input_ada", "output_ada", "hybrid_ada", "full_ada"}

METHOD_SOURCE = """
from xadapt.contract import Method
from xadapt.kinds import PeftKind

def nothing(*_): ...

KIND = PeftKind(name={kind!r}, config=nothing, attach=nothing, tensors=nothing)
METHOD = Method(name={name!r}, summary="", paper="", reads=(KIND,), writes=KIND, build=nothing)
"""


def write_distribution(folder: Path, distribution: str, method: str, source: str) -> None:
    """What pip would leave behind: a module, and a dist-info folder with one entry point."""
    module = distribution.replace("-", "_")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{method} = {module}:METHOD\n")
    (folder / f"{module}.py").write_text(source)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(distribution, method, source)` for the length of a test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    installed: list[str] = []

    def add(distribution: str, method: str, source: str) -> None:
        write_distribution(tmp_path, distribution, method, source)
        installed.append(distribution.replace("-", "_"))

    yield add
    for module in installed:
        sys.modules.pop(module, None)


def test_our_own_methods_are_found() -> None:
    assert set(registry.methods()) >= OURS
    assert isinstance(registry.get("input_ada"), Method)


def test_names_come_sorted() -> None:
    assert list(registry.methods()) == sorted(registry.methods())


def test_unknown_name_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(ValueError, match=r"No method is called 'input-ada'\. Did you mean 'input_ada'\?") as caught:
        registry.get("input-ada")
    assert all(name in str(caught.value) for name in OURS)


def test_unknown_name_far_from_all_suggests_none() -> None:
    with pytest.raises(ValueError, match=r"No method is called 'zzzzzzzz'\. Known: ") as caught:
        registry.get("zzzzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_listing_names_imports_no_plugin(install: Install) -> None:
    install("loud-plugin", "loud", "raise SystemError('imported')")
    assert "loud" in registry.methods()
    assert "loud_plugin" not in sys.modules


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import no_such_module_anywhere", "could not be imported: ModuleNotFoundError: No module named"),
        ("def (", "could not be imported: SyntaxError"),
        ("x = 1", "could not be imported: AttributeError"),
        ("raise RuntimeError('no licence')", "could not be imported: RuntimeError: no licence"),
        ("METHOD = 'a name'", "is 'str'; it must be an xadapt.contract.Method"),
        (METHOD_SOURCE.format(name="other", kind="k"), "calls itself 'other'"),
    ],
)
def test_a_broken_plugin_is_named_and_the_others_work(source: str, complaint: str, install: Install) -> None:
    install("sad-plugin", "sad", source)
    working, broken = registry.load_all()
    assert set(working) >= OURS
    assert list(broken) == ["sad"]
    with pytest.raises(PluginError) as caught:
        registry.get("sad")
    for message in (str(caught.value), str(broken["sad"])):
        assert "'sad'" in message
        assert "sad-plugin 1.0" in message
        assert complaint in message


def test_one_name_twice_names_both_distributions(install: Install) -> None:
    source = METHOD_SOURCE.format(name="twin", kind="k")
    install("twin-one", "twin", source)
    install("twin-two", "twin", source)
    with pytest.raises(PluginError, match="claimed by") as caught:
        registry.get("twin")
    assert "twin-one 1.0" in str(caught.value)
    assert "twin-two 1.0" in str(caught.value)
    assert registry.methods().count("twin") == 1
    assert set(registry.load_all()[0]) >= OURS


class TestKinds:
    def test_each_once(self) -> None:
        names = [kind.name for kind in registry.kinds()]
        assert set(names) >= OURS
        assert len(names) == len(set(names))

    @pytest.mark.parametrize(
        ("peft_type", "kind"),
        [("INPUT_ADA", "input_ada"), ("INPUT_ADA_LOHA", "input_ada"), ("OUTPUT_ADA_OFT", "output_ada")],
    )
    def test_of_a_peft_type(self, peft_type: str, kind: str) -> None:
        found = registry.kind_of(peft_type)
        assert found is not None
        assert found.name == kind

    def test_of_a_type_nobody_serves(self) -> None:
        assert registry.kind_of("PIGEON") is None

    def test_the_longest_name_wins(self, install: Install) -> None:
        install("short-plugin", "short", METHOD_SOURCE.format(name="short", kind="bird"))
        install("long-plugin", "long", METHOD_SOURCE.format(name="long", kind="bird_song"))
        long, short = registry.kind_of("BIRD_SONG_LOUD"), registry.kind_of("BIRD_SONGLESS")
        assert long is not None
        assert long.name == "bird_song"
        assert short is not None
        assert short.name == "bird"

    def test_two_that_share_a_name_are_refused_by_name(self, install: Install) -> None:
        install("bird-one", "one", METHOD_SOURCE.format(name="one", kind="bird"))
        install("bird-two", "two", METHOD_SOURCE.format(name="two", kind="bird"))
        with pytest.raises(PluginError, match="one, two bring different kinds called 'bird'"):
            registry.kind_of("BIRD")
        assert registry.kind_of("INPUT_ADA") is not None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--no-index", "--target", str(site), str(HERE / "third_party_plugin")],
        check=True,
    )
    write_distribution(site, "sad-plugin", "sad", "import no_such_module_anywhere")
    return site


class TestThirdPartyPlugin:
    """A distribution of its own, built and installed by pip, used in a fresh process beside a broken one."""

    def test_it_is_listed_and_the_broken_one_named(self, site: Path, run_python: Callable[..., str]) -> None:
        printed = run_python(
            "import sys; from xadapt.cli import main; main(['methods', '--json']); assert 'torch' not in sys.modules",
            PYTHONPATH=str(site),
        )
        rows = {row["name"]: row for row in json.loads(printed)}
        assert set(rows) >= OURS | {"damped_lora", "sad"}
        assert rows["damped_lora"]["reads"] == ["lora"]
        assert rows["damped_lora"]["summary"] == "the copy of a LoRA, weakened"
        assert "no_such_module_anywhere" in rows["sad"]["error"]

    def test_it_transfers(self, site: Path, run_python: Callable[..., str]) -> None:
        printed = run_python(
            "import torch\n"
            "from xadapt import registry\n"
            "from xadapt.contract import Adapter\n"
            "method = registry.get('damped_lora')\n"
            "kind = method.writes\n"
            "config = kind.config()(r=2, target_modules=['0'], init_lora_weights=False)\n"
            "model = torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
            "kind.attach(model, config)\n"
            "adapter = Adapter(kind=kind, config=config, tensors=kind.tensors(model))\n"
            "moved = method.build(strength=0.25).transfer(adapter, None).adapter\n"
            "(b,) = [n for n in adapter.tensors if 'lora_B' in n]\n"
            "assert adapter.tensors[b].abs().sum() > 0\n"
            "assert torch.equal(moved.tensors[b], 0.25 * adapter.tensors[b])\n"
            "print('moved', *sorted(moved.tensors))\n",
            PYTHONPATH=str(site),
        )
        assert printed.split() == ["moved", "0.lora_A.weight", "0.lora_B.weight"]
