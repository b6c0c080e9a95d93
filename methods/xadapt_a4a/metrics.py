"""CLIP-I, CLIP-T and IDA, as A4A's Table 1 has them. The extra `xadapt[a4a-eval]` brings what IDA needs.

CLIP-I and CLIP-T are cosines of projected, normalised embeddings, image with image and image with text. They depend on the CLIP
model, so its name belongs beside every number. IDA is the cosine of face embeddings; insightface's antelopev2 weights are for
non-commercial research only, and are not part of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from math import nan
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = "openai/clip-vit-large-patch14"
_ANTELOPE = "https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip"


class Clip:
    """A CLIP model of transformers that embeds images and texts.

    Args:
        name: a folder or an id of the Hub; the paper does not say which one it used.
    """

    def __init__(self, name: str = CLIP, device: str | torch.device = "cpu", batch: int = 32) -> None:
        import transformers

        self.name, self.batch = name, batch
        given: Any = transformers
        self._model: Any = given.CLIPModel.from_pretrained(name).to(device).eval()
        # By name: the automatic choice asks for torchvision in transformers 5.12.
        self._pixels: Any = given.CLIPImageProcessorPil.from_pretrained(name)
        self._words: Any = given.AutoTokenizer.from_pretrained(name)

    def images(self, images: Sequence[Any]) -> Tensor:
        """Unit vectors (n, d) of PIL images."""
        return self._unit(
            images, lambda some: self._pixels(images=list(some), return_tensors="pt"), "get_image_features"
        )

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d); what exceeds CLIP's 77 tokens is cut off."""
        limit = self._model.config.text_config.max_position_embeddings

        def prepared(some: Sequence[str]) -> Any:
            return self._words(list(some), return_tensors="pt", padding=True, truncation=True, max_length=limit)

        return self._unit(texts, prepared, "get_text_features")

    @torch.no_grad()
    def _unit(self, given: Sequence[Any], prepare: Any, embed: str) -> Tensor:
        if not len(given):
            raise ValueError("There is nothing to embed: the list of images or texts is empty.")
        rows = []
        for start in range(0, len(given), self.batch):
            inputs = prepare(given[start : start + self.batch]).to(self._model.device)
            found = getattr(self._model, embed)(**inputs)
            rows.append(
                F.normalize(getattr(found, "pooler_output", found), dim=-1).cpu()
            )  # transformers 4 gave the tensor
        return torch.cat(rows)


def clip_i(clip: Clip, generated: Sequence[Any], references: Sequence[Any]) -> float:
    """CLIP-I: mean cosine of each generated image with the reference in its place."""
    _same_length(generated, references, "references")
    return float((clip.images(generated) * clip.images(references)).sum(-1).mean())


def clip_t(clip: Clip, generated: Sequence[Any], prompts: Sequence[str]) -> float:
    """CLIP-T: mean cosine of each generated image with the prompt in its place."""
    _same_length(generated, prompts, "prompts")
    return float((clip.images(generated) * clip.texts(prompts)).sum(-1).mean())


@dataclass(frozen=True)
class Identity:
    """IDA with the two treatments of images in which no face is found; the paper does not say which one it has."""

    found_only: float
    """Mean cosine over the pairs in which both faces were found; NaN where there is no such pair."""

    as_zero: float
    """The same over all pairs whose reference has a face, one without a generated face counting 0."""

    detected: float
    """The share of those pairs in which the generated face was found."""

    pairs: int
    """How many pairs have a face in the reference. The others say nothing and are left out."""


def ida(faces: Any, generated: Sequence[Any], references: Sequence[Any]) -> Identity:
    """Identity agreement of each generated PIL image with the reference in its place.

    Args:
        faces: from `face_analysis`, or anything whose `get` takes an image (height, width, BGR) and returns faces with `bbox` and
            `normed_embedding`.
    """
    _same_length(generated, references, "references")
    vectors = {id(one): embedding(faces, one) for one in (*generated, *references)}
    cosines = []
    for made, reference in zip(generated, references, strict=True):
        ours, theirs = vectors[id(made)], vectors[id(reference)]
        if theirs is not None:
            cosines.append(None if ours is None else float((ours * theirs).sum()))
    found = [cosine for cosine in cosines if cosine is not None]
    if not cosines:
        return Identity(nan, nan, nan, 0)
    return Identity(
        found_only=sum(found) / len(found) if found else nan,
        as_zero=sum(found) / len(cosines),
        detected=len(found) / len(cosines),
        pairs=len(cosines),
    )


def embedding(faces: Any, image: Any) -> Tensor | None:
    """The unit vector of the largest face in a PIL image, or None."""
    import numpy as np

    found = faces.get(np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1]))
    if not found:
        return None

    def area(face: Any) -> float:
        left, top, right, bottom = face.bbox[:4]
        return float((right - left) * (bottom - top))

    return torch.as_tensor(max(found, key=area).normed_embedding)


def face_analysis(root: str = "~/.insightface", size: int = 640) -> Any:
    """insightface's antelopev2 from <root>/models/antelopev2, ready for `ida`.

    Raises:
        ImportError: insightface is not installed.
        ValueError: the weights are not there.
    """
    folder = Path(root).expanduser() / "models" / "antelopev2"
    if not any(folder.glob("*.onnx")):
        nested = folder / "antelopev2"
        hint = (
            f"They lie one folder too deep, where insightface's own download leaves them: mv {nested}/*.onnx {folder}/"
            if any(nested.glob("*.onnx"))
            else f"Download {_ANTELOPE} and unpack the .onnx files there. They are for non-commercial research only."
        )
        raise ValueError(f"{folder} holds no antelopev2 weights. {hint}")
    try:
        FaceAnalysis: Any = import_module("insightface.app").FaceAnalysis
    except ImportError as error:
        raise ImportError(
            "IDA needs insightface and onnxruntime: pip install 'xadapt[a4a-eval]'. Its code is MIT-licensed, its weights are for "
            "non-commercial research only."
        ) from error
    analysis: Any = FaceAnalysis("antelopev2", root=str(Path(root).expanduser()))
    analysis.prepare(ctx_id=0 if torch.cuda.is_available() else -1, det_size=(size, size))
    return analysis


def _same_length(generated: Sequence[Any], others: Sequence[Any], name: str) -> None:
    if len(generated) != len(others):
        raise ValueError(f"There are {len(generated)} generated images and {len(others)} {name}; give one for each.")
