"""What all tiny pairs share: an autoencoder, a CLIP, a classifier, and the subjects' images, trained and drawn on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from benchmarks.dreambooth.scores import CLIP_PIXELS, IMAGENET_PIXELS
from benchmarks.dreambooth.tiny import models
from benchmarks.dreambooth.tiny.drawing import (
    COMBINATIONS,
    HELD_OUT,
    KNOWN,
    Scene,
    draw,
    label,
    labels,
    random_scene,
    subject_scenes,
    words,
)
from benchmarks.dreambooth.tiny.settings import TinySettings
from benchmarks.dreambooth.tiny.tokens import LENGTH, clip_tokenizer

SCENES = 5000
EVERY = tuple(pair for pair in COMBINATIONS if pair[0] != pair[1])


def make_world(settings: TinySettings, folder: Path, *, quiet: bool) -> dict[str, float]:
    """Writes autoencoder/, clip/, classifier/, dino/ and images/<subject>/NN.png; returns how good the judges are."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    scenes, pictures = drawn(SCENES, generator, EVERY)
    vae, moments = train_autoencoder(pictures, settings, generator, quiet)
    vae.register_to_config(scaling_factor=1 / moments[1], shift_factor=moments[0])
    vae.save_pretrained(folder / "autoencoder")
    clip = train_clip(scenes, pictures, settings, generator, quiet)
    clip.save_pretrained(folder / "clip")
    clip_tokenizer(words()).save_pretrained(folder / "clip")
    judge, accuracy = train_classifier(scenes, pictures, settings, generator, quiet)
    judge.save_pretrained(folder / "classifier")
    judge.vit.save_pretrained(folder / "dino")
    write_subjects(folder / "images", settings)
    return {
        "autoencoder_error": reconstruction_error(vae, pictures[:256]),
        "classifier_accuracy": accuracy,
        "classifier_accuracy_decoded": decoded_accuracy(judge, vae, scenes[-500:], pictures[-500:]),
    }


def drawn(count: int, generator: torch.Generator, colours: tuple[tuple[str, str], ...]) -> tuple[list[Scene], Tensor]:
    """Random scenes and their images (n, 3, 16, 16), 0 to 1."""
    scenes = [random_scene(generator, colours) for _ in range(count)]
    return scenes, torch.stack([draw(scene) for scene in scenes])


def write_subjects(folder: Path, settings: TinySettings) -> None:
    """The photographs, in the layout of the real data set."""
    from PIL import Image

    for index, subject in enumerate(HELD_OUT):
        generator = torch.Generator().manual_seed(1000 * settings.seed + index)
        own = folder / subject
        own.mkdir(parents=True)
        for number, scene in enumerate(subject_scenes(subject, settings.images_per_subject, generator)):
            pixels = (draw(scene).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).save(own / f"{number:02d}.png")


def train_autoencoder(
    pictures: Tensor, settings: TinySettings, generator: torch.Generator, quiet: bool
) -> tuple[Any, tuple[float, float]]:
    """The autoencoder, and mean and standard deviation of its latents."""
    vae = models.autoencoder().train()
    # A narrow posterior, as real autoencoders have: noise in the latents would be learnt with every subject.
    vae.quant_conv.bias.data[models.CHANNELS :] = -6.0

    def loss() -> Tensor:
        real = pictures[torch.randint(len(pictures), (16,), generator=generator)] * 2 - 1
        posterior = vae.encode(real).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = (vae.decode(latents).sample - real).abs().mean()
        loss: Tensor = error + 1e-6 * posterior.kl().mean()
        return loss

    minimise(vae, loss, settings.autoencoder_steps, 3e-3, "autoencoder", quiet)
    with torch.inference_mode():
        latents = vae.eval().encode(pictures[:512] * 2 - 1).latent_dist.mean
    return vae, (float(latents.mean()), float(latents.std()))


@torch.inference_mode()
def reconstruction_error(vae: Any, pictures: Tensor) -> float:
    """Mean absolute error of the decoded images, between 0 and 1."""
    decoded = vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mean).sample
    return float(((decoded.clamp(-1, 1) + 1) / 2 - pictures).abs().mean())


@torch.inference_mode()
def decoded_accuracy(classifier: Any, vae: Any, scenes: list[Scene], pictures: Tensor) -> float:
    """Share of images that are still known after the autoencoder: what a perfect denoiser could score as "subject"."""
    decoded = (vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) + 1) / 2
    found = classifier(standardised(decoded, IMAGENET_PIXELS)).logits.argmax(-1)
    wanted = torch.tensor([classifier.config.label2id[label(scene)] for scene in scenes])
    return float((found == wanted).float().mean())


def train_clip(
    scenes: list[Scene], pictures: Tensor, settings: TinySettings, generator: torch.Generator, quiet: bool
) -> Any:
    """Contrastively, on captions that name some of what is to be seen."""
    clip, tokenizer = models.clip().train(), clip_tokenizer(words())
    images = standardised(pictures, CLIP_PIXELS)

    def loss() -> Tensor:
        rows = torch.randint(len(scenes), (64,), generator=generator)
        captions = [scenes[row].caption(generator) for row in rows.tolist()]
        tokens = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        contrast: Tensor = clip(**given, pixel_values=images[rows], return_loss=True).loss
        return contrast

    minimise(clip, loss, settings.clip_steps, 1e-3, "CLIP", quiet)
    return clip.eval()


def train_classifier(
    scenes: list[Scene], pictures: Tensor, settings: TinySettings, generator: torch.Generator, quiet: bool
) -> tuple[Any, float]:
    """On real images of every label, subjects included; and its accuracy on images that it has not seen."""
    names = labels()
    classifier = models.classifier(names).train()
    index = {name: place for place, name in enumerate(names)}
    images = standardised(pictures, IMAGENET_PIXELS)
    wanted = torch.tensor([index[label(scene)] for scene in scenes])
    held_out = len(images) - 500

    def loss() -> Tensor:
        rows = torch.randint(held_out, (64,), generator=generator)
        # Generated images are noisy, and blurred by the autoencoder: some share of each image gives way to its blur.
        sharp, share = images[rows], torch.rand(len(rows), 1, 1, 1, generator=generator)
        worn = sharp + share * (avg_pool2d(sharp, 3, 1, 1, count_include_pad=False) - sharp)
        worn = worn + 0.15 * torch.randn(worn.shape, generator=generator)
        return cross_entropy(classifier(worn).logits, wanted[rows])

    minimise(classifier, loss, settings.classifier_steps, 1e-3, "classifier", quiet)
    with torch.inference_mode():
        found = classifier.eval()(images[held_out:]).logits.argmax(-1)
    return classifier, float((found == wanted[held_out:]).float().mean())


def standardised(pictures: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Pixels as the judges see them."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in statistics)
    return (pictures - mean) / std


def minimise(
    model: torch.nn.Module, loss: Callable[[], Tensor], steps: int, learning_rate: float, what: str, quiet: bool
) -> None:
    """AdamW with a short warm-up and a linear decay."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # tqdm has no types

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), desc=what, leave=False, disable=quiet):
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / 50, (steps - step) / steps * 1.2, 1.0)
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def known_scenes(count: int, generator: torch.Generator) -> tuple[list[Scene], Tensor]:
    """What the denoisers are trained on: no colours of a subject."""
    return drawn(count, generator, KNOWN)
