"""A merge that does not come to its end: it leaves nothing, or what the next one takes up. Nobody sees half a result."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import xadapt
from tests.conftest import make_llama
from tests.merge_models import TARGETS, files_in, index_of, make_adapter, make_checkpoint, tensors_of
from xadapt import merge_files, merge_shard
from xadapt.merge_files import WorkFolder

pytestmark = pytest.mark.usefixtures("two_threads")
Setup = tuple[Path, Path, Path]  # base, adapter, out
ENOSPC = OSError(errno.ENOSPC, "No space left on device")

# Dies between two tensors of a shard, with a key made under another seed of the hashes.
KILLED = """
import os, signal, sys
import xadapt
from xadapt import merge_shard
write, calls = merge_shard._write_change, []
def die_in_the_middle(*args):
    write(*args)
    calls.append(args)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
merge_shard._write_change = die_in_the_middle
xadapt.merge(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("made")
    adapter = make_adapter(folder / "adapter")
    make_adapter(folder / "other", LoraConfig(r=3, target_modules=TARGETS))
    return make_checkpoint(folder / "base"), adapter, folder / "merged"


@pytest.fixture
def setup(made: Setup, tmp_path: Path) -> Setup:
    """A folder of its own for the result, and what a base and an adapter are."""
    base = shutil.copytree(made[0], tmp_path / "base")
    return base, made[1], tmp_path / "merged"


@pytest.fixture(scope="module")
def killed(made: Setup) -> Path:
    """The folder that a merge of `made` into `merged` leaves behind when it is killed."""
    command = [sys.executable, "-c", KILLED, str(made[1]), str(made[0]), str(made[2])]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = made[2].with_name(".merged.merging")
    assert not made[2].exists()
    return left


@pytest.fixture
def resumed(killed: Path, tmp_path: Path) -> Path:
    """Where the next merge would write, with what the killed one has left."""
    shutil.copytree(killed, tmp_path / ".merged.merging")
    return tmp_path / "merged"


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    finished = [path for path in folder.glob("*.safetensors") if path.suffix != ".part"]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}


def assert_merged(out: Path, adapter: Path, base: Path, fresh: Path) -> None:
    """`out` is what an undisturbed merge writes, byte for byte."""
    xadapt.merge(adapter, base, fresh)
    assert files_in(out) == files_in(fresh)
    assert all((out / name).read_bytes() == (fresh / name).read_bytes() for name in files_in(out))


