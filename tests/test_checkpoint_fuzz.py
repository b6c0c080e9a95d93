"""Damaged headers, indexes and configs either open or are refused with a ValueError: nothing else comes out."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_llama
from xadapt.base import open_base
from xadapt.checkpoint import Checkpoint

fuzzed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
# No large numbers: a config may rightly ask for a million layers, and building them takes its time.
scalars = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=5) | st.just("../model.safetensors")
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)
numbers = st.integers(0, 300) | st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63, 2**64, 2**70, 10**30])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_llama(layers=1).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def read_all(folder: Path) -> None:
    with suppress(ValueError):
        checkpoint = Checkpoint.open(folder)
        for name, entry in checkpoint.entries.items():
            tensor = checkpoint[name]
            assert (tuple(tensor.shape), tensor.dtype, tensor.nbytes) == (entry.shape, entry.dtype, entry.nbytes)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in parsed JSON."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from places(inner)


def mutate(data: st.DataObject, parsed: Any, values: st.SearchStrategy[Any]) -> None:
    """Changes, removes or adds something somewhere, up to three times."""
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(list(places(parsed)) or [(parsed, "a")]))
        if isinstance(container, dict) and data.draw(st.booleans()):
            container.pop(key, None)
        else:
            container[key] = data.draw(values)


@fuzzed
@given(data=st.data())
def test_bytes(folder: Path, original: Path, data: st.DataObject) -> None:
    """Bits flipped, and the end cut off, in a shard's head."""
    name = sorted(file.name for file in original.glob("*.safetensors"))[0]
    raw = bytearray((original / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    (folder / name).write_bytes(raw)
    read_all(folder)


@fuzzed
@given(data=st.data())
def test_headers(folder: Path, original: Path, data: st.DataObject) -> None:
    name = sorted(file.name for file in original.glob("*.safetensors"))[0]
    raw = (original / name).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    mutate(data, header, anything | numbers | st.sampled_from(["F4", "F64", "I8", "F8_E8M0", "C64", "F6_E2M3"]))
    text = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    read_all(folder)


@fuzzed
@given(data=st.data())
def test_any_file_alone(tmp_path: Path, data: st.DataObject) -> None:
    """Small headers that are right in form, so that more of them get past the first checks."""
    dtype = st.sampled_from(["F4", "F16", "F64", "I8", "F8_E8M0", "C64", "BOOL", "F6_E2M3"])
    shape, offsets = st.lists(numbers, max_size=3), st.lists(numbers, min_size=2, max_size=2)
    entry = st.fixed_dictionaries({"dtype": dtype, "shape": shape, "data_offsets": offsets})
    header = data.draw(st.dictionaries(st.text(max_size=3), entry, max_size=3))
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data.draw(st.integers(0, 64))))
    read_all(path)


@fuzzed
@given(data=st.data())
def test_indexes(folder: Path, original: Path, data: st.DataObject) -> None:
    name = "model.safetensors.index.json"
    index = json.loads((original / name).read_text())
    shards = st.sampled_from([file.name for file in original.iterdir()])
    mutate(data, index, anything | shards)
    (folder / name).write_text(json.dumps(index))
    read_all(folder)


@settings(fuzzed, max_examples=60)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # configs are warned about in many ways
def test_configs(folder: Path, original: Path, data: st.DataObject) -> None:
    config = json.loads((original / "config.json").read_text())
    mutate(data, config, anything | st.sampled_from(["gpt2", "GPT2Model", "AutoModel", "torchao", "float16"]))
    if data.draw(st.booleans()):
        config[data.draw(st.sampled_from(["quantization_config", "auto_map", "_class_name"]))] = data.draw(anything)
    (folder / "config.json").write_text(json.dumps(config))
    with suppress(ValueError):
        base = open_base(folder)
        weights = base.weights()
        for name in weights:
            with suppress(ValueError):
                weights[name]
