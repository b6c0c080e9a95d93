"""The methods that carry an adapter by weights alone: what every method must do, then what each of them says it does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.conftest import make_llama
from tests.language_models import adapted_llama
from tests.test_every_method import assert_same, trained_adapter
from tests.weight_models import Watched, attach, errors_in, errors_of, lora_on, updates_on
from xadapt.base import open_base
from xadapt.contract import Kind, Method, Transfer
from xadapt.reading import detach
from xadapt.siblings import Pair
from xadapt_feature import INPUT_ADA, OUTPUT_ADA
from xadapt_weight import LORA_X, PINV_INPUT, PINV_OUTPUT, PROLORA

METHODS = (PINV_INPUT, PINV_OUTPUT, LORA_X, PROLORA)
Logits = Callable[[nn.Module], Tensor]

# PEFT says so of every LoRA on embeddings.
embeddings = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
every_pair = pytest.mark.parametrize(
    ("method", "kind"),
    [(method, kind) for method in METHODS for kind in method.reads],
    ids=lambda value: value.name,
)


class TestEveryMethod:
    @every_method
    def test_it_can_be_listed_and_its_options_are_fields(self, method: Method) -> None:
        assert method.name.isidentifier()
        assert "\n" not in method.summary
        for option in dataclasses.fields(method.build):
            assert option.kw_only
            assert option.default is not dataclasses.MISSING
        with pytest.raises(TypeError, match="no_such_option"):
            method.build(**{"no_such_option": 1})

    @every_pair
    def test_it_carries_an_adapter_and_changes_neither_base(self, method: Method, kind: Kind) -> None:
        adapter = trained_adapter(kind, make_llama())
        before = copy.deepcopy(dict(adapter.tensors))
        source, target = open_base(make_llama()), open_base(make_llama(seed=1))
        weights = [{name: base.weights()[name].clone() for name in base.weights()} for base in (source, target)]

        step = method.build()
        assert isinstance(step, Transfer)
        moved = step.transfer(adapter, Pair(source, target)).adapter

        assert moved.kind == method.writes
        assert all(torch.isfinite(tensor).all() for tensor in moved.tensors.values())
        assert_same(adapter.tensors, before)
        for base, was in zip((source, target), weights, strict=True):
            assert_same({name: base.weights()[name] for name in base.weights()}, was)
        fresh = make_llama(seed=1)
        method.writes.attach(fresh, moved.config)
        assert {n: t.shape for n, t in method.writes.tensors(fresh).items()} == {
            n: t.shape for n, t in moved.tensors.items()
        }

    @every_method
    def test_its_evidence_names_each_layer(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "down_proj"])
        carried = method.build().transfer(adapter, Pair(open_base(make_llama()), open_base(make_llama(seed=1))))
        assert len(carried.evidence) == 4
        assert "model.layers.0.mlp.down_proj" in carried.evidence
        assert all(0 <= error < 2 for error in errors_in(carried).values())
        assert not carried.left_out

    @every_method
    def test_tensors_keep_the_adapter_s_dtype(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        half = {name: tensor.bfloat16() for name, tensor in adapter.tensors.items()}
        bases = [open_base(make_llama(seed).bfloat16()) for seed in (0, 1)]
        moved = method.build().transfer(dataclasses.replace(adapter, tensors=half), Pair(*bases)).adapter
        assert {tensor.dtype for tensor in moved.tensors.values()} == {torch.bfloat16}

    @every_method
    def test_of_two_ranks_each_layer_keeps_its_own(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5})
        target = make_llama(seed=1)
        moved = method.build().transfer(adapter, Pair(open_base(make_llama()), open_base(target))).adapter
        fresh = make_llama(seed=1)
        moved.kind.attach(fresh, moved.config)
        assert {n: t.shape for n, t in moved.kind.tensors(fresh).items()} == {
            n: t.shape for n, t in moved.tensors.items()
        }

    @every_method
    def test_it_streams_the_adapted_layers_from_disk(self, method: Method, tmp_path: Path) -> None:
        """Each tensor once, and no network is loaded."""
        bases = []
        for seed in (0, 1):
            make_llama(seed).save_pretrained(tmp_path / str(seed))
            bases.append(Watched(open_base(tmp_path / str(seed))))
        adapter = lora_on(make_llama(), ["q_proj", "up_proj"])
        moved = method.build().transfer(adapter, Pair(*bases)).adapter
        live = method.build().transfer(adapter, Pair(open_base(make_llama()), open_base(make_llama(seed=1)))).adapter
        assert_same(moved.tensors, live.tensors)
        adapted = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]
        assert bases[0].read == adapted
        assert bases[1].read == (adapted if method in (LORA_X, PROLORA) else [])

    @every_method
    def test_what_it_writes_runs_in_peft_saved_and_loaded(self, method: Method, logits: Logits, tmp_path: Path) -> None:
        """With options under which nothing is lost, on the source itself: the logits are the LoRA's."""
        adapter = lora_on(make_llama(), ["q_proj"])
        exact = {PINV_INPUT.name: {"ridge": 0}, PINV_OUTPUT.name: {"ridge": 0}}.get(method.name, {"energy": 1.0})
        moved = method.build(**exact).transfer(adapter, Pair(open_base(make_llama()), open_base(make_llama()))).adapter
        attach(make_llama(), moved).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
        wanted = logits(attach(make_llama(), adapter))
        assert not torch.allclose(wanted, logits(make_llama()), atol=1e-3)
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-3, atol=1e-4)


