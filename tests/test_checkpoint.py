"""Checkpoints on disk: every layout is read without a copy, and every kind of damage is told by the file's name."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import make_llama
from xadapt.checkpoint import Checkpoint

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(4, dtype=torch.int8), "empty": torch.empty(0, 5)}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def described(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=re.escape(path.name.partition(".")[0])) as caught:
        Checkpoint.open(path, **options)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> Path:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return path


class TestReading:
    def test_a_folder(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        assert set(checkpoint) == set(TENSORS)
        assert len(checkpoint) == 3
        assert all(torch.equal(checkpoint[name], tensor) for name, tensor in TENSORS.items())
        assert checkpoint.shards == [folder / "model.safetensors"]
        assert checkpoint.index is None
        assert checkpoint.metadata(checkpoint.shards[0]) == {"format": "pt"}

    def test_entries_in_file_order(self, folder: Path) -> None:
        entries = Checkpoint.open(str(folder)).entries
        assert entries["b"].dtype is torch.float32
        assert entries["b"].shape == (2, 3)
        assert entries["b"].nbytes == 24
        assert entries["b"].shard == folder / "model.safetensors"
        with_data = [name for name in entries if entries[name].nbytes]
        assert with_data == ["b", "a"]  # safetensors puts wider types first

    def test_any_one_file(self, tmp_path: Path) -> None:
        save_file(TENSORS, tmp_path / "some.safetensors")
        assert torch.equal(Checkpoint.open(tmp_path / "some.safetensors")["b"], TENSORS["b"])
        assert "name the file" in refused(tmp_path)

    def test_shards(self, sharded: Path) -> None:
        checkpoint = Checkpoint.open(sharded)
        state = make_llama().state_dict()
        assert len(checkpoint.shards) > 2
        assert checkpoint.shards == sorted(sharded.glob("model-*.safetensors"))
        assert checkpoint.index == sharded / "model.safetensors.index.json"
        assert set(checkpoint) == set(state)
        assert all(torch.equal(checkpoint[name], state[name]) for name in checkpoint)

    def test_symlinked_shards(self, sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        cache = tmp_path_factory.mktemp("cache")
        for file in sharded.iterdir():
            (cache / file.name).symlink_to(file)
        assert set(Checkpoint.open(cache)) == set(Checkpoint.open(sharded))

    def test_the_full_one_before_a_variant(self, folder: Path) -> None:
        save_file({"half": torch.zeros(1)}, folder / "model.fp16.safetensors")
        assert set(Checkpoint.open(folder)) == set(TENSORS)
        assert set(Checkpoint.open(folder, variant="fp16")) == {"half"}
        assert "one without variant=, variant='fp16'" in refused(folder, variant="bf16")
        (folder / "model.safetensors").unlink()
        assert "variant='fp16'" in refused(folder)

    @pytest.mark.parametrize(
        "shard", ["model.fp16-00001-of-00001.safetensors", "model-00001-of-00001.fp16.safetensors"]
    )
    def test_a_sharded_variant(self, folder: Path, shard: str) -> None:
        save_file({"half": torch.zeros(1)}, folder / shard)
        (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": {"half": shard}}))
        assert set(Checkpoint.open(folder, variant="fp16")) == {"half"}

    def test_every_dtype(self, tmp_path: Path) -> None:
        dtypes = [
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.float8_e8m0fnu,
            torch.uint16,
            torch.bool,
        ]
        tensors = {str(dtype): torch.zeros(2, 4, dtype=torch.uint8).to(dtype) for dtype in dtypes}
        tensors["fp4"] = torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        tensors["complex"] = torch.zeros(3, dtype=torch.complex64)
        save_file(tensors, tmp_path / "model.safetensors")
        checkpoint = Checkpoint.open(tmp_path)
        for name, tensor in tensors.items():
            entry, read = checkpoint.entries[name], checkpoint[name]
            assert (entry.dtype, entry.shape, entry.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)

    def test_an_unknown_name_is_a_key_error(self, folder: Path) -> None:
        with pytest.raises(KeyError):
            Checkpoint.open(folder)["c"]

    def test_look_ups_from_threads(self, sharded: Path) -> None:
        checkpoint, state = Checkpoint.open(sharded), make_llama().state_dict()
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda name: (name, checkpoint[name]), [*checkpoint] * 20))
        assert all(torch.equal(tensor, state[name]) for name, tensor in read)

    def test_a_look_up_copies_nothing(self, tmp_path: Path, run_python: Callable[..., str]) -> None:
        save_file({"a": torch.zeros(8_000_000), "b": torch.ones(8_000_000)}, tmp_path / "model.safetensors")
        code = f"""
