"""CLIP-I, CLIP-T on a small CLIP built here, IDA's bookkeeping on faces of known vectors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.a4a_clip import write_clip
from xadapt_a4a.metrics import Clip, clip_i, clip_t, embedding, face_analysis, ida


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(write_clip(tmp_path_factory.mktemp("clip")), batch=2)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def test_an_image_agrees_with_itself_and_less_with_others(clip: Clip) -> None:
    images = [picture(seed) for seed in range(3)]
    assert clip_i(clip, images, images) == pytest.approx(1, abs=1e-5)
    assert clip_i(clip, images, images[1:] + images[:1]) < 0.9999


def test_clip_i_and_clip_t_are_the_cosines_that_the_model_itself_gives(clip: Clip) -> None:
    images, texts = [picture(seed) for seed in range(3)], ["a b", "c", "d e f"]
    inputs = {
        **clip._words(texts, return_tensors="pt", padding=True),
        **clip._pixels(images=images, return_tensors="pt"),
    }
    with torch.no_grad():
        output = clip._model(**inputs)
    text, image = output.text_embeds, output.image_embeds  # CLIP's own, normalised
    assert clip_t(clip, images, texts) == pytest.approx(float((text * image).sum(-1).mean()), abs=1e-5)
    shifted = images[1:] + images[:1]
    expected = float((image * image[[1, 2, 0]]).sum(-1).mean())
    assert clip_i(clip, images, shifted) == pytest.approx(expected, abs=1e-5)


def test_long_prompts_are_cut_and_nothing_is_refused(clip: Clip) -> None:
    assert clip.texts(["a " * 50]).shape == (1, 12)
    with pytest.raises(ValueError, match="empty"):
        clip.images([])
    with pytest.raises(ValueError, match="1 generated images and 2 prompts"):
        clip_t(clip, [picture(0)], ["a", "b"])


class Faces:
    """Reads the faces off an image: each column of the first row holds the angle of one, in degrees, or 255 for none."""

    def get(self, image: np.ndarray) -> list[Any]:
        assert image.flags["C_CONTIGUOUS"]
        angles = [int(pixel[2]) for pixel in image[0]]  # BGR: red is last
        return [
            SimpleNamespace(
                bbox=np.array([0, 0, 1 + number, 1]),
                normed_embedding=np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))], np.float32),
            )
            for number, angle in enumerate(angles)
            if angle != 255
        ]


def faces_at(*angles: int) -> Image.Image:
    return Image.fromarray(np.array([[(angle, 7, 9) for angle in angles]], np.uint8))


def test_ida_is_the_cosine_of_the_largest_faces_with_both_treatments_of_missing_ones() -> None:
    generated = [faces_at(0, 60), faces_at(255), faces_at(90), faces_at(10)]
    references = [faces_at(0), faces_at(0), faces_at(90), faces_at(255)]
    found = ida(Faces(), generated, references)
    assert found.pairs == 3
    assert found.detected == pytest.approx(2 / 3)
    assert found.found_only == pytest.approx((0.5 + 1) / 2, abs=1e-6)
    assert found.as_zero == pytest.approx((0.5 + 0 + 1) / 3, abs=1e-6)


def test_ida_without_any_face_is_no_number() -> None:
    nobody = ida(Faces(), [faces_at(255)], [faces_at(0)])
    assert math.isnan(nobody.found_only)
    assert (nobody.as_zero, nobody.detected, nobody.pairs) == (0, 0, 1)
    assert ida(Faces(), [faces_at(0)], [faces_at(255)]).pairs == 0
    assert embedding(Faces(), faces_at(255)) is None


def test_missing_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no antelopev2 weights. Download .*non-commercial"):
        face_analysis(str(tmp_path))
    nested = tmp_path / "models" / "antelopev2" / "antelopev2"
    nested.mkdir(parents=True)
    (nested / "scrfd.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="one folder too deep"):
        face_analysis(str(tmp_path))


def test_a_missing_insightface_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "antelopev2"
    folder.mkdir(parents=True)
    (folder / "scrfd.onnx").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "insightface.app", None)
    with pytest.raises(ImportError, match=r"xadapt\[a4a-eval\]"):
        face_analysis(str(tmp_path))