class TestOtherBases:
    @every_method
    def test_pruned_depth_is_aligned(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        target = make_llama(seed=1, layers=3)
        moved = method.build().transfer(adapter, Pair(open_base(make_llama()), open_base(target))).adapter
        assert {name.split(".")[2] for name in moved.tensors} == {"0", "2"}
        assert updates_on(moved, target).keys() == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)}

    @every_method
    def test_layers_without_a_counterpart_are_named(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        carried = method.build().transfer(
            adapter, Pair(open_base(make_llama()), open_base(make_llama(seed=1, layers=1)))
        )
        (path,) = carried.left_out
        assert path == "model.layers.1.self_attn.q_proj"
        assert "blocks" in carried.left_out[path]
        assert carried.evidence.keys() == {"model.layers.0.self_attn.q_proj"}

    @every_method
    def test_other_widths_are_refused(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        with pytest.raises(ValueError, match=r"q_proj.*32 × 32 in the source, 64 × 64 in the target"):
            method.build().transfer(
                adapter, Pair(open_base(make_llama()), open_base(make_llama(seed=1, hidden_size=64)))
            )

    @every_method
    def test_modules_to_save_are_refused(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        adapter.config.modules_to_save = ["lm_head"]
        full = dataclasses.replace(adapter, tensors={**adapter.tensors, "lm_head.weight": torch.zeros(64, 32)})
        with pytest.raises(ValueError, match=r"modules_to_save.*lm_head\.weight"):
            method.build().transfer(full, Pair(open_base(make_llama()), open_base(make_llama(seed=1))))

    @every_method
    def test_an_update_of_full_rank_is_refused(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"], use_dora=True)
        tensors = {n: t.abs() + 1 if "magnitude" in n else t for n, t in adapter.tensors.items()}
        with pytest.raises(ValueError, match="xadapt export --rank"):
            method.build().transfer(
                dataclasses.replace(adapter, tensors=tensors),
                Pair(open_base(make_llama()), open_base(make_llama(seed=1))),
            )

    @embeddings
    def test_an_embedding_has_no_form_in_feature_space(self) -> None:
        adapter = lora_on(make_llama(), ["embed_tokens"])
        with pytest.raises(ValueError, match="embed_tokens is an embedding"):
            PINV_INPUT.build().transfer(adapter, Pair(open_base(make_llama()), open_base(make_llama(seed=1))))

    @every_method
    def test_a_base_with_nan_is_refused(self, method: Method) -> None:
        broken = make_llama()
        with torch.no_grad():
            broken.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
        adapter = lora_on(make_llama(), ["q_proj"])
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight of the base holds NaN"):
            method.build().transfer(adapter, Pair(open_base(broken), open_base(broken)))

    @pytest.mark.parametrize("method", [PINV_OUTPUT, LORA_X, PROLORA], ids=lambda method: method.name)
    def test_an_input_adapter_tied_over_layers_is_read(self, method: Method) -> None:
        model = adapted_llama("tied")
        adapter = detach(model)
        bases = open_base(make_llama()), open_base(make_llama())
        step = method.build(**({"ridge": 0} if method is PINV_OUTPUT else {"energy": 1.0}))
        moved = step.transfer(adapter, Pair(*bases)).adapter
        errors = errors_of(updates_on(moved, make_llama()), updates_on(adapter, make_llama()))
        assert all(error < 1e-3 for path, error in errors.items() if path.endswith("q_proj"))


class TestOptions:
    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            (PINV_INPUT, {"ridge": -1}, "ridge=-1: a number from 0 on"),
            (PINV_INPUT, {"ridge": float("nan")}, "ridge=nan"),
            (PINV_OUTPUT, {"precision": "half"}, "precision='float32' or precision='float64'"),
            (PINV_OUTPUT, {"precision": "float32", "ridge": 0}, "ridge=0 in float32"),
            (LORA_X, {"rank": 0}, "rank=0: a rank is a positive integer"),
            (PROLORA, {"rank": 3, "energy": 0.9}, "pass one of them"),
        ],
    )
    def test_wrong_ones_are_refused(self, method: Method, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            method.build(**options)

    def test_single_precision_is_enough_with_a_ridge(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        found = [
            PINV_OUTPUT.build(precision=precision)
            .transfer(adapter, Pair(open_base(make_llama()), open_base(make_llama())))
            .adapter
            for precision in ("float32", "float64")
        ]
        for name, tensor in found[0].tensors.items():
            torch.testing.assert_close(tensor, found[1].tensors[name], rtol=1e-3, atol=1e-4)

    def test_importing_the_methods_imports_no_torch(self, run_python: Callable[..., str]) -> None:
        assert run_python("import sys, xadapt_weight; print('torch' in sys.modules)").strip() == "False"


def test_output_ada_is_what_pinv_output_writes() -> None:
    assert PINV_OUTPUT.writes is OUTPUT_ADA.writes
    assert PINV_INPUT.writes is INPUT_ADA.writes
