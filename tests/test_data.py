"""Whatever the user calls data, as batches; and what is said where it is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_llama
from tests.data_models import WORDS, with_tokenizer
from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.data import Amount, open_data
from xadapt.data.batches import token_batches


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> CheckpointBase | LiveBase:
    return open_base(with_tokenizer(tmp_path_factory.mktemp("data") / "llama"))


class TestTexts:
    def test_a_text_file(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "lines.txt").write_text("a b c\n\nhello world\n")
        found = open_data(tmp_path / "lines.txt", base, base)
        (batch,) = found
        assert batch["input_ids"].tolist() == [[0, 1, 2], [10, 11, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert found.said.endswith("2 samples, 5 tokens")
        assert found.rows == 5

    def test_jsonl_with_text(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n')
        assert open_data(tmp_path / "rows.jsonl", base, base).rows == 3

    def test_messages_are_written_out_by_the_chat_template(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        there = open_base(with_tokenizer(tmp_path / "chat", template=template))
        row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a b"}]}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        (batch,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert batch["input_ids"].tolist() == [[10, 0, 1]]

    def test_messages_without_a_chat_template(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
        with pytest.raises(ValueError, match="no tokenizer of the two models has a chat template"):
            open_data(tmp_path / "rows.jsonl", base, base)

    def test_a_dataset(self, base: Any) -> None:
        datasets = pytest.importorskip("datasets", reason="datasets is an extra: pip install xadapt[data]")
        found = datasets.Dataset.from_list([{"text": "a b"}, {"text": "c d"}])
        assert open_data(found, base, base).rows == 4

    def test_how_much(self, base: Any) -> None:
        found = open_data(["a b c d"] * 5, base, base, Amount(samples=3, max_tokens=2, batch=2))
        assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 2), (1, 2)]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.txt", b"", "is empty: it has no line of text"),
            ("blank.txt", b"\n\n", "is empty"),
            ("bytes.txt", b"fine\n\xff\xfe\n", "line 2 is no text in UTF-8"),
            ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
            ("rows.jsonl", b'{"text": "a"}\n\n{"question": "b"}\n', r"line 3 has the fields 'question' and no text"),
            ("rows.jsonl", b'{"messages": [{"content": "b"}]}\n', "line 1 has the fields 'messages'"),
            ("rows.jsonl", b'{"prompt": "b", "completion": " "}', "line 1 has a completion that is empty"),
            ("rows.jsonl", b"[1]\n", "line 1 is list"),
        ],
    )
    def test_what_cannot_be_read(self, base: Any, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_data(tmp_path / name, base, base)

    def test_nothing_there(self, base: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not there"):
            open_data(tmp_path / "gone.txt", base, base)
        with pytest.raises(ValueError, match="is a folder, and a language model reads text"):
            open_data(tmp_path, base, base)


class TestTokenizers:
    def test_tokenizers_that_differ_are_refused_with_what_differs(self, base: Any, tmp_path: Path) -> None:
        other = open_base(with_tokenizer(tmp_path / "other", [*WORDS[1:], WORDS[0]]))
        with pytest.raises(
            ValueError, match=r"The tokenizers differ: 'b a' is \['b', 'a'\] \[1, 0\] for .* from token 0 on"
        ):
            open_data(["b a"], base, other)

    def test_tokenizers_may_differ_where_the_data_is_not(self, base: Any, tmp_path: Path) -> None:
        other = open_base(with_tokenizer(tmp_path / "more", [*WORDS, "new"]))
        assert open_data(["b a"], base, other).rows == 2

    def test_no_tokenizer(self) -> None:
        live = open_base(make_llama())
        with pytest.raises(ValueError, match=r"has a tokenizer beside it\. Pass tokenizer=…, or token ids"):
            open_data(["a"], live, live)

    def test_a_tokenizer_of_ones_own(self, base: Any) -> None:
        from xadapt.data.tokenizing import tokenizer_of

        live = open_base(make_llama())
        assert open_data(["a b"], live, live, tokenizer=tokenizer_of(base)).rows == 2

    def test_ids_above_the_vocabulary(self, tmp_path: Path) -> None:
        there = open_base(with_tokenizer(tmp_path / "big", [f"w{n}" for n in range(99)] + ["<unk>"]))
        with pytest.raises(ValueError, match=r"token id 98, and .* has a vocabulary of 64"):
            open_data(["w98"], there, there)


class TestTensors:
    def test_token_ids(self, base: Any) -> None:
        found = open_data(torch.arange(30).reshape(3, 10), base, base, Amount(batch=2, max_tokens=4))
        assert [batch["input_ids"].shape for batch in found] == [(2, 4), (1, 4)]

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.rand(2, 3), "integers .samples, length."),
            (torch.arange(3), "integers .samples, length."),
            (torch.zeros(0, 3).long(), "is empty"),
            (torch.full((1, 2), -1), "start at 0"),
            (torch.full((1, 2), 64), "vocabulary of 64"),
        ],
    )
    def test_what_is_no_token_ids(self, base: Any, ids: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_data(ids, base, base)

    def test_batches_as_given(self, base: Any) -> None:
        given = [{"input_ids": torch.ones(2, 3).long()}]
        assert list(open_data(iter(given), base, base)) == given

    def test_batches_that_are_none(self, base: Any) -> None:
        with pytest.raises(ValueError, match="is empty"):
            open_data([], base, base)
        with pytest.raises(ValueError, match="its batches hold no tensor"):
            open_data([{}], base, base)
        with pytest.raises(TypeError, match="not int"):
            open_data([1], base, base)
        with pytest.raises(ValueError, match="Batch 0 of the data holds NaN or infinity in 'inputs_embeds'"):
            open_data([{"inputs_embeds": torch.full((1, 2, 3), float("nan"))}], base, base)
        with pytest.raises(TypeError, match="data=int"):
            open_data(3, base, base)

    def test_padding(self) -> None:
        (batch,) = token_batches([[1, 2], [3]], 8)
        assert batch["input_ids"].tolist() == [[1, 2], [3, 0]]

    @pytest.mark.parametrize("name", ["samples", "max_tokens", "batch"])
    def test_an_amount_is_positive(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}=0: a positive integer"):
            Amount(**{name: 0})
