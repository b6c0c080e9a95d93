"""`python -m benchmarks.tiny pair`: two checkpoints on disk in the real formats, a text file, one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.tiny.checkpoints import read_lines, split
from benchmarks.tiny.cli import main
from benchmarks.tiny.siblings import reparam, rot

LINES = [
    f"The {colour} {animal} counts to {n}."
    for colour in ("red", "blue")
    for animal in ("fox", "owl")
    for n in range(15)
]


def make_tokenizer(vocabulary: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_model(hidden_size: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # untrained attention hardly matters, and an adapter on it even less
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source, two changes of basis of it, and one of another width."""
    folder = tmp_path_factory.mktemp("checkpoints")
    source = make_model()
    siblings = {
        "source": source,
        "rotated": rot(source, torch.Generator().manual_seed(1)),
        "reparametrised": reparam(source, torch.Generator().manual_seed(2)),
        "wide": make_model(hidden_size=64),
    }
    for name, model in siblings.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(LINES) + "\n\n", encoding="utf-8")
    return folder


def pair(checkpoints: Path, target: str, out: Path, *more: str) -> int:
    given = ["--source", str(checkpoints / "source"), "--target", str(checkpoints / target)]
    text = ["--text", str(checkpoints / "text.txt"), "--out", str(out)]
    return main(["pair", *given, *text, "--rank", "4", "--steps", "12", "--lr", "1e-2", *more])


def losses(out: Path) -> dict[tuple[str, str], float]:
    results = json.loads((out / "pair.json").read_text(encoding="utf-8"))
    return {(row["sibling"], row["adapter"]): row["score"] for row in results["rows"]}


@pytest.mark.parametrize(("target", "space"), [("rotated", "output"), ("reparametrised", "input")])
def test_the_space_that_did_not_change_carries_over(checkpoints: Path, target: str, space: str, tmp_path: Path) -> None:
    assert pair(checkpoints, target, tmp_path, "--retrain") == 0
    loss = losses(tmp_path)
    assert loss["target", "bare"] == pytest.approx(loss["source", "bare"], abs=1e-4)  # the same function
    for adapter in ("copy", "input", "output"):
        assert loss["source", adapter] < loss["source", "bare"] - 0.01
        if adapter == space:
            assert loss["target", adapter] == pytest.approx(loss["source", adapter], abs=1e-4)
        else:
            assert abs(loss["target", adapter] - loss["source", adapter]) > 1e-3
    assert loss["target", "retrained"] < loss["target", "bare"] - 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.html", "pair.json", "pair.md"]


def test_each_space_takes_its_best_learning_rate_on_the_source(checkpoints: Path, tmp_path: Path) -> None:
    assert pair(checkpoints, "rotated", tmp_path, "--lr", "1e-9", "1e-2", "--seeds", "0", "1") == 0
    results = json.loads((tmp_path / "pair.json").read_text(encoding="utf-8"))
    chosen = [row["learning_rate"] for row in results["learning_rates"] if row["chosen"]]
    assert chosen == [1e-2] * 6  # two seeds, three spaces
    assert results["settings"]["seeds"] == [0, 1]
    assert "±" in (tmp_path / "pair.md").read_text(encoding="utf-8")


def test_an_adapter_that_does_not_fit_is_a_note_not_a_number(checkpoints: Path, tmp_path: Path) -> None:
    assert pair(checkpoints, "wide", tmp_path) == 0
    assert ("target", "bare") in losses(tmp_path)
    assert not {("target", adapter) for adapter in ("copy", "input", "output")} & losses(tmp_path).keys()
    notes = json.loads((tmp_path / "pair.json").read_text(encoding="utf-8"))["notes"]
    assert [note.split(" does not fit")[0] for note in notes] == [
        "The lora adapter",
        "The input adapter",
        "The output adapter",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--target", "no/such/folder/here"], "no/such/folder/here could not be opened"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--target-modules", "query"], "query"),
        (["--rank", "0"], "0"),
    ],
)
def test_what_cannot_run_is_said_and_nothing_is_written(
    checkpoints: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if change[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert pair(checkpoints, "rotated", tmp_path / "out", *change) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_lines(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has 2 non-empty lines; at least 10"):
        read_lines(tmp_path / "text.txt")


def test_no_line_is_in_two_splits() -> None:
    parts = split(LINES, seed=3)
    assert [len(part) for part in parts] == [48, 6, 6]
    assert sorted(line for part in parts for line in part) == sorted(LINES)
    assert split(LINES, seed=4) != parts


def test_plan_opens_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["pair", "--source", "a/b", "--target", "c/d", "--text", "nowhere.txt", "--out", str(tmp_path / "out")]
    assert main([*given, "--plan"]) == 0
    assert "a/b" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