import torch
from xadapt.checkpoint import Checkpoint

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind)) / 1024

checkpoint = Checkpoint.open({str(tmp_path)!r})
checkpoint["a"][:1].sum()
anonymous, file = resident("RssAnon"), resident("RssFile")
total = checkpoint["b"].sum()
assert total == 8_000_000
print(resident("RssAnon") - anonymous, resident("RssFile") - file)
"""
        if not Path("/proc/self/status").exists():
            pytest.skip("only Linux tells")
        anonymous, file = map(float, run_python(code, OMP_NUM_THREADS="1").split())
        assert anonymous < 4  # MB, of a tensor of 32
        assert file < 40


class TestDamage:
    @pytest.mark.parametrize(
        ("header", "data", "said"),
        [
            (b'{"a": ', b"", "is not JSON"),
            (b"\xff\xfe", b"", "is not JSON"),
            (b"[" * 100_000, b"", "is not JSON"),
            ([1], b"", "holds a JSON list"),
            ({"a": 1}, b"", "is not described by"),
            ({"a": {"dtype": "F32"}}, b"", "is not described by"),
            ({"a": described("F31")}, bytes(8), "torch has no counterpart"),
            ({"a": described(["F32"])}, bytes(8), "torch has no counterpart"),
            ({"a": described("F6_E2M3")}, bytes(8), "torch has no counterpart"),
            ({"a": described(shape=[-2])}, bytes(8), "has the shape"),
            ({"a": described(shape=[True, 2])}, bytes(8), "has the shape"),
            ({"a": described(shape=[2.0])}, bytes(8), "has the shape"),
            ({"a": described(shape=[0, 2**70], offsets=[0, 0])}, b"", "has the shape"),
            ({"a": described(offsets=[8, 0])}, bytes(8), "has the data_offsets"),
            ({"a": described(offsets=[0])}, bytes(8), "has the data_offsets"),
            ({"a": described(shape=[3])}, bytes(8), "does not take 8 bytes"),
            ({"a": described("F4", [3, 1], [0, 2])}, bytes(2), "does not take"),
            ({"a": described("F4", [2, 1], [0, 1])}, bytes(1), "must be even"),
            ({"a": described()}, bytes(7), "cut short"),
            ({"a": described()}, bytes(9), "belong to no tensor"),
            ({"a": described(offsets=[4, 12])}, bytes(12), "a hole of 4 bytes"),
            ({"a": described(), "b": described(offsets=[12, 20])}, bytes(20), "a hole of 4 bytes"),
            ({"a": described(), "b": described(offsets=[4, 12])}, bytes(12), "'b' overlaps 'a'"),
            ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
            (b'{"a": 1, "a": 1}', b"", "the key 'a' twice"),
            (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "the key 'dtype' twice"),
        ],
    )
    def test_of_the_header(self, tmp_path: Path, header: Any, data: bytes, said: str) -> None:
        assert said in refused(write(tmp_path / "model.safetensors", header, data))

    def test_of_the_length(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        assert "100,000,000 are allowed" in refused(write(path, {}, length=2**63))
        assert "cut short" in refused(write(path, {}, length=3))
        path.write_bytes(b"123")
        assert "cut short" in refused(path)
        path.write_bytes(b"")
        assert "cut short" in refused(path)

    def test_no_file(self, tmp_path: Path) -> None:
        assert "is not there" in refused(tmp_path / "model.safetensors")
        assert "holds nothing" in refused(tmp_path)
        (tmp_path / "notes.txt").touch()
        assert "holds notes.txt" in refused(tmp_path)
        assert "should end in .safetensors" in refused(tmp_path / "notes.txt")

    def test_a_variant_of_one_file(self, folder: Path) -> None:
        assert "leave variant out" in refused(folder / "model.safetensors", variant="fp16")

    def test_two_models_in_a_folder(self, folder: Path) -> None:
        save_file(TENSORS, folder / "diffusion_pytorch_model.safetensors")
        assert "holds two models" in refused(folder)

    def test_a_file_that_is_gone_later(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="has it changed or gone"):
            checkpoint["a"]


class TestIndex:
    def message(self, folder: Path) -> str:
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json") as caught:
            Checkpoint.open(folder)
        return str(caught.value)

    def test_naming_a_missing_shard(self, sharded: Path) -> None:
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        shard.unlink()
        assert f"not there: {shard.name}" in self.message(sharded)

    def test_naming_a_tensor_that_the_shard_lacks(self, sharded: Path) -> None:
        edit_index(sharded, lambda files: files.update(stranger=files["model.norm.weight"]))
        assert "their shards lack: stranger" in self.message(sharded)

    def test_naming_the_wrong_shard(self, sharded: Path) -> None:
        other = Checkpoint.open(sharded).shards[0].name
        edit_index(sharded, lambda files: files.update({"model.norm.weight": other}))
        assert "model.norm.weight" in self.message(sharded)

    def test_silent_about_a_tensor(self, sharded: Path) -> None:
        edit_index(sharded, lambda files: files.pop("model.norm.weight"))
        assert "it does not name: model.norm.weight" in self.message(sharded)

    def test_a_tensor_in_two_shards(self, sharded: Path) -> None:
        first = Checkpoint.open(sharded).shards[0]
        shutil.copy(first, sharded / "again.safetensors")
        edit_index(sharded, lambda files: files.update(again="again.safetensors"))
        with pytest.raises(ValueError, match=r"is in .*again\.safetensors and in"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize(
        "name",
        [
            "../model.safetensors",
            "/etc/model.safetensors",
            "a/../../m.safetensors",
            "..\\m.safetensors",
            "C:m.safetensors",
        ],
    )
    def test_that_leaves_the_folder(self, sharded: Path, name: str) -> None:
        edit_index(sharded, lambda files: files.update({"model.norm.weight": name}))
        assert "leaves its folder" in self.message(sharded)

    @pytest.mark.parametrize("name", [3, None, ["model.safetensors"], "", "model.bin", "a\0.safetensors"])
    def test_that_names_no_file(self, sharded: Path, name: Any) -> None:
        edit_index(sharded, lambda files: files.update({"model.norm.weight": name}))
        self.message(sharded)

    def test_that_names_a_file_longer_than_names_may_be(self, sharded: Path) -> None:
        edit_index(sharded, lambda files: files.update({"model.norm.weight": "x" * 999 + ".safetensors"}))
        with pytest.raises(ValueError, match="cannot be read"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": "x", "a": "y"}}', "{"])
    def test_that_is_none(self, sharded: Path, text: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(text)
        self.message(sharded)

    def test_lost(self, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").unlink()
        with pytest.raises(ValueError, match=r"shards .* but no index"):
            Checkpoint.open(sharded)


class TestPickles:
    @pytest.fixture
    def pickled(self, tmp_path: Path) -> Path:
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
        return tmp_path

    def test_need_the_flag(self, pickled: Path) -> None:
        assert "allow_pickle=True" in refused(pickled)
        assert "allow_pickle=True" in refused(pickled / "pytorch_model.bin")
        checkpoint = Checkpoint.open(pickled, allow_pickle=True)
        assert all(torch.equal(checkpoint[name], tensor) for name, tensor in TENSORS.items())
        assert checkpoint.entries["b"].nbytes == 24
        assert checkpoint.metadata(checkpoint.shards[0]) == {}

    def test_come_after_safetensors(self, pickled: Path) -> None:
        save_file({"safe": torch.zeros(1)}, pickled / "model.safetensors")
        assert set(Checkpoint.open(pickled, allow_pickle=True)) == {"safe"}

    def test_sharded(self, pickled: Path) -> None:
        (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model-00001-of-00001.bin")
        index = {"weight_map": dict.fromkeys(TENSORS, "pytorch_model-00001-of-00001.bin")}
        (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert "allow_pickle=True" in refused(pickled)
        assert set(Checkpoint.open(pickled, allow_pickle=True)) == set(TENSORS)

    def test_that_hold_code_do_not_run_it(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "sprung",)

        torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
        assert "holds more than tensors" in refused(tmp_path / "pytorch_model.bin", allow_pickle=True)
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("content", [[TENSORS["a"]], {"state_dict": TENSORS}, {"step": 3}, {3: TENSORS["a"]}])
    def test_of_something_else(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "pytorch_model.bin")
        refused(tmp_path / "pytorch_model.bin", allow_pickle=True)

    def test_damaged(self, pickled: Path) -> None:
        path = pickled / "pytorch_model.bin"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert "is damaged" in refused(path, allow_pickle=True)
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
        assert "before torch 1.6" in refused(path, allow_pickle=True)


def test_tensors_are_views_of_the_file(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    first: Tensor = checkpoint["b"]
    assert first.data_ptr() == checkpoint["b"].data_ptr()
    first += 1
    assert torch.equal(Checkpoint.open(folder)["b"], TENSORS["b"])  # the file stays as it is
