"""Every sort of data, with every verb that takes data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xadapt
from tests.conftest import make_llama, make_unet
from tests.data_models import WORDS, with_tokenizer, with_vae
from tests.verb_models import drifted, lora_folder, unet_lora_folder
from xadapt.data import Amount

LINES = [" ".join(WORDS[:10]) for _ in range(6)]
IDS = torch.arange(64).reshape(4, 16) % len(WORDS)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("words")
    for name in ("source", "target"):
        with_tokenizer(work / name)
    drifted(make_llama()).save_pretrained(work / "target")
    lora_folder(work / "lora")
    (work / "lines.txt").write_text("\n".join(LINES))
    (work / "lines.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    return work


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
    from PIL import Image

    work = tmp_path_factory.mktemp("pictures")
    with_vae(work / "source", make_unet())
    with_vae(work / "target", drifted(make_unet()))
    unet_lora_folder(work / "lora")
    (work / "folder").mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (9, 9), colour).save(work / "folder" / f"{number}.png")
    return work


def rows_of(work: Path, name: str) -> Any:
    datasets = pytest.importorskip("datasets", reason="datasets is an extra: pip install xadapt[data]")
    if name == "text":
        return datasets.Dataset.from_dict({"text": LINES})
    from PIL import Image

    pictures = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    return datasets.Dataset.from_dict({"image": pictures})


def everything(work: Path, out: Path, data: Callable[[], Any], **settings: Any) -> None:
    """check, a method that aligns, one that trains, and verify; with what each says of the data."""
    lora, source, target = work / "lora", work / "source", work / "target"
    checked = xadapt.check(lora, source, target, data(), **settings)
    assert checked.data is not None
    assert all(layer.inputs_moved is not None for layer in checked.layers)
    for method, options in (("aligned", {"method_map": "identity"}), ("distil", {"steps": 1})):
        carried = xadapt.transfer(lora, source, target, method, out=out / method, data=data(), **options, **settings)
        assert carried.data == checked.data
        assert len(carried.layers) == len(checked.layers)
    verified = xadapt.verify(source, target, lora, out / "aligned", data(), **settings)
    assert verified.data == checked.data
    scores = {row.name: row.agreement.score for row in verified.rows if row.agreement is not None}
    assert scores["transferred"] == pytest.approx(scores["copy"], abs=1e-3)  # which an identity is


@pytest.mark.parametrize("kind", ["text file", "JSONL file", "dataset", "texts", "ids", "batches", "generator"])
def test_language_models(kind: str, words: Path, tmp_path: Path) -> None:
    data: dict[str, Callable[[], Any]] = {
        "text file": lambda: words / "lines.txt",
        "JSONL file": lambda: str(words / "lines.jsonl"),
        "dataset": lambda: rows_of(words, "text"),
        "texts": lambda: LINES,
        "ids": lambda: IDS,
        "batches": lambda: [{"input_ids": IDS}],
        "generator": lambda: ({"input_ids": part} for part in IDS.split(2)),
    }
    everything(words, tmp_path, data[kind])


@pytest.mark.parametrize("kind", ["folder", "dataset", "random", "batches"])
def test_denoisers(kind: str, pictures: Path, tmp_path: Path) -> None:
    def batches() -> Any:
        base = xadapt.open_base(pictures / "target", component="unet")
        return list(xadapt.data.open_data("random", base, base, Amount(samples=2)))

    data: dict[str, Callable[[], Any]] = {
        "folder": lambda: pictures / "folder",
        "dataset": lambda: rows_of(pictures, "image"),
        "random": lambda: "random",
        "batches": batches,
    }
    few = {} if kind == "batches" else {"amount": Amount(samples=2)}
    everything(pictures, tmp_path, data[kind], component="unet", **few)


def test_denoisers_with_neutral_pictures(pictures: Path, tmp_path: Path) -> None:
    given = {"component": "unet", "amount": Amount(samples=2), "data": pictures / "folder", "neutral": "random"}
    lora, source, target = (pictures / name for name in ("lora", "source", "target"))
    carried = xadapt.transfer(lora, source, target, "auto", candidates="copy", gain=0, out=tmp_path / "out", **given)
    assert "beside them, not to be judged by, 2 random latents" in str(carried.data)