class TestAfterAKill:
    def test_finished_shards_are_kept(self, made: Setup, resumed: Path, tmp_path: Path) -> None:
        before = identities(tmp_path / ".merged.merging")
        assert 0 < len(before) < len(list(made[0].glob("*.safetensors")))
        assert list((tmp_path / ".merged.merging").glob("*.part"))
        xadapt.merge(made[1], made[0], resumed)
        assert identities(resumed).items() >= before.items()
        assert_merged(resumed, made[1], made[0], tmp_path / "fresh")
        assert {path.name for path in tmp_path.iterdir()} == {"merged", "fresh"}

    def test_another_adapter_starts_anew(self, made: Setup, resumed: Path, tmp_path: Path) -> None:
        other = made[1].with_name("other")
        xadapt.merge(other, made[0], resumed)
        assert_merged(resumed, other, made[0], tmp_path / "fresh")

    def test_other_weights_start_anew(self, made: Setup, resumed: Path, tmp_path: Path) -> None:
        before = identities(tmp_path / ".merged.merging")
        xadapt.merge(made[1], made[0], resumed, weights=[0.5])
        assert not identities(resumed).items() & before.items()

    def test_a_base_that_has_changed_starts_anew(self, made: Setup, resumed: Path, tmp_path: Path) -> None:
        shard = sorted(made[0].glob("*.safetensors"))[0]
        tensors, stat = load_file(shard), shard.stat()
        kept = shard.read_bytes()
        try:
            save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
            xadapt.merge(made[1], made[0], resumed)
            assert_merged(resumed, made[1], made[0], tmp_path / "fresh")
        finally:
            shard.write_bytes(kept)
            os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def calls_before(count: int, action: Callable[[], object], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with `action` before its call of that number."""
    calls: list[object] = []

    def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == count:
            action()
        return function(*args, **options)

    return wrapped


def raising(error: BaseException) -> Callable[[], None]:
    def throw() -> None:
        raise error

    return throw


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class TestItLeavesNothing:
    @pytest.fixture
    def left(self, setup: Setup, tmp_path: Path, made: Setup) -> Any:
        """Checks that a merge fails so, and that a later one is right."""
        before = files_in(tmp_path)

        def check(error: type[BaseException], match: str | None = None, out: Path = setup[2], undo: Any = None) -> None:
            with pytest.raises(error, match=match):
                xadapt.merge(setup[1], setup[0], out)
            assert files_in(tmp_path) == before
            assert {path.name for path in tmp_path.iterdir()} == {"base"}
            if undo is not None:
                undo()
                xadapt.merge(setup[1], setup[0], out)
                assert_merged(out, setup[1], setup[0], tmp_path / "fresh")

        return check

    @pytest.mark.parametrize("action", [raising(KeyboardInterrupt()), press_ctrl_c], ids=["worker", "main thread"])
    def test_ctrl_c(self, action: Callable[[], None], left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        threads = torch.get_num_threads()
        wrapped = calls_before(3, action, merge_shard._write_change)
        monkeypatch.setattr(merge_shard, "_write_change", wrapped)
        left(KeyboardInterrupt, undo=monkeypatch.undo)
        assert torch.get_num_threads() == threads

    @pytest.mark.parametrize("where", ["posix_fallocate", "copy_file_range", "pwrite"])
    def test_a_full_disk(self, where: str, left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, where, calls_before(2, raising(ENOSPC), getattr(os, where)))
        left(OSError, "No space left", undo=monkeypatch.undo)

    def test_a_full_disk_at_the_small_files(self, left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "copyfile", calls_before(3, raising(ENOSPC), shutil.copyfile))
        left(OSError, "No space left", undo=monkeypatch.undo)

    def test_folders_made_on_the_way(self, setup: Setup, left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "posix_fallocate", calls_before(1, raising(ENOSPC), os.posix_fallocate))
        left(OSError, "No space left", setup[2].parent / "new" / "deep" / "merged", undo=None)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_read_only_parent(self, setup: Setup, left: Any) -> None:
        parent = setup[2].parent
        parent.chmod(0o500)
        try:
            left(PermissionError, "merged")
        finally:
            parent.chmod(0o700)

    def test_a_parent_that_forbids_it(self, left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same, for root."""
        monkeypatch.setattr(Path, "mkdir", calls_before(1, raising(PermissionError("read-only")), Path.mkdir))
        left(PermissionError, "read-only", undo=monkeypatch.undo)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_base_that_is_broken(self, bad: float, setup: Setup, left: Any) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        shard = setup[0] / index_of(setup[0])[name]
        tensors = load_file(shard)
        tensors[name][-1, -1] = bad
        save_file(tensors, shard, metadata={"format": "pt"})
        left(ValueError, "holds NaN or infinity")

    def test_a_sum_that_is_too_large(self, setup: Setup, tmp_path: Path) -> None:
        base = make_checkpoint(tmp_path / "half", make_llama(seed=4).half())
        adapter = make_adapter(tmp_path / "huge", LoraConfig(r=2, target_modules=["down_proj"]), std=300.0)
        with pytest.raises(ValueError, match=r"down_proj.weight with the adapter in it .*float16"):
            xadapt.merge(adapter, base, setup[2])
        assert {path.name for path in tmp_path.iterdir()} == {"base", "half", "huge"}

    @pytest.mark.parametrize("change", ["touched", "removed"])
    def test_a_base_that_changes_meanwhile(
        self, change: str, setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        config = setup[0] / "tokenizer.json"
        action = config.unlink if change == "removed" else lambda: config.write_text("[]")
        monkeypatch.setattr(WorkFolder, "copy", calls_before(6, action, WorkFolder.copy))
        message = "have changed while they were merged" if change == "touched" else r"tokenizer.json"
        with pytest.raises((ValueError, OSError), match=message):
            xadapt.merge(setup[1], setup[0], setup[2])
        assert {path.name for path in tmp_path.iterdir()} == {"base"}

    def test_a_base_that_gets_shorter(self, left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "copy_file_range", lambda *args: 0)
        left(ValueError, "became shorter", undo=monkeypatch.undo)


class TestWhatIsInTheWay:
    @pytest.mark.parametrize("what", ["folder", "empty folder", "file", "link to nothing"])
    def test_the_result_exists(self, what: str, setup: Setup) -> None:
        out = setup[2]
        if "folder" in what:
            (out / ("sub" if what == "folder" else "")).mkdir(parents=True)
        elif what == "file":
            out.write_text("x")
        else:
            out.symlink_to(out.with_name("nowhere"))
        for function in (xadapt.merge, xadapt.plan_merge):
            with pytest.raises(ValueError, match="merged exists already; choose a new folder"):
                function(setup[1], setup[0], out)
        assert not out.with_name(".merged.merging").exists()

    def test_the_result_comes_into_being(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        out = setup[2]
        monkeypatch.setattr(WorkFolder, "copy", calls_before(2, out.mkdir, WorkFolder.copy))
        with pytest.raises(ValueError, match="has come into being meanwhile"):
            xadapt.merge(setup[1], setup[0], out)
        assert not list(out.iterdir())
        assert not out.with_name(".merged.merging").exists()

    def test_another_merge_to_the_same_place(self, setup: Setup, tmp_path: Path) -> None:
        base, adapter, out = setup
        with WorkFolder(out, "of another") as work:
            (work.folder / "file").write_text("x")
            with pytest.raises(ValueError, match=r"Another merge is writing .*merged at this moment"):
                xadapt.merge(adapter, base, out)
            assert (work.folder / "file").read_text() == "x"
            work.finish()
        assert {path.name for path in out.iterdir()} == {"file"}

    def test_a_file_system_without_locks(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        refusal = raising(OSError(errno.ENOLCK, "No locks available"))
        monkeypatch.setattr(merge_files.fcntl, "flock", lambda *args: refusal())
        xadapt.merge(setup[1], setup[0], setup[2])
        assert setup[2].is_dir()

    def test_the_base_itself(self, setup: Setup) -> None:
        with pytest.raises(ValueError, match="lies in the base itself"):
            xadapt.merge(setup[1], setup[0], setup[0] / "merged")

    @pytest.mark.parametrize("end", ["finished", "failed"])
    def test_another_merge_that_ends_at_this_moment(
        self, end: str, setup: Setup, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its folder, locked after all, has gone: renamed or removed."""
        base, adapter, out = setup
        folder = out.with_name(".merged.merging")
        act = (lambda: folder.rename(out)) if end == "finished" else folder.rmdir
        monkeypatch.setattr(merge_files.fcntl, "flock", calls_before(1, act, merge_files.fcntl.flock))
        if end == "finished":
            with pytest.raises(ValueError, match="has come into being meanwhile"):
                xadapt.merge(adapter, base, out)
            assert not folder.exists()
        else:
            xadapt.merge(adapter, base, out)
            assert tensors_of(out).keys() == tensors_of(base).keys()


class TestBasesThatLeadAstray:
    @pytest.fixture
    def refused(self, setup: Setup, tmp_path: Path) -> Any:
        def check(match: str) -> None:
            with pytest.raises(ValueError, match=match):
                xadapt.merge(setup[1], setup[0], setup[2])
            assert {path.name for path in tmp_path.iterdir()} == {"base"}

        return check

    @pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors"])
    def test_a_shard_outside(self, name: str, setup: Setup, refused: Any) -> None:
        index = setup[0] / "model.safetensors.index.json"
        told = json.loads(index.read_text())
        told["weight_map"][next(iter(told["weight_map"]))] = name
        index.write_text(json.dumps(told))
        refused("which leaves its folder")

    def test_a_link_to_nothing(self, setup: Setup, refused: Any) -> None:
        (setup[0] / "vocab.txt").symlink_to("gone")
        refused("vocab.txt is a link to nothing")

    def test_a_link_in_a_circle(self, setup: Setup, refused: Any) -> None:
        (setup[0] / "extra" / "up").symlink_to("..")
        refused("up is a link to a folder that it is in")

    def test_a_quantised_one(self, setup: Setup, refused: Any) -> None:
        config = json.loads((setup[0] / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (setup[0] / "config.json").write_text(json.dumps(config))
        refused("is quantised")

    def test_a_live_one(self, setup: Setup) -> None:
        with pytest.raises(ValueError, match="is in memory"):
            xadapt.merge(setup[1], make_llama(), setup[2])


class TestWithoutHelpFromTheSystem:
    """macOS has neither call; file systems may refuse both, copies between two of them for one."""

    @pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS])
    def test_the_result_is_the_same(
        self, code: int | None, setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("posix_fallocate", "copy_file_range"):
            if code is None:
                monkeypatch.delattr(os, name)
            else:
                refusal = raising(OSError(code, "not here"))
                monkeypatch.setattr(os, name, lambda *args, refusal=refusal: refusal())
        monkeypatch.setattr(merge_shard, "BUFFER", 1000)
        xadapt.merge(setup[1], setup[0], setup[2])
        monkeypatch.undo()
        assert_merged(setup[2], setup[1], setup[0], tmp_path / "fresh")
