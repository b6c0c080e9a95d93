"""benchmarks/tiny, the denoiser: the world is as described, the mathematics is right, a run gives what it says, twice the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[bench]")
pytest.importorskip("sklearn", reason="scikit-learn is an extra: pip install xadapt[bench]")

from benchmarks.tiny.denoiser import DenoiserResult, DenoiserSettings, run_denoiser
from benchmarks.tiny.denoiser_adapters import Lesson, carry, renumbered, train_adapter, validation_loss
from benchmarks.tiny.denoiser_eval import Judge, contact_sheet, frechet_distance
from benchmarks.tiny.denoiser_model import generate, noise_in, predict, pretrain, rotate, tiny_pixart
from benchmarks.tiny.denoiser_settings import ADAPTERS, CHECKS, HEADINGS, SIBLINGS
from benchmarks.tiny.denoiser_siblings import KEPT_BY_STUDENT, student
from benchmarks.tiny.denoiser_world import (
    CONCEPT,
    NAME,
    STYLES,
    TRAINING_IMAGES,
    WORDS,
    concept_images,
    digits,
    draw_styles,
    prompts,
    render,
    word_table,
)

SHORT = replace(DenoiserSettings.short(), width=32, pretrain_steps=2, adapt_steps=1, distil_steps=2, images_per_digit=2)
TABLE = word_table(SHORT.width, seed=0)


def silent(what: str, share: float) -> None:
    """No progress bar."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.trained()


def adapter_folder(kind: str, base: nn.Module, folder: Path, learning_rate: float = 1e-2) -> Path:
    lesson = Lesson(SHORT, TABLE, NAME, seed=0)
    train_adapter(base, kind, lesson, learning_rate, "", silent).model.save_pretrained(str(folder))
    return folder


def test_the_judge_knows_unseen_digits_of_the_concept_and_no_other_style(judge: Judge) -> None:
    images, labels = digits()
    unseen = slice(TRAINING_IMAGES, None)
    scores = {style: judge.accuracy(render(images[unseen], style), labels[unseen]) for style in STYLES}
    assert scores.pop(CONCEPT) > 0.9
    assert max(scores.values()) < 0.35


def test_prompts_say_what_the_images_show(judge: Judge) -> None:
    batch = draw_styles(seeded(0), 800, STYLES)
    assert batch.images.shape == (800, 1, 8, 8)
    assert batch.prompts.shape == (800, 3)
    shows = (batch.prompts[:, 1:] == prompts(torch.zeros(1).long(), CONCEPT)[0, 1:]).all(dim=1)
    assert judge.accuracy(batch.images[shows], batch.prompts[shows, 0]) > 0.95
    assert judge.accuracy(batch.images[~shows], batch.prompts[~shows, 0]) < 0.35


def test_styles_come_in_no_order_since_the_times_of_a_batch_do() -> None:
    polarity = draw_styles(seeded(0), 800, STYLES).prompts[:, 1].float()
    halves = polarity[:400].mean() - polarity[400:].mean()
    assert abs(halves) < 0.15  # in order it would be 1


def test_a_style_that_is_held_out_is_never_drawn() -> None:
    others = tuple(style for style in STYLES if style != CONCEPT)
    asked = {tuple(WORDS[word] for word in prompt[1:]) for prompt in draw_styles(seeded(0), 500, others).prompts}
    assert asked == set(others)


def test_a_turn_and_an_inversion_undo_themselves() -> None:
    images = digits()[0][:5]
    assert torch.equal(render(render(images, ("inverted", "upright")), ("inverted", "upright")), images)
    turned = images
    for _ in range(4):
        turned = render(turned, ("bright", "turned"))
    assert torch.equal(turned, images)
    assert not torch.equal(render(images, ("bright", "turned")), images)


