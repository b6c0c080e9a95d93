"""benchmarks/dreambooth: what is read and planned, the noise, the losses, what is scored; and all of it end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.dreambooth.access import check_access, problems
from benchmarks.dreambooth.adapters import Adapting
from benchmarks.dreambooth.cells import Evaluation, Training
from benchmarks.dreambooth.driver import DRIVER, prepare
from benchmarks.dreambooth.examples import crop
from benchmarks.dreambooth.images import subject_images
from benchmarks.dreambooth.loop import shares
from benchmarks.dreambooth.measured import Measured, Variant, by_split
from benchmarks.dreambooth.noise import Diffusion, Flow, Times, add_noise
from benchmarks.dreambooth.optimizers import check_installed
from benchmarks.dreambooth.scores import IMAGENET_PIXELS, cosine, pixels
from benchmarks.dreambooth.settings import Optimizer, Settings
from benchmarks.dreambooth.stages import best_rate, stages
from benchmarks.dreambooth.subjects import chosen, read_subjects
from benchmarks.dreambooth.tables import chosen_rates_only, pair_table, rate_table, split_tables, tables
from benchmarks.frame.cell import plain
from benchmarks.frame.driver import main
from benchmarks.frame.files import read_json
from benchmarks.frame.settings import from_plain, read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import Finished, plan


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


class TestPlan:
    def test_paper_has_the_cells_of_table_8(self, tmp_path: Path) -> None:
        settings = preset("paper")
        settings = replace(settings, experiments=settings.experiments[:1])
        cells = plan(stages, settings, Store(tmp_path)).cells
        trainings = [cell for cell in cells if isinstance(cell, Training)]
        evaluations = [cell for cell in cells if isinstance(cell, Evaluation)]
        assert len(trainings) == 4 * 12 * 30
        adapted = [cell for cell in evaluations if cell.training]
        assert len(adapted) == 2 * len(trainings)
        assert sum(len(cell.prompts) * len(cell.image_seeds) for cell in adapted) == 360_000
        assert len(evaluations) - len(adapted) == 2 * 4 * 30  # the bare models

    def test_experiments_share_their_cells(self, tmp_path: Path) -> None:
        settings = replace(preset("paper"), subjects=("dog",))
        flux = [each for each in settings.experiments if each.pairs == ("flux-dev->flux-schnell",)]
        together = plan(stages, replace(settings, experiments=tuple(flux)), Store(tmp_path)).cells
        apart = [plan(stages, replace(settings, experiments=(one,)), Store(tmp_path)).cells for one in flux]
        assert len({cell.name for cell in together}) == len(together) < sum(map(len, apart))

    def test_the_settings_of_table_7(self) -> None:
        settings = preset("paper")
        assert (settings.training.steps, settings.training.batch, settings.training.resolution) == (500, 4, 512)
        assert settings.ranks == {"lora": 4, "dora": 4, "loha": 64, "lokr": 128}
        by_name = {pair.name: pair for pair in settings.pairs}
        assert by_name["sdxl-xattn->sdxl-turbo"].targets == ("attn2.to_k", "attn2.to_v")
        assert by_name["flux-dev->flux-schnell"].optimizer.name == "prodigy"
        assert by_name["flux-dev->flux-schnell"].learning_rates == (1.0,)
        assert by_name["sd15->lcm"].learning_rates == (1e-4,)

    def test_source_and_target_get_the_same_questions(self, tmp_path: Path) -> None:
        cells = plan(stages, preset("tiny"), Store(tmp_path)).cells
        asked: dict[tuple[str, str], set[Any]] = {}
        for cell in cells:
            if isinstance(cell, Evaluation):
                asked.setdefault((cell.model.pair, cell.subject), set()).add((cell.prompts, cell.image_seeds))
        assert all(len(each) == 1 for each in asked.values())

    def test_a_rare_token_is_in_what_the_model_is_asked_and_nowhere_else(self, tmp_path: Path) -> None:
        settings = preset("ci")
        settings = replace(settings, training=replace(settings.training, unique_token="sks"))
        cells = plan(stages, settings, Store(tmp_path)).cells
        (word,) = {cell.class_word for cell in cells if isinstance(cell, Evaluation)}
        for cell in cells:
            if isinstance(cell, Evaluation):
                assert not any("sks" in prompt for prompt in cell.prompts)
                with_token = tuple(prompt.replace(word, f"sks {word}") for prompt in cell.prompts)
                assert cell.told == (with_token if cell.training else ())

    def test_where_every_rate_of_a_mode_has_failed_the_others_go_on(self, tmp_path: Path) -> None:
        store, settings = Store(tmp_path), preset("ci")
        started = stages(settings, Finished(store))
        for cell in next(started):
            assert isinstance(cell, Evaluation)
            assert cell.training is not None
            if cell.training.adapting.adaptation != "input":
                store.put(cell, {"rows": [{"clip_t": cell.training.learning_rate}]}, 1.0)
        adapted = [cell.training for cell in next(started) if isinstance(cell, Evaluation) and cell.training]
        chosen_rates = {
            (each.adapting.adaptation, each.learning_rate) for each in adapted if each.model.pair == "tiny sd->lcm"
        }
        assert "input" not in {adaptation for adaptation, _ in chosen_rates}
        assert ("param", 1e-2) in chosen_rates, "the better of two"
        assert {rate for _, rate in chosen_rates} == {1e-2}

    def test_a_rate_is_chosen_by_all_subjects_of_the_tuning(self, tmp_path: Path) -> None:
        store, settings = Store(tmp_path), preset("ci")
        known = tuple(read_subjects("shapes"))[:2]
        settings = replace(settings, tuning=replace(settings.tuning, subjects=known))
        by_rate: dict[float, list[Evaluation]] = {}
        for cell in next(stages(settings, Finished(store))):
            assert isinstance(cell, Evaluation)
            assert cell.training is not None
            if cell.training.adapting.adaptation == "param":
                by_rate.setdefault(cell.training.learning_rate, []).append(cell)
        assert [len(group) for group in by_rate.values()] == [2, 2]
        (low, low_too), (high, high_too) = by_rate.values()
        assert best_rate(by_rate, Finished(store), ["clip_t"]) is None
        for cell, value in ((low, 0.5), (high, 0.9), (high_too, 0.0)):
            store.put(cell, {"rows": [{"clip_t": value}]}, 1.0)
        assert best_rate(by_rate, Finished(store), ["clip_t"]) == 1e-2, "the only one that has both"
        store.put(low_too, {"rows": [{"clip_t": 0.6}]}, 1.0)
        assert best_rate(by_rate, Finished(store), ["clip_t"]) == 3e-3

    @pytest.mark.parametrize("name", ["ci", "tiny", "small", "paper"])
    def test_every_preset_can_be_planned(self, name: str, tmp_path: Path) -> None:
        planned = plan(stages, preset(name), Store(tmp_path))
        assert planned.cells
        assert planned.estimate().hours >= 0

    def test_an_experiment_with_an_unknown_pair_is_refused(self, tmp_path: Path) -> None:
        settings = preset("paper")
        wrong = replace(settings, experiments=(replace(settings.experiments[0], pairs=("sd15-lcm",)),))
        with pytest.raises(ValueError, match=r"did you mean 'sd15->lcm'\?"):
            plan(stages, wrong, Store(tmp_path))


class TestPrepare:
    def test_an_optimizer_that_is_not_installed_stops_before_the_first_cell(self) -> None:
        try:
            import prodigyopt  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            with pytest.raises(ValueError, match=r"pip install 'xadapt\[prodigy\]'"):
                prepare(preset("paper"))
        else:
            check_installed(Optimizer(name="prodigy"))

    def test_models_that_cannot_be_had_are_named_with_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ValueError, match="these cannot be had") as caught:
            check_access(preset("small"))
        text = str(caught.value)
        for name in ("SimianLuo/LCM_Dreamshaper_v7", "stabilityai/sdxl-turbo", "openai/clip-vit-base-patch32"):
            assert f"{name}: No such model or data set, or no network." in text
        (tmp_path / "folder").mkdir()
        found = list(problems([(str(tmp_path / "folder"), None, "model_index.json"), ("/nowhere", None, "x")]))
        assert "holds no model_index.json" in found[0]
        assert "no such folder" in found[1]

    def test_a_hub_that_is_not_reached_is_asked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        asked: list[tuple[str, str, bool]] = []

        def unreached(name: str, file: str, *, local_files_only: bool, repo_type: str, **_: Any) -> str:
            asked.append((name, repo_type, local_files_only))
            raise LocalEntryNotFoundError("no connection")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", unreached)
        with pytest.raises(ValueError, match="google/dreambooth: No such model or data set, or no network"):
            check_access(preset("small"))
        assert [here for _, _, here in asked] == [False, *[True] * (len(asked) - 1)]
        assert ("google/dreambooth", "dataset", True) in asked

    def test_a_tracker_that_is_not_installed_stops_before_the_first_cell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("accelerate.tracking._available_trackers", [])
        settings = preset("ci")
        with pytest.raises(ValueError, match="pip install wandb"):
            prepare(replace(settings, compute=replace(settings.compute, log_with="wandb")))

    def test_a_cell_survives_the_way_to_another_process(self, tmp_path: Path) -> None:
        cells = plan(stages, preset("tiny"), Store(tmp_path)).cells
        for kind in (Training, Evaluation):
            cell = next(each for each in cells if type(each) is kind)
            assert from_plain(kind, plain(cell, identity_only=False)) == cell

    def test_a_folder_without_the_subjects_stops_before_the_first_cell(self, tmp_path: Path) -> None:
        settings = replace(preset("small"), images=str(tmp_path))
        with pytest.raises(ValueError, match="has no folder 'dog'"):
            prepare(settings)

    def test_an_unknown_key_of_a_preset_names_the_near_one(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "mine.toml"
        path.write_text("image_seed = [0]\n")
        assert main(DRIVER, [str(path), "--plan"]) == 2
        assert "did you mean 'image_seeds'?" in capsys.readouterr().err

    def test_a_batch_is_shared_exactly_or_refused(self) -> None:
        assert shares(8, 2, 2) == (2, 2)
        assert shares(4, 16, 1) == (1, 4)
        with pytest.raises(ValueError, match="not to be shared by 3 processes"):
            shares(4, 2, 3)
        with pytest.raises(ValueError, match="micro_batch = 3 does not divide"):
            shares(4, 3, 1)

    def test_hybrid_is_one_of_lora(self) -> None:
        with pytest.raises(ValueError, match="one of LoRA, not of loha"):
            Adapting(method="loha", adaptation="hybrid", rank=4, alpha=4, targets=("to_q",), feature_rank=2)


class TestFigures:
    def test_figure_7_goes_from_parameter_to_feature_space(self) -> None:
        def one(adaptation: str, split: int, value: float, subject: str = "dog") -> Measured:
            space = "output" if split else ""
            variant = Variant("p", "lora", adaptation, 4, split, space=space)
            return Measured(variant, "target", 0, subject, {"clip_t": value}, "", None)

        found = [one("param", 0, 0.1), one("hybrid", 3, 0.4), one("hybrid", 1, 0.2), one("output", 0, 0.5)]
        ((key, splits),) = by_split(found).items()
        assert key == ("p", 4, "output")
        assert {split: own[0].means["clip_t"] for split, own in splits.items()} == {0: 0.1, 1: 0.2, 3: 0.4, 4: 0.5}
        assert list(splits) == [0, 1, 3, 4]
        (table,) = split_tables(found)
        assert table.rows == [["0 of 4", "0.100"], ["1 of 4", "0.200"], ["3 of 4", "0.400"], ["4 of 4", "0.500"]]
        assert by_split(found[:2]) == {}

    def test_a_row_with_fewer_subjects_says_so(self) -> None:
        found = [
            Measured(Variant("p", "lora", adaptation, 4), "target", 0, subject, {"dino_i": 0.1}, "", None)
            for adaptation, subjects in (("param", ("dog", "cat")), ("input", ("dog",)))
            for subject in subjects
        ]
        labels = [row[2] for row in pair_table("p", found).rows]
        assert labels == ["parameter (copy)", "input (1 seed, 1 subject)"]

    def test_a_rate_that_was_tried_elsewhere_alone_stays_out(self) -> None:
        def one(side: str, subject: str, rate: float) -> Measured:
            return Measured(Variant("p", "lora", "param", 4), side, 0, subject, {"clip_t": 0.1}, "", rate)

        taken = [one("target", "dog", 1e-3), one("source", "dog", 1e-3)]
        tried = [one("source", "dog", 1e-2), one("source", "cat", 1e-3)]  # the cat was for tuning alone
        pair = replace(preset("small").pairs[0], name="p", learning_rates=(1e-3, 1e-2))
        assert chosen_rates_only(replace(preset("small"), pairs=(pair,)), taken + tried) == taken
        (table,) = rate_table(replace(preset("small"), pairs=(pair,)), taken)
        assert table.notes[1].endswith("beyond: p lora param.")
        wider = replace(pair, learning_rates=(1e-4, 1e-3, 1e-2))
        assert len(rate_table(replace(preset("small"), pairs=(wider,)), taken)[0].notes) == 1


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
