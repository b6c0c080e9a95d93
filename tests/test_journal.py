"""Finished layers are kept, and an interrupted transfer goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import make_llama
from tests.test_every_method import assert_same
from tests.weight_models import Watched, lora_on
from xadapt.base import open_base
from xadapt.journal import Journal, finished, keeping
from xadapt.siblings import Pair
from xadapt_weight import PROLORA


def test_without_a_journal_every_layer_is_calculated() -> None:
    assert finished("a", lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]


def test_a_finished_layer_is_not_calculated_again(tmp_path: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise AssertionError("it was calculated again")

    with keeping(Journal(tmp_path / "j", "one")):
        made = finished("a", lambda: {"x": torch.arange(4.0).view(2, 2).T})
        assert_same(finished("a", fail), made)
    with keeping(Journal(tmp_path / "j", "one")):
        assert_same(finished("a", fail), made)
    with keeping(Journal(tmp_path / "j", "another")), pytest.raises(AssertionError, match="calculated again"):
        finished("a", fail)
    with keeping(Journal(tmp_path / "j", "one")), pytest.raises(AssertionError, match="calculated again"):
        finished("b", fail)


def test_a_damaged_file_counts_for_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "one")
    journal.finished("a", lambda: {"x": torch.ones(2)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert journal.finished("a", lambda: {"x": torch.zeros(2)})["x"].tolist() == [0, 0]
    assert Journal(tmp_path, "one").finished("a", dict)["x"].tolist() == [0, 0]
    journal.clear()
    assert not tmp_path.exists()


def test_a_transfer_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    adapter = lora_on(make_llama(), ["q_proj", "v_proj"])
    broken = make_llama(seed=1)
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    with keeping(Journal(tmp_path / "j", "one")):
        with pytest.raises(ValueError, match="NaN"):
            PROLORA.build().transfer(adapter, Pair(open_base(make_llama()), open_base(broken)))
        target = Watched(open_base(make_llama(seed=1)))
        carried = PROLORA.build().transfer(adapter, Pair(open_base(make_llama()), target))
    assert target.read == ["model.layers.1.self_attn.v_proj.weight"]
    whole = PROLORA.build().transfer(adapter, Pair(open_base(make_llama()), open_base(make_llama(seed=1))))
    assert_same(carried.adapter.tensors, whole.adapter.tensors)
    assert carried.evidence == whole.evidence