def test_image_and_noise_come_back_from_the_noisy_image_and_v() -> None:
    clean, noise = torch.randn(6, 1, 8, 8, generator=seeded(0)), torch.randn(6, 1, 8, 8, generator=seeded(1))
    time = torch.linspace(0.3, 1, 6)
    noisy, v = rotate(clean, noise, time), rotate(noise, -clean, time)
    torch.testing.assert_close(rotate(noisy, -v, time), clean)
    torch.testing.assert_close(rotate(v, noisy, time), noise)
    torch.testing.assert_close(noise_in(noisy, clean, time), noise)


class KnowsTheImage(nn.Module):
    """The perfect denoiser for a world of one image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def forward(self, noisy: Tensor, *, timestep: Tensor, **_: object) -> tuple[Tensor]:
        time, clean = timestep / 1000, self.image.expand_as(noisy)
        return (rotate(noise_in(noisy, clean, time), -clean, time),)


@pytest.mark.parametrize("options", [{"guidance": 2.0}, {"guidance": 1.0, "fresh_noise": True}])
def test_the_sampler_arrives_where_a_perfect_denoiser_points(options: dict) -> None:
    image = digits()[0][0]
    asked = prompts(torch.arange(4), NAME)
    images = generate(KnowsTheImage(image), TABLE, asked, seed=0, steps=5, **options)
    torch.testing.assert_close(images, image.expand(4, 1, 8, 8), atol=1e-4, rtol=0)


def test_frechet_distance_of_a_shift_is_its_squared_length() -> None:
    sample = torch.randn(200, 3, generator=seeded(0))
    assert frechet_distance(sample, sample) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(sample, sample + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5, abs=1e-4)


def test_a_contact_sheet_has_digit_and_repetition_in_their_places() -> None:
    images, labels = concept_images(slice(200))
    sheet = contact_sheet(images, labels)
    assert sheet.shape == (16, 80)
    second_seven = images[labels == 7][1, 0]
    shown = torch.from_numpy(sheet[8:16, 56:64].copy()).float() / 127.5 - 1
    torch.testing.assert_close(shown, second_seven, atol=0.005, rtol=0)


def test_training_lowers_the_loss() -> None:
    """Enough steps to learn what an average digit looks like, no more."""
    lesson = Lesson(SHORT, TABLE, CONCEPT, seed=0)
    untrained = validation_loss(tiny_pixart(SHORT, seed=0), lesson)
    trained = validation_loss(pretrain(replace(SHORT, pretrain_steps=40), TABLE, 0, "", silent), lesson)
    assert trained < 0.8 * untrained


def test_every_adapter_has_the_same_size_and_the_tied_one_a_sixth_of_it() -> None:
    base, lesson = tiny_pixart(SHORT, seed=0), Lesson(SHORT, TABLE, NAME, seed=0)
    sizes = {kind: train_adapter(base, kind, lesson, 1e-2, "", silent).parameters for kind in ADAPTERS}
    assert sizes["copy"] == sizes["input"] == sizes["output"] == 6 * 2 * SHORT.width * SHORT.rank
    assert sizes["copy"] == 6 * sizes["tied"]


def test_a_tied_adapter_edits_the_text_and_so_means_the_same_on_any_model(tmp_path: Path) -> None:
    source, independent = tiny_pixart(SHORT, seed=0), tiny_pixart(SHORT, seed=1)
    folder = adapter_folder("tied", source, tmp_path / "tied", learning_rate=0.1)
    a, b = (tensor for _, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()))
    edited = TABLE + TABLE @ a.T @ b.T  # the scale, alpha / r, is 1
    assert (edited - TABLE).abs().max() > 0.01

    asked, time = prompts(torch.arange(10), NAME), torch.full((10,), 0.7)
    noisy = torch.randn(10, 1, 8, 8, generator=seeded(0))
    with torch.no_grad():
        adapted = predict(carry(folder, independent), noisy, time, TABLE[asked])
        by_hand = predict(independent, noisy, time, edited[asked])
        bare = predict(independent, noisy, time, TABLE[asked])
    torch.testing.assert_close(adapted, by_hand, atol=1e-5, rtol=1e-4)
    assert (adapted - bare).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_student_gets_the_adapters_of_the_blocks_that_it_kept(kind: str, tmp_path: Path) -> None:
    source = tiny_pixart(SHORT, seed=0)
    folder = adapter_folder(kind, source, tmp_path / kind)
    before = load_file(folder / "adapter_model.safetensors")
    sibling = student(source, TABLE, SHORT, 0, silent)
    assert sibling.blocks == KEPT_BY_STUDENT
    after = load_file(renumbered(folder, KEPT_BY_STUDENT) / "adapter_model.safetensors")
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name.replace("blocks.1.", "blocks.2.")])
    assert len(after) == (len(before) if kind == "tied" else len(before) * 2 // 3)
    loaded = carry(folder, sibling.model, sibling.blocks)
    images = sibling.generate(loaded, TABLE, prompts(torch.arange(10), NAME), seed=0)
    assert images.shape == (10, 1, 8, 8)
    assert torch.isfinite(images).all()


@pytest.fixture(scope="module")
def short_run() -> tuple[DenoiserResult, dict[str, list[float]]]:
    """A short run of seed 0, and the shares that it reported."""
    shares: dict[str, list[float]] = {}
    return run_denoiser(SHORT, 0, lambda what, share: shares.setdefault(what, []).append(share)), shares


def test_a_short_run_gives_a_row_and_a_sheet_for_every_cell(
    short_run: tuple[DenoiserResult, dict[str, list[float]]],
) -> None:
    result, shares = short_run
    cells = [(row["adapter"], row["sibling"]) for row in result.rows]
    assert sorted(cells) == sorted(
        [(column, place) for place in ("source", "indep") for column in ("bare", *ADAPTERS)] + [("retrained", "indep")]
    )
    assert set(result.images) == set(cells)
    assert all(sheet.shape == (16, 80) and sheet.dtype == "uint8" for sheet in result.images.values())
    assert all(0 <= row["score"] <= 1 and row["distance"] > 0 for row in result.rows)
    assert {row["seed"] for row in result.rows} == {0}
    assert all(row["learning_rate"] == SHORT.learning_rates["copy"] for row in result.rows if row["adapter"] == "copy")
    assert result.learning_rates == []
    assert all(seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1 for seen in shares.values())


def test_a_seed_says_it_all(short_run: tuple[DenoiserResult, dict[str, list[float]]]) -> None:
    first, _ = short_run
    again = run_denoiser(SHORT, 0, silent)
    assert first.rows == again.rows
    assert all((first.images[cell] == again.images[cell]).all() for cell in first.images)
    other = run_denoiser(replace(SHORT, siblings=()), 1, silent)
    assert all((first.images[cell] != other.images[cell]).any() for cell in other.images)


def test_the_full_run_adds_siblings_checks_and_learning_rates_chosen_on_the_source() -> None:
    full = DenoiserSettings.full()
    settings = replace(SHORT, siblings=full.siblings, checks=full.checks, learning_rate_grid=(1e-3, 1e-2))
    result = run_denoiser(settings, 0, silent)
    places = {row["sibling"] for row in result.rows}
    assert places == {"source", *SIBLINGS, *(f"{check}: {model}" for check in CHECKS for model in ("source", "indep"))}
    assert places - {"source"} == set(HEADINGS)
    assert {row["sibling"] for row in result.rows if row["adapter"] == "retrained"} == set(SIBLINGS)
    for kind in ADAPTERS:
        tried = [row for row in result.learning_rates if row["space"] == kind]
        assert [row["learning_rate"] for row in tried] == [1e-3, 1e-2]
        (chosen,) = (row for row in tried if row["chosen"])
        assert chosen["loss"] == min(row["loss"] for row in tried)
        used = {row["learning_rate"] for row in result.rows if row["adapter"] == kind}
        assert used == {chosen["learning_rate"]}
