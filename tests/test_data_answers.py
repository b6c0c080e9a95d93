"""Data that say what is a prompt and what is an answer, and what of a batch counts then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data_models import WORDS, with_tokenizer
from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.data import Amount, open_data
from xadapt.data.counting import counting, samples_counting, with_neutral


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> CheckpointBase | LiveBase:
    return open_base(with_tokenizer(tmp_path_factory.mktemp("data") / "llama"))


class TestAnswers:
    def test_of_prompts_with_completions_the_answers_count(self, base: Any, tmp_path: Path) -> None:
        rows = [{"prompt": "a b", "completion": " c"}, {"prompt": "hello", "completion": " world d"}]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found = open_data(tmp_path / "rows.jsonl", base, base)
        (batch,) = found
        end = WORDS.index("<unk>")
        assert batch["input_ids"].tolist() == [[0, 1, 2, end], [10, 11, 3, end]]
        assert batch["labels"].tolist() == [[-100, -100, 2, end], [-100, 11, 3, end]]
        assert found.said.endswith("2 samples, 8 tokens, 5 of them in answers")
        counted = counting(batch)
        assert counted is not None
        assert counted.tolist() == [[False, True, True, False], [True, True, True, False]]

    def test_an_end_that_is_there_is_not_written_again(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": " b <unk>"}')
        (batch,) = open_data(tmp_path / "rows.jsonl", base, base)
        assert batch["input_ids"].tolist() == [[0, 1, WORDS.index("<unk>")]]

    def test_a_completion_is_more_than_a_text_beside_it(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "a b c d", "prompt": "a", "completion": " b"}')
        (batch,) = open_data(tmp_path / "rows.jsonl", base, base)
        assert batch["labels"][0, :2].tolist() == [-100, 1]

    def test_prompts_without_answers_are_texts(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a b"}')
        (batch,) = open_data(tmp_path / "rows.jsonl", base, base)
        assert batch["input_ids"].tolist() == [[0, 1]]
        assert "labels" not in batch

    def test_some_prompts_leave_no_room(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text(
            '{"prompt": "a b c", "completion": " d"}\n{"prompt": "a", "completion": " d"}'
        )
        found = open_data(tmp_path / "rows.jsonl", base, base, Amount(max_tokens=3))
        assert found.said.endswith("2 of them in answers (1 of the prompts leave no room for one: max_tokens=3)")

    def test_prompts_that_leave_no_room_for_an_answer(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a b c", "completion": " d"}')
        with pytest.raises(ValueError, match="With max_tokens=3 nothing of an answer is left"):
            open_data(tmp_path / "rows.jsonl", base, base, Amount(max_tokens=3))

    def test_of_a_conversation_the_last_answer_counts(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
        there = open_base(with_tokenizer(tmp_path / "chat", template=template))
        turns = [{"role": "b", "content": "hello"}, {"role": "assistant", "content": "c d"}]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
        (batch,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert batch["input_ids"].tolist() == [[1, 10, 0, 2, 3]]
        assert batch["labels"].tolist() == [[-100, -100, -100, 2, 3]]

        both = {"prompt": turns[:1], "completion": turns[1:]}
        (tmp_path / "rows.jsonl").write_text(json.dumps(both))
        (again,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert torch.equal(again["labels"], batch["labels"])

    def test_who_asks_last_is_to_be_answered(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}j {% endif %}"
        there = open_base(with_tokenizer(tmp_path / "chat", template=template))
        (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
        (batch,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert batch["input_ids"].tolist() == [[10, 9]]

    def test_the_template_writes_the_start_token_and_nobody_else(self, tmp_path: Path) -> None:
        from tokenizers.processors import TemplateProcessing

        template = "j {% for m in messages %}{{ m['content'] }} {% endfor %}"
        folder = with_tokenizer(tmp_path / "chat", template=template)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="j $A", special_tokens=[("j", 9)])
        tokenizer.save_pretrained(folder)
        there = open_base(folder)
        rows = '{"messages": [{"role": "user", "content": "a"}]}\n{"text": "a"}'
        (tmp_path / "rows.jsonl").write_text(rows)
        (batch,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert batch["input_ids"].tolist() == [[9, 0], [9, 0]]


class TestWhatCounts:
    def test_of_neutral_inputs_nothing_does(self) -> None:
        data, neutral = ([{"input_ids": torch.full((1, 3), fill)}] for fill in (0, 10))
        one, other = with_neutral(data, neutral)
        assert one is data[0]
        counted = counting(other)
        assert counted is not None
        assert not counted.any()
        assert "labels" not in neutral[0]

    def test_of_denoisers_by_the_sample(self) -> None:
        (batch,) = with_neutral(
            [],
            [{"timestep": torch.zeros(1), "sample": torch.zeros(4, 2), "encoder_hidden_states": torch.zeros(4, 3, 2)}],
        )
        counted = samples_counting(batch, 4)
        assert counted is not None
        assert counted.tolist() == [False] * 4
        assert samples_counting({"labels": torch.tensor([-100, 0])}, 2).tolist() == [False, True]  # type: ignore[union-attr]  # given
        with pytest.raises(ValueError, match="labels are one for each sample"):
            samples_counting(batch, 3)

    def test_padding_and_what_labels_leave_out_do_not_count(self) -> None:
        ids, mask = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1]])
        labels = torch.tensor([[0, 0, -100, 0]])
        assert counting({"input_ids": ids}) is None
        assert counting({"input_ids": ids, "attention_mask": mask}).tolist() == [[False, True, True, True]]  # type: ignore[union-attr]  # given
        found = counting({"input_ids": ids, "attention_mask": mask, "labels": labels})
        assert found is not None
        assert found.tolist() == [[False, False, True, False]]
