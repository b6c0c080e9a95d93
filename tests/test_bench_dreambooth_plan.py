"""benchmarks/dreambooth: which cells there are, what stops before the first of them, and what the tables show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dreambooth.access import check_access, problems
from benchmarks.dreambooth.adapters import Adapting
from benchmarks.dreambooth.cells import Evaluation, Training
from benchmarks.dreambooth.driver import DRIVER, prepare
from benchmarks.dreambooth.loop import shares
from benchmarks.dreambooth.measured import Measured, Variant, by_split
from benchmarks.dreambooth.optimizers import check_installed
from benchmarks.dreambooth.settings import Optimizer, Settings
from benchmarks.dreambooth.stages import best_rate, stages
from benchmarks.dreambooth.subjects import read_subjects
from benchmarks.dreambooth.tables import chosen_rates_only, pair_table, rate_table, split_tables
from benchmarks.frame.cell import plain
from benchmarks.frame.driver import main
from benchmarks.frame.settings import from_plain, read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import Finished, plan


def preset(name: str) -> Settings:
    return read_preset(Settings, DRIVER.presets / f"{name}.toml")


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
        (with_more,) = split_tables([*found, one("param", 0, 0.9, subject="an easy one")])
        assert with_more.rows == table.rows

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
