"""benchmarks/tiny: the siblings are what they claim, the exact cells are exact, and a run leaves whole results or none."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.tiny.adapt import carry, train_adapter
from benchmarks.tiny.charts import png, sheet
from benchmarks.tiny.choice import Moved, moved
from benchmarks.tiny.cli import main
from benchmarks.tiny.drifted import DRIFTED, KEPT_BY_STUDENT
from benchmarks.tiny.driver import plan, run
from benchmarks.tiny.evaluate import exact_match, weight_distance
from benchmarks.tiny.lm import Arena, make_sibling, target_paths
from benchmarks.tiny.pretrain import pretrain, tiny_llama
from benchmarks.tiny.progress import Silent
from benchmarks.tiny.report import html
from benchmarks.tiny.results import Cells, markdown, write_results, write_together
from benchmarks.tiny.settings import ALL, FULL, QV, SHORT, SIBLINGS, SPACES, LmSettings, Settings
from benchmarks.tiny.siblings import EXACT
from benchmarks.tiny.summary import Part, findings, table, verdict
from benchmarks.tiny.tasks import ALL_TASKS, DIGITS, IGNORE, NEW_TASK, PAD, TASKS, decode, make_batch

EXACT_ON_QV = {("reparam", "input"), ("rot", "output"), ("smooth", "output")}
RESULTS = Path(__file__).parents[1] / "benchmarks" / "tiny" / "results"

FEW_STEPS = LmSettings(
    pretrain_steps=2,
    pretrain_batch=16,
    drift_batch=8,
    vlight=(1, 1e-4),
    light=(1, 3e-4),
    mid=(1, 1e-3),
    prune=(2, 3e-4),
    student=(1, 1e-3),
    adapt_steps=1,
    adapt_batch=4,
    eval_lines=8,
    siblings=("reparam", "light", "student"),
    calibration_lines=8,
)


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    """Untrained, but with norm gains that differ, large enough weights, and so something for each change of basis to get wrong."""
    torch.manual_seed(0)
    model = tiny_llama(LmSettings())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def siblings(source: LlamaForCausalLM) -> dict[str, LlamaForCausalLM]:
    return {name: make_sibling(name, source, FEW_STEPS, 0, Silent()) for name in SIBLINGS}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return make_batch("".join(ALL_TASKS), 27, torch.Generator().manual_seed(3)).tokens


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def some_adapter(source: LlamaForCausalLM, spaces: dict[str, str], folder: Path) -> torch.nn.Module:
    """An adapter that does something, three large steps away from nothing, saved to `folder`. `spaces`: path -> space."""
    plan = {space: [path for path in spaces if spaces[path] == space] for space in SPACES}

    return train_adapter(
        source,
        {space: paths for space, paths in plan.items() if paths},
        4,
        lambda generator: make_batch(NEW_TASK, 4, generator),
        folder,
        steps=3,
        learning_rates=dict.fromkeys(SPACES, 0.1),
        seed=0,
        title="",
        progress=Silent(),
    )


# ---- the tasks


def test_every_line_is_its_task_solved() -> None:
    python = {
        "C": lambda d: d,
        "R": lambda d: d[::-1],
        "S": lambda d: "".join(sorted(d)),
        "H": lambda d: d[1:] + d[0],
        "W": lambda d: d[-(DIGITS // 2) :] + d[: -(DIGITS // 2)],
        "M": max,
        "P": lambda d: "".join(str((int(a) + int(b)) % 10) for a, b in zip(d, d[-(DIGITS // 2) :], strict=False)),
        "L": lambda d: d[1 + int(d[0]) % (DIGITS - 1)],
        "D": lambda d: "".join(sorted(d, reverse=True)),
    }
    assert python.keys() == ALL_TASKS.keys()
    for keyword, solve in python.items():
        plain = make_batch(keyword, 20, torch.Generator().manual_seed(1))
        asked = make_batch(keyword, 20, torch.Generator().manual_seed(1), instruction=True)
        for line, question in zip(plain.tokens, asked.tokens, strict=True):
            digits, answer = re.fullmatch(rf"{keyword}(\d+)>(\d+)\.", decode(line)).groups()  # type: ignore[union-attr]
            assert answer == solve(digits)
            assert decode(question) == f"Q{digits}{keyword}A{answer}."


def test_labels_are_the_answer_and_its_full_stop() -> None:
    batch = make_batch("".join(TASKS), 16, torch.Generator().manual_seed(0))
    for line, labels in zip(batch.tokens, batch.labels, strict=True):
        kept = labels != IGNORE
        assert decode(line[kept]) == decode(line).partition(">")[2]
        assert PAD not in labels


def test_the_new_task_is_new() -> None:
    assert NEW_TASK not in TASKS
    lines = make_batch("".join(TASKS), 400, torch.Generator().manual_seed(0)).tokens
    assert not any(NEW_TASK in decode(line) for line in lines)


# ---- the siblings


@pytest.mark.parametrize("name", EXACT)
def test_a_change_of_basis_preserves_the_function(
    name: str, source: LlamaForCausalLM, siblings: dict[str, LlamaForCausalLM], tokens: Tensor
) -> None:
    assert weight_distance(source, siblings[name]) > 0.3  # type: ignore[operator]
    torch.testing.assert_close(logits(siblings[name], tokens), logits(source, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DRIFTED)
def test_drift_changes_the_function(
    name: str, source: LlamaForCausalLM, siblings: dict[str, LlamaForCausalLM], tokens: Tensor
) -> None:
    assert (logits(siblings[name], tokens) - logits(source, tokens)).abs().max() > 1e-3


def test_making_siblings_leaves_the_source_alone(source: LlamaForCausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    for name in SIBLINGS:
        make_sibling(name, source, FEW_STEPS, 1, Silent())
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


def test_a_pruned_head_stays_pruned_while_the_rest_heals(
    source: LlamaForCausalLM, siblings: dict[str, LlamaForCausalLM]
) -> None:
    for pruned, whole in zip(siblings["prune"].model.layers, source.model.layers, strict=True):
        columns = pruned.self_attn.o_proj.weight.unflatten(1, (4, -1)).abs().amax(dim=(0, 2))
        assert (columns == 0).sum() == 1
        head = columns.argmin()
        for projection in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(pruned.self_attn, projection).weight.unflatten(0, (4, -1))
            assert (weight[head] == 0).all()
        assert not torch.equal(pruned.mlp.up_proj.weight, whole.mlp.up_proj.weight)


def test_int4_has_fifteen_levels_per_group(siblings: dict[str, LlamaForCausalLM]) -> None:
    groups = siblings["int4"].model.layers[0].mlp.down_proj.weight.unflatten(1, (-1, 32))
    assert max(len(group.unique()) for row in groups for group in row) <= 15


def test_the_student_is_a_layer_shorter(siblings: dict[str, LlamaForCausalLM]) -> None:
    assert len(siblings["student"].model.layers) == 2


# ---- what carries over exactly, with hardly any training


@pytest.mark.parametrize("space", SPACES)
def test_exact_cells(
    space: str, source: LlamaForCausalLM, siblings: dict[str, LlamaForCausalLM], tokens: Tensor, tmp_path: Path
) -> None:
    adapted = some_adapter(source, dict.fromkeys(target_paths(source, QV), space), tmp_path)
    wanted = logits(adapted, tokens)
    effect = (wanted - logits(source, tokens)).norm()
    for name in EXACT:
        missed = (logits(carry(tmp_path, siblings[name]), tokens) - wanted).norm() / effect
        if (name, space) in EXACT_ON_QV:
            assert missed < 1e-3, name
        else:
            assert missed > 0.1, name


@pytest.mark.parametrize("name", EXACT)
def test_per_layer_choice_is_exact_on_all_linear_layers(
    name: str, source: LlamaForCausalLM, siblings: dict[str, LlamaForCausalLM], tokens: Tensor, tmp_path: Path
) -> None:
    """No single space is: the residual stream comes out of o_proj and down_proj, and goes into all others."""
    paths = target_paths(source, ALL)
    found = moved(source, siblings[name], dict(zip(paths, paths, strict=True)), tokens)
    spaces = {path: how_far.space(3.0, 0.1) for path, how_far in found.items()}
    adapted = some_adapter(source, spaces, tmp_path)
    wanted = logits(adapted, tokens)
    effect = (wanted - logits(source, tokens)).norm()
    assert (logits(carry(tmp_path, siblings[name]), tokens) - wanted).norm() / effect < 1e-3
    if name == "rot":
        assert {spaces[path] for path in paths if path.endswith(("o_proj", "down_proj"))} == {"input"}
        assert {spaces[path] for path in paths if not path.endswith(("o_proj", "down_proj"))} == {"output"}


def test_choice_copies_where_both_sides_moved_alike_or_hardly() -> None:
    assert Moved(inputs=0.3, outputs=0.5).space(3.0, 0.1) == "lora"
    assert Moved(inputs=0.0, outputs=0.05).space(3.0, 0.1) == "lora"
    assert Moved(inputs=0.0, outputs=1.4).space(3.0, 0.1) == "input"
    assert Moved(inputs=1.4, outputs=0.3).space(3.0, 0.1) == "output"


def test_layers_are_renumbered_for_the_student(
    source: LlamaForCausalLM, siblings: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    adapted = some_adapter(source, dict.fromkeys(target_paths(source, QV), "input"), tmp_path)
    carried: Any = carry(tmp_path, siblings["student"], KEPT_BY_STUDENT)
    there = get_peft_model_state_dict(carried)
    ours = dict(adapted.named_parameters())
    for theirs, mine in KEPT_BY_STUDENT.items():
        key = f"layers.{theirs}.self_attn.q_proj.input_ada_phi.lora_A.input_space.weight"
        (found,) = (
            tensor for name, tensor in there.items() if f"layers.{mine}.self_attn.q_proj" in name and "lora_A" in name
        )
        assert torch.equal(found, next(tensor for name, tensor in ours.items() if name.endswith(key)))


def test_equal_parameter_counts_on_q_and_v(source: LlamaForCausalLM, tmp_path: Path) -> None:
    counts = set()
    for space in SPACES:
        adapted = some_adapter(source, dict.fromkeys(target_paths(source, QV), space), tmp_path / space)
        counts.add(sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad))
    assert len(counts) == 1


def test_exact_cells_after_training(tmp_path: Path) -> None:
    """The three rows of the table that theory fixes, with adapters that have learned something: on a shortened recipe."""
    settings = LmSettings(pretrain_steps=250, adapt_steps=120, eval_lines=128)
    source = pretrain(settings, 0, Silent())
    siblings = {name: make_sibling(name, source, settings, 0, Silent()) for name in EXACT}
    arena = Arena(settings, QV, 0, source, siblings, tmp_path, Silent())
    score = {(row["sibling"], row["adapter"]): row["score"] for row in arena.scores(retrain=False)}
    assert min(score["source", adapter] for adapter in ("copy", "input", "output")) > 0.2
    for name in EXACT:
        assert score[name, "bare"] == pytest.approx(score["source", "bare"], abs=0.02)
        for space in ("input", "output"):
            if (name, space) in EXACT_ON_QV:
                assert score[name, space] == pytest.approx(score["source", space], abs=0.02)
                assert score[name, "choice"] == score[name, space]
    for name, adapter in (("reparam", "copy"), ("reparam", "output"), ("rot", "copy"), ("rot", "input")):
        assert score[name, adapter] < 0.1 * score["source", adapter] + 0.02


def test_exact_match_counts_whole_answers(source: LlamaForCausalLM) -> None:
    batch = make_batch("".join(TASKS), 32, torch.Generator().manual_seed(5))
    predicted = logits(source, batch.tokens)[:, :-1].argmax(-1)
    labels = batch.labels.clone()
    labels[:, 1:] = torch.where(labels[:, 1:] == IGNORE, labels[:, 1:], predicted)
    assert exact_match(source, replace(batch, labels=labels)) == 1.0
    row = 3
    first = int((labels[row] != IGNORE).nonzero()[0])
    labels[row, first] = (labels[row, first] + 1) % 10
    assert exact_match(source, replace(batch, labels=labels)) == pytest.approx(31 / 32)


# ---- runs and results


class Stops(Silent):
    """Records what runs, and interrupts as Ctrl-C does when `at` begins for the n-th time."""

    def __init__(self, at: str = "", times: int = 1) -> None:
        self.at, self.times, self.seen = at, times, list[str]()

    def track(self, title: str, total: int) -> Iterator[int]:
        self.seen.append(title)
        if self.at and self.seen.count(self.at) == self.times:
            raise KeyboardInterrupt
        yield from range(total)


TWO_SEEDS = Settings(preset="demo", seeds=(0, 1), lm=FEW_STEPS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(TWO_SEEDS, Cells(tmp_path_factory.mktemp("cells")), Silent(), ["lm"])


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, results: dict[str, Any]) -> None:
    cells = Cells(tmp_path / "cells")
    with pytest.raises(KeyboardInterrupt):
        run(TWO_SEEDS, cells, Stops("pre-training the source", times=2), ["lm"])
    assert [path.name for path in cells.folder.iterdir()] == ["lm-seed0.json"]

    again = Stops()
    resumed = run(TWO_SEEDS, cells, again, ["lm"])
    assert again.seen.count("pre-training the source") == 1
    assert resumed["rows"] == results["rows"]


def test_cells_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    Cells(tmp_path).put("lm-seed0", {"steps": (1, 2)}, {"rows": []})
    assert Cells(tmp_path).get("lm-seed0", {"steps": (1, 2)}) == {"rows": []}
    assert Cells(tmp_path).get("lm-seed0", {"steps": (1, 3)}) is None
    assert Cells(tmp_path).get("lm-seed1", {"steps": (1, 2)}) is None


def test_every_sibling_has_every_column(results: dict[str, Any]) -> None:
    found = {(row["part"], row["seed"], row["sibling"], row["adapter"]) for row in results["rows"]}
    assert len(found) == len(results["rows"])
    adapters = ("bare", "copy", "input", "output", "choice", "retrained")
    assert found == {
        (QV.part, seed, sibling, adapter)
        for seed in (0, 1)
        for sibling in ("source", *FEW_STEPS.siblings)
        for adapter in (adapters[:4] if sibling == "source" else adapters)
    }
    assert all(0.0 <= row["score"] <= 1.0 for row in results["rows"])


def test_results_say_where_they_come_from(results: dict[str, Any]) -> None:
    loaded = json.loads(json.dumps(results))
    assert loaded["versions"].keys() >= {"python", "torch", "peft", "transformers", "xadapt"}
    assert loaded["hardware"].keys() >= {"processor", "cores", "threads_used"}
    assert loaded["git"].keys() == {"revision", "modified"}
    assert loaded["settings"]["lm"]["adapt_steps"] == FEW_STEPS.adapt_steps
    assert loaded["seconds"] > 0


def test_learning_rates_are_chosen_on_the_source(tmp_path: Path) -> None:
    settings = replace(TWO_SEEDS, seeds=(0,), lm=replace(FEW_STEPS, learning_rate_grid=(1e-9, 1e-2), adapt_steps=8))
    watch = Stops()
    results = run(settings, Cells(tmp_path), watch, ["lm"])
    assert plan(settings, ["lm"]) == ["lm-learning-rates", "lm-seed0"]
    chosen = {row["space"]: row["learning_rate"] for row in results["learning_rates"] if row["chosen"]}
    assert chosen == dict.fromkeys(SPACES, 1e-2)  # with the other nothing is learned
    assert results["settings"]["lm"]["placements"][0]["learning_rates"] == chosen
    tuning = watch.seen[: watch.seen.index("pre-training the source", 1)]
    assert len(tuning) == 1 + len(SPACES) * 2
    assert all(title.endswith("the source") for title in tuning)


def test_the_page_needs_nothing_but_itself(results: dict[str, Any]) -> None:
    grey = base64.b64encode(bytes(range(128))).decode()
    image = {"part": QV.part, "seed": 0, "adapter": "copy", "sibling": "light", "height": 8, "width": 16, "grey": grey}
    page = html({**results, "images": [image]})
    assert sheet(grey, 8, 16) in page
    for attribute in re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page):
        assert attribute.startswith("data:")
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)


def test_text_in_the_page_is_escaped(results: dict[str, Any]) -> None:
    page = html(
        {**results, "notes": ["<img src=x>"], "parts": [{**results["parts"][0], "headings": {"light": "<b>&"}}]}
    )
    assert "<img src=x>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_results_are_written_together(tmp_path: Path, results: dict[str, Any]) -> None:
    paths = write_results(results, tmp_path / "new", html)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"demo.json", "demo.md", "demo.html"}
    assert json.loads(paths["json"].read_text()) == json.loads(json.dumps(results))
    assert paths["md"].read_text() == markdown(results)


def test_nothing_is_written_if_one_file_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        write_together({tmp_path / "a.json": "{}", tmp_path / "file" / "b.json": "{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def rows(scores: dict[str, list[float]], sibling: str = "rot") -> list[dict[str, Any]]:
    return [
        {"part": "p", "seed": seed, "sibling": sibling, "adapter": adapter, "score": score}
        for adapter, values in scores.items()
        for seed, score in enumerate(values)
    ]


HIGH = Part(name="p", title="t", score="s")


@pytest.mark.parametrize(
    ("scores", "best", "says"),
    [
        ({"bare": [0.0], "copy": [0.9], "input": [0.6], "output": [0.7], "retrained": [1.0]}, {"copy"}, "copy"),
        ({"bare": [0.0], "copy": [0.0], "input": [1.0], "output": [0.0], "retrained": [1.0]}, {"input"}, "feature"),
        ({"bare": [0.0], "copy": [0.90], "input": [0.92], "retrained": [1.0]}, {"input"}, "even"),
        ({"bare": [0.0], "copy": [0.6, 1.0], "input": [0.9, 0.94], "retrained": [1.0, 1.0]}, {"input"}, "even"),
        ({"bare": [0.0], "copy": [0.1], "input": [0.3], "retrained": [1.0]}, {"input"}, "nothing"),
        ({"bare": [0.5], "copy": [0.1], "input": [0.3]}, set(), "feature"),
        ({"bare": [0.0], "copy": [0.0], "input": [0.02], "retrained": [1.0]}, set(), "nothing"),
        ({"bare": [0.0], "copy": [0.0], "input": [0.2], "choice": [1.0], "retrained": [1.0]}, {"choice"}, "feature"),
        ({"bare": [0.0], "copy": [0.801], "choice": [0.799], "input": [0.1]}, {"copy", "choice"}, "copy"),
    ],
)
def test_the_best_training_free_cell_is_marked_whoever_it_is(
    scores: dict[str, list[float]], best: set[str], says: str
) -> None:
    found = table(HIGH, rows(scores))
    assert {adapter for adapter, cell in found.rows["rot"].items() if cell.best} == best
    assert verdict(found, "rot") == says


def test_a_loss_is_better_when_it_is_lower() -> None:
    part = replace(HIGH, higher_is_better=False)
    found = table(part, rows({"bare": [3.0], "copy": [2.0], "input": [2.5]}))
    assert {adapter for adapter, cell in found.rows["rot"].items() if cell.best} == {"copy"}
    assert verdict(found, "rot") == "copy"


def test_a_check_is_measured_by_its_own_source() -> None:
    scores = rows({"bare": [0.1], "copy": [0.1], "tied": [0.2]}, "held out: indep")
    high = rows({"bare": [0.1], "copy": [0.9], "tied": [0.9]}, "held out: source")
    low = rows({"bare": [0.1], "copy": [0.1], "tied": [0.2]}, "held out: source")
    assert verdict(table(HIGH, [*high, *scores]), "held out: indep") == "nothing"
    assert verdict(table(HIGH, [*low, *scores]), "held out: indep") == "feature"


def test_png_is_read_back(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 80), dtype=np.uint8)
    content = base64.b64decode(png(pixels).removeprefix("data:image/png;base64,"))
    assert (np.asarray(image.open(io.BytesIO(content))) == pixels).all()


def test_a_sheet_sets_its_pictures_apart() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.uint8)
    drawn = sheet(base64.b64encode(pixels.tobytes()).decode(), 8, 16, zoom=1, gap=1)
    shown = np.asarray(image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2]))))
    assert shown.shape == (9, 18)
    assert (shown[:8, :8] == pixels[:, :8]).all()
    assert (shown[:8, 9:17] == pixels[:, 8:]).all()


def test_findings_tell_where_the_copy_wins() -> None:
    part = table(HIGH, rows({"bare": [0.0], "copy": [0.9], "input": [0.6], "retrained": [1.0]}))
    assert any("copied LoRA is ahead" in sentence and "0.90" in sentence for sentence in findings(part))


# ---- what is committed


def test_the_demo_uses_the_learning_rates_that_the_full_run_chose() -> None:
    committed = json.loads((RESULTS / "full.json").read_text(encoding="utf-8"))
    chosen: dict[str, dict[str, float]] = {}
    for row in committed["learning_rates"]:
        if row["chosen"] and row["part"] in (QV.part, ALL.part):
            chosen.setdefault(row["part"], {})[row["space"]] = row["learning_rate"]
    assert chosen == {placement.part: dict(placement.learning_rates) for placement in (QV, ALL)}


def test_the_committed_results_are_complete() -> None:
    committed = json.loads((RESULTS / "full.json").read_text(encoding="utf-8"))
    assert len({row["seed"] for row in committed["rows"] if row["part"] == QV.part}) >= 3
    assert (RESULTS / "full.md").read_text(encoding="utf-8") == markdown(committed)
    score = {
        (row["seed"], row["sibling"], row["adapter"]): row["score"]
        for row in committed["rows"]
        if row["part"] == QV.part
    }
    for seed in FULL.seeds:
        for name, space in EXACT_ON_QV:
            assert score[seed, name, space] == pytest.approx(score[seed, "source", space], abs=0.01)


def test_short_is_the_demo_in_fewer_steps() -> None:
    assert SHORT.lm.placements == (QV,)
    assert SHORT.lm.pretrain_steps < LmSettings().pretrain_steps


# ---- the command line


@pytest.mark.parametrize("command", [["demo", "--only", "lm"], ["--short", "--only", "lm"]])
def test_ctrl_c_leaves_no_results(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tiny.cli.Bars", lambda: Stops("pre-training the source"))
    assert main([*command, "--out", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


def test_render_writes_the_same_again(tmp_path: Path, results: dict[str, Any]) -> None:
    paths = write_results(results, tmp_path, html)
    before = {path: path.read_text(encoding="utf-8") for path in paths.values()}
    paths["md"].unlink()
    assert main(["render", str(paths["json"])]) == 0
    assert {path: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == before


def test_render_says_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert main(["render", str(tmp_path / "a.json")]) == 2
    assert "is not a result of this benchmark" in capsys.readouterr().err
    assert main(["render", str(tmp_path / "b.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_plan_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["full", "--plan", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in plan(FULL))
    assert not (tmp_path / "out").exists()
