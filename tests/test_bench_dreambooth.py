"""benchmarks/dreambooth: what is read and planned, the noise, the losses, what is scored; and all of it end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.dreambooth.driver import DRIVER
from benchmarks.dreambooth.examples import crop
from benchmarks.dreambooth.images import subject_images
from benchmarks.dreambooth.noise import Diffusion, Flow, Times, add_noise
from benchmarks.dreambooth.scores import IMAGENET_PIXELS, cosine, pixels
from benchmarks.dreambooth.settings import Settings
from benchmarks.dreambooth.stages import stages
from benchmarks.dreambooth.subjects import chosen, read_subjects
from benchmarks.dreambooth.tables import tables
from benchmarks.frame.driver import main
from benchmarks.frame.files import read_json
from benchmarks.frame.settings import read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import plan


def preset(name: str) -> Settings:
    return read_preset(Settings, DRIVER.presets / f"{name}.toml")


class TestSubjects:
    def test_the_data_set_has_thirty_subjects_of_fifteen_classes(self) -> None:
        subjects = read_subjects("dreambooth")
        assert len(subjects) == 30
        assert len({subject.class_word for subject in subjects.values()}) == 15
        live = [subject for subject in subjects.values() if subject.class_word in ("cat", "dog")]
        assert len(live) == 9
        assert all("a {} in a chef outfit" in subject.prompts for subject in live)
        assert all(len(set(subject.prompts)) == 25 for subject in subjects.values())

    def test_a_prompt_has_the_class_word_and_a_token_only_if_asked(self) -> None:
        (subject,) = chosen("dreambooth", ("wolf_plushie",))
        assert subject.prompt("a {} in the snow") == "a stuffed animal in the snow"
        assert subject.prompt("a {} in the snow", "sks") == "a sks stuffed animal in the snow"

    def test_a_subject_without_a_class_is_refused_with_what_to_do(self) -> None:
        with pytest.raises(ValueError, match=r"'dgo' has no class word .*did you mean 'dog'\?.*--subjects_file"):
            chosen("dreambooth", ("dgo",))

    def test_a_file_with_another_layout_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text('[object]\nsubjects = ["dog"]\nprompts = ["a {}"]\n')
        with pytest.raises(ValueError, match="is no file of subjects"):
            chosen(str(path), ())
        path.write_text('[object]\nsubjects = { dog = "dog" }\nprompts = ["a dog"]\n')
        with pytest.raises(ValueError, match="where the class word goes"):
            chosen(str(path), ())
        with pytest.raises(ValueError, match="no such file"):
            chosen(str(tmp_path / "other.toml"), ())


class TestImages:
    def test_a_folder_is_read_in_the_layout_of_the_repository_or_plain(self, tmp_path: Path) -> None:
        for root in (tmp_path / "plain", tmp_path / "clone" / "dataset"):
            (root / "dog").mkdir(parents=True)
            for number, colour in ((3, "red"), (0, "blue")):
                Image.new("RGB", (20, 10), colour).save(root / "dog" / f"{number:02d}.jpg", quality=100)
        for folder in (tmp_path / "plain", tmp_path / "clone"):
            found = subject_images(str(folder), "dog")
            assert [image.size for image in found] == [(20, 10)] * 2
            assert found[0].getpixel((5, 5))[2] > 200  # 00 before 03

    def test_another_layout_is_refused_with_the_wanted_one(self, tmp_path: Path) -> None:
        (tmp_path / "dogs").mkdir()
        with pytest.raises(ValueError, match=r"no folder 'dog'; did you mean 'dogs'\? Wanted is .*/dog/\*\.jpg"):
            subject_images(str(tmp_path), "dog")
        (tmp_path / "dog").mkdir()
        with pytest.raises(ValueError, match="holds no images"):
            subject_images(str(tmp_path), "dog")
        (tmp_path / "dog" / "00.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"00\.jpg cannot be read as an image"):
            subject_images(str(tmp_path), "dog")
        with pytest.raises(ValueError, match="there is no such folder"):
            subject_images(str(tmp_path / "elsewhere"), "dog")

    def test_crops_are_squares_of_the_resolution_and_say_where_they_lie(self) -> None:
        image = Image.new("RGB", (90, 30))
        square, size = crop(image, 60, None)
        assert square.size == (60, 60)
        assert size == (30, 90, 0, 60, 60, 60)
        lefts = {crop(image, 60, torch.Generator().manual_seed(seed))[1][3] for seed in range(20)}
        assert len(lefts) > 5
        assert max(lefts) <= 120


class TestNoise:
    @staticmethod
    def processes() -> list[Any]:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return [
            Diffusion(DDIMScheduler()),
            Diffusion(DDIMScheduler(prediction_type="v_prediction")),
            Flow(shifted, logit_normal=True, preconditioned=True),
            Flow(FlowMatchEulerDiscreteScheduler(), logit_normal=False, preconditioned=False),
        ]

    def test_the_output_that_says_x0_has_no_loss_and_gives_x0_back(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x0, noise = torch.randn(2, 16, 4, 2, 2, generator=generator)
        for process in self.processes():
            times = process.draw(16, generator, x0)
            noisy = add_noise(x0, noise, times)
            output = process.output_for(x0, noisy, times)
            scale = 1 / float(torch.minimum(times.sigma, times.signal.clamp_min(1e-2)).min())
            assert torch.allclose(process.clean(output, noisy, times), x0, atol=1e-5 * scale**2)
            assert float(process.loss(output, x0, noise, times)) < 1e-5 * scale**2
            assert float(process.loss(torch.zeros_like(x0), x0, noise, times)) > 0.05

    def test_diffusion_adds_noise_as_the_scheduler_does(self) -> None:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(beta_schedule="scaled_linear")
        x0, noise, timesteps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 400, 999])
        process = Diffusion(scheduler)
        ours = add_noise(x0, noise, process.at(timesteps, x0))
        assert torch.allclose(ours, scheduler.add_noise(x0, noise, timesteps), atol=1e-6)
        velocity = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
        process = Diffusion(velocity)
        wanted = velocity.get_velocity(x0, noise, timesteps)
        assert float(process.loss(wanted, x0, noise, process.at(timesteps, x0))) < 1e-12

    def test_sd3_weighs_the_flow_error_by_sigma_squared(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        x0, noise, output = torch.randn(3, 1, 4, 2, 2)
        times = Times(torch.tensor([500.0]), torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.5))
        losses = [
            float(Flow(scheduler, logit_normal=False, preconditioned=flag).loss(output, x0, noise, times))
            for flag in (True, False)
        ]
        assert losses[0] == pytest.approx(0.25 * losses[1], rel=1e-6)

    def test_flow_times_are_those_of_the_scheduler(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        times = Flow(scheduler, logit_normal=True, preconditioned=True).draw(
            64, torch.Generator().manual_seed(0), torch.zeros(1)
        )
        assert all(any(abs(float(t) - s) < 1e-3 for s in scheduler.timesteps) for t in times.timestep[:8])
        assert torch.allclose(times.sigma.flatten() * 1000, times.timestep, atol=1e-3)

    def test_an_unknown_prediction_type_is_refused(self) -> None:
        from diffusers import DDIMScheduler

        with pytest.raises(ValueError, match="'sample'; allowed are epsilon and v_prediction"):
            Diffusion(DDIMScheduler(prediction_type="sample"))


class TestScores:
    def test_cosines_are_raw(self) -> None:
        found = cosine(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        assert found.tolist() == [[1.0, 0.0, -1.0]]

    def test_pixels_are_resized_by_the_shorter_side_and_cropped_in_the_middle(self) -> None:
        image = Image.new("RGB", (300, 100), "red")
        image.paste("blue", (100, 0, 200, 100))
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in IMAGENET_PIXELS)
        seen = pixels([image], 64, 56, IMAGENET_PIXELS) * std + mean
        assert seen.shape == (1, 3, 56, 56)
        assert torch.allclose(seen[0, :, 28, 28], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)
        assert float(seen[0, 0].max()) < 0.6  # of the red sides only what bicubic resizing smears


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)  # diffusers' Euler
def test_the_whole_driver_end_to_end(tmp_path: Path) -> None:
    """The path of every preset: pairs of all four families, learning rates chosen, both sides, transfers, tables, report."""
    out = ["--out", str(tmp_path), "--threads", "1", "--keep", "4"]
    assert main(DRIVER, ["ci", *out]) == 0
    settings = preset("ci")
    planned = plan(stages, settings, Store(tmp_path))
    assert planned.kept == len(planned.cells)
    records = [read_json(path) for path in (tmp_path / "cells").glob("evaluation-*.json")]
    assert {record["settings"]["model"]["family"] for record in records} == {"sd", "sdxl", "sd3", "flux"}
    for record in records:
        rows = record["result"]["rows"]
        assert [row["prompt"] for row in rows] == record["settings"]["prompts"]
        assert all(-1 <= row[metric] <= 1 for row in rows for metric in ("clip_t", "clip_i", "dino_i"))
        assert {row["subject"] for row in rows} <= {0.0, 1.0}
    text = (tmp_path / "ci.md").read_text()
    for expected in (
        "carried by pinv_output",
        "retrained on the target",
        "hybrid 1 of 2 in output space",
        "lora-x",
        "Learning rates",
    ):
        assert expected in text
    html = (tmp_path / "ci.html").read_text()
    assert html.count("data:image/jpeg") > 30
    assert html.count("<svg") == 4 * 2 * 4, "a plot for each pair, side and metric"
    _beside_the_paper(settings, records)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert main(DRIVER, ["ci", *out]) == 0  # nothing is done twice
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == before


def _beside_the_paper(settings: Settings, records: list[dict[str, Any]]) -> None:
    """Evaluations of a pair of that name appear in Table 1: the mean of all images, and its difference to what is printed."""
    own = [record for record in records if record["settings"]["model"]["pair"] == "tiny sd->lcm"]
    for record in own:
        record["settings"]["model"]["pair"] = "sd15->lcm"
        if record["settings"]["training"] is not None:
            record["settings"]["training"]["model"]["pair"] = "sd15->lcm"
    (table,) = tables(replace(settings, tables=("1",), pairs=()), own)[:1]
    rows = {tuple(row[:5]): row[5:] for row in table.rows}
    (copied,) = [
        record["result"]["rows"]
        for record in own
        if record["settings"]["side"] == "target"
        and record["settings"]["training"] is not None
        and record["settings"]["training"]["model"]["name"] == "source"
        and record["settings"]["carry"] == "copy"
    ]
    mean = sum(row["clip_i"] for row in copied) / len(copied)
    published_number, ours, apart = rows["sd15->lcm", "lora", "param", "2", "target"][3:6]
    assert ours == f"{mean:.3f}"
    assert float(apart) == pytest.approx(mean - float(published_number), abs=1e-3)
    assert rows["sd15->lcm", "lora", "input", "2", "target"][1] == ""  # not run
    (bare,) = [
        record["result"]["rows"]
        for record in own
        if record["settings"]["side"] == "target" and record["settings"]["training"] is None
    ]
    assert rows["sd15->lcm", "", "bare", "", "target"][:3] == [
        "",
        f"{sum(row['clip_t'] for row in bare) / len(bare):.3f}",
        "",
    ]
    assert "1 subjects, not 30" in table.notes[0]
