"""benchmarks/a4a: the world is as described, a short run gives what it says, and goes on where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[bench]")

from benchmarks.a4a import driver, models, world
from benchmarks.a4a.adapt import Batches, Place, References
from benchmarks.a4a.charts import picture
from benchmarks.a4a.cli import main
from benchmarks.a4a.driver import chosen, plan
from benchmarks.a4a.judge import Judge, follows, retrieval, similarity
from benchmarks.a4a.report import html, markdown
from benchmarks.a4a.settings import ABLATIONS, MAIN, METHODS, TinySettings
from benchmarks.a4a.summary import MARGIN, Cell, difference, findings, verdict


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestWorld:
    def test_an_image_shows_its_identity_in_its_scene(self) -> None:
        who = world.identities(4, seeded())
        scenes = torch.tensor([0, 5, 10, 15])
        images = world.render(who, scenes, seeded(1))
        for image, colours in zip(images, who.view(4, 3, 3), strict=True):
            flat = image.flatten(1).T
            nearest = torch.cdist(flat, colours).min(dim=1).values
            assert float(nearest.max()) < 8 * world.GRAIN  # every pixel has one of the three colours
        corner = torch.stack([images[0][:, 7, 7], images[1][:, 7, 0], images[2][:, 0, 7], images[3][:, 0, 0]])
        torch.testing.assert_close(corner, who[:, :3], atol=8 * world.GRAIN, rtol=0)  # the background

    def test_prompts_tell_scenes_apart(self) -> None:
        prompts = world.prompts(torch.arange(len(world.SCENES)))
        assert len({tuple(prompt) for prompt in prompts.tolist()}) == len(world.SCENES)
        assert world.WORDS[int(prompts[6, 1])] == "frame"
        assert world.WORDS[int(prompts[6, 2])] == "lower left"

    def test_the_encoder_never_changes(self) -> None:
        images = world.draw(3, seeded()).images
        assert torch.equal(world.Encoder(16, 2, 1.0)(images), world.Encoder(16, 2, 1.0)(images))

    def test_the_judge_knows_unseen_images(self) -> None:
        judge, real = Judge.trained(300), world.draw(256, seeded(9))
        with torch.no_grad():
            found, logits = judge(real.images)
        assert similarity(found, real.identities) > 0.95
        assert abs(similarity(found, real.identities.roll(1, 0))) < 0.2
        assert retrieval(found, real.identities, torch.arange(256)) > 0.9
        assert follows(logits, real.scenes) > 0.8


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart"])
def test_every_model_denoises_what_its_text_encoder_tells(name: str) -> None:
    model = models.build(name, 0)
    text, objective = models.Text(name, 0), models.objective(model)
    from xadapt_a4a.objective import predict

    images = world.draw(2, seeded()).images
    noisy, times, goal = objective.noisy(images, torch.randn(images.shape, generator=seeded()), seeded())
    assert predict(model, noisy, times, text(world.prompts(torch.tensor([1, 2])))).shape == goal.shape
    assert objective.prediction == "v_prediction"


def test_few_references_come_again_and_many_do_not() -> None:
    place = Place.of(models.build("pixart", 0), models.Text("pixart", 0), world.Encoder(16, 2, 1.0))
    few, many = (iter(Batches(References(count, 16, 0.0), place, 3)) for count in (5, 0))
    seen = {tuple(row.tolist()) for _ in range(5) for row in next(few)["image_embeds"]}
    assert len(seen) == 5
    assert len({tuple(row.tolist()) for _ in range(5) for row in next(many)["image_embeds"]}) == 5 * 16


def test_all_paper_ablations_have_a_preset() -> None:
    assert {"frozen", "half", "double", "no training", "linear", "depth 1", "one rate"} <= set(ABLATIONS)
    assert {"a4a", "random", "layerwise", "scratch"} <= set(MAIN)
    full = TinySettings()
    assert len(full.seeds) >= 3
    assert full.tuning_seed not in full.seeds
    assert set(full.main) | set(full.ablations) == set(METHODS)


TINY = ["short", "--targets", "pixart"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("a4a")
    assert main([*TINY, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "short.json").read_text())


def test_a_short_run_has_every_method_at_every_stop(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished
    settings = TinySettings.short()
    found = {(row["method"], row["step"]) for row in results["rows"]}
    assert {(method, step) for method in settings.main for step in (1, 2)} <= found
    assert {(method, 2) for method in settings.ablations} <= found
    assert {row["scale"] for row in results["sweep"]} == {0.0, 1.0}
    assert {row["method"] for row in results["images"]} == {"a4a", "random", "scratch"}
    assert all(row["samples"] == 16 * row["step"] for row in results["rows"])
    for target, regime, method in {(row["target"], row["regime"], row["method"]) for row in results["rates"]}:
        tried = [row for row in results["rates"] if row["method"] == method]
        best = min(tried, key=lambda row: row["loss"])["rate"]
        assert chosen(results["rates"], target, regime, method) == best
    assert sorted(path.name for path in folder.iterdir()) == ["short.html", "short.json", "short.md"]


def test_at_strength_zero_the_target_is_bare(finished: tuple[Path, dict[str, Any]]) -> None:
    _, results = finished
    bare = next(row for row in results["models"] if row["target"] == "pixart" and row["seed"] == 0)
    off = next(row for row in results["sweep"] if row["scale"] == 0.0)
    assert all(off[score] == bare[score] for score in ("similarity", "retrieval", "prompt"))


def test_the_pages_have_tables_curves_and_pictures(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _results = finished
    text = (folder / "short.md").read_text()
    assert "| A4A, random source |" in text
    assert "Its scores mean nothing" in text
    page = (folder / "short.html").read_text()
    assert page.count("<svg") >= 4
    assert page.count("data:image/png;base64,") == 3
    assert 'src="http' not in page
    assert main(["render", str(folder / "short.json")]) == 0
    assert (folder / "short.md").read_text() == text


def test_an_interrupted_run_goes_on_and_gives_the_same(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = finished
    make = driver._Bench.make

    def stops_at_main(self: Any, name: str, *rest: Any) -> Any:
        if name.startswith("ablations"):
            raise KeyboardInterrupt
        return make(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(driver._Bench, "make", stops_at_main)
        assert main([*TINY, "--out", str(tmp_path)]) == 130
    made: list[str] = []

    def noted(self: Any, name: str, *rest: Any) -> Any:
        made.append(name)
        return make(self, name, *rest)

    monkeypatch.setattr(driver._Bench, "make", noted)
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    assert made == ["ablations-seed0"]
    again = json.loads((tmp_path / "short.json").read_text())
    assert again["rows"] == whole["rows"]
    assert again["images"] == whole["images"]


def test_the_plan_names_every_cell_and_runs_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--plan", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in plan(TinySettings()))
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert main(["render", str(path)]) == 2
    assert "is not a result of this benchmark" in capsys.readouterr().err


class TestVerdict:
    @pytest.mark.parametrize(
        ("gaps", "said"),
        [
            ((0.1, 0.2, 0.15), "ahead of"),
            ((-0.1, -0.2, -0.15), "behind"),
            ((0.1, 0.2, -0.01), "level with"),
            ((0.01, 0.01, 0.01), "level with"),
        ],
    )
    def test_every_seed_has_to_agree(self, gaps: tuple[float, ...], said: str) -> None:
        assert verdict(Cell(gaps), MARGIN) == said

    def test_what_a_random_source_does_as_well_is_said(self, finished: tuple[Path, dict[str, Any]]) -> None:
        _, results = finished
        results = {**results, "preset": "tiny"}
        assert any(
            "matters nowhere" in sentence for sentence in findings(with_similarity(results, a4a=0.4, random=0.4))
        )
        better = findings(with_similarity(results, a4a=0.5, random=0.4))
        assert any("the pretrained adapter itself matters" in sentence.lower() for sentence in better)
        wanted = {"target": "pixart", "regime": "few", "step": 2}
        gap = difference(with_similarity(results, a4a=0.5, random=0.4), "similarity", "a4a", "random", **wanted)
        assert gap.mean == pytest.approx(0.1)
        assert "A4A" in markdown(results)
        assert "<h1>" in html(results)


def with_similarity(results: dict[str, Any], **values: float) -> dict[str, Any]:
    rows = [{**row, "similarity": values.get(row["method"], row["similarity"])} for row in results["rows"]]
    return {**results, "rows": rows}


def test_a_picture_is_a_png_of_its_pixels() -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    uri = picture(base64.b64encode(pixels.tobytes()).decode(), 5, 7)
    opened = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert np.array_equal(np.asarray(opened), pixels)
