"""benchmarks/zoo: its tasks and siblings for what they claim, its score of trust, its rows and plan."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.tiny.progress import Silent
from benchmarks.tiny.tasks import IGNORE
from benchmarks.zoo.carry import AS_IT_IS, ROWS, put_on
from benchmarks.zoo.driver import plan
from benchmarks.zoo.settings import DENOISER_SIBLINGS, FULL, LM_SIBLINGS, SHORT
from benchmarks.zoo.siblings import llama, make_sibling
from benchmarks.zoo.tasks import NEW_TASKS, OLD_TASKS, VOCABULARY, answered_by, is_scored, new_lines, old_lines
from benchmarks.zoo.trust import compare, same_answers


def test_new_lines_are_solved_and_parted() -> None:
    python = {
        "D": lambda d: sorted(d, reverse=True),
        "X": lambda d: [*d[::-1][1:], d[-1]],
        "T": lambda d: [d[-1], *d[:-1]],
        "I": lambda d: [(x + 1) % 10 for x in d],
    }
    assert python.keys() == NEW_TASKS.keys()
    assert not set(NEW_TASKS) & set(OLD_TASKS)
    for keyword, solve in python.items():
        for scored in (True, False):
            batch = new_lines(keyword, 50, torch.Generator().manual_seed(1), scored=scored)
            texts = ["".join(VOCABULARY[index] for index in line) for line in batch.tokens]
            for text in texts:
                digits = [int(character) for character in text[1:6]]
                assert text == f"{keyword}{''.join(map(str, digits))}>{''.join(map(str, solve(digits)))}."
            assert (is_scored(batch.tokens[:, 1:6] - VOCABULARY.index("0")) == scored).all()
            assert (batch.labels[:, :7] == IGNORE).all()
            assert torch.equal(batch.labels[:, 7:], batch.tokens[:, 7:])


def test_a_fifth_of_the_numbers_is_scored_and_no_digit_tells_which() -> None:
    digits = torch.cartesian_prod(*[torch.arange(10)] * 5)
    scored = is_scored(digits).double()
    assert scored.mean() == pytest.approx(0.2, abs=0.005)
    for place in range(5):
        for digit in range(10):
            assert scored[digits[:, place] == digit].mean() == pytest.approx(0.2, abs=0.02)


def test_answers_are_the_models_own() -> None:
    torch.manual_seed(0)
    model = llama(SHORT.lm.tiny).eval()
    asked = new_lines("D", 6, torch.Generator().manual_seed(0)).tokens
    answered = answered_by(model, asked)
    assert torch.equal(answered[:, :7], asked[:, :7])
    with torch.no_grad():
        said = model(input_ids=answered).logits.argmax(-1)
    assert torch.equal(said[:, 6:-1], answered[:, 7:])


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    """Untrained, with norm gains that differ and large enough weights."""
    torch.manual_seed(0)
    model = llama(SHORT.lm.tiny)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(4)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=old_lines(16, torch.Generator().manual_seed(2)).tokens).logits


@pytest.mark.parametrize("name", LM_SIBLINGS)
def test_a_sibling_keeps_the_function_if_it_says_so(name: str, source: LlamaForCausalLM) -> None:
    before = copy.deepcopy(source.state_dict())
    sibling = make_sibling(name, source, SHORT.lm, 0, Silent()).eval()
    assert all(torch.equal(tensor, before[key]) for key, tensor in source.state_dict().items())
    moved = (logits(sibling) - logits(source)).abs().max()
    if "same function" in LM_SIBLINGS[name][1]:
        assert moved < 1e-4
        assert any(not torch.equal(tensor, before[key]) for key, tensor in sibling.state_dict().items())
    else:
        assert moved > 1e-3


def test_shapes_of_siblings(source: LlamaForCausalLM) -> None:
    made = {name: make_sibling(name, source, SHORT.lm, 0, Silent()) for name in ("cut", "deeper", "wider", "narrower")}
    assert [len(made[name].model.layers) for name in ("cut", "deeper")] == [2, 5]
    assert [made[name].config.hidden_size for name in ("wider", "narrower")] == [96, 48]


def test_an_inserted_block_does_nothing_until_it_is_trained(source: LlamaForCausalLM) -> None:
    still = replace(SHORT.lm, deeper=(0, 1e-3))
    torch.testing.assert_close(logits(make_sibling("deeper", source, still, 0, Silent())), logits(source))


def test_compare_is_one_for_the_same_change_and_zero_for_none() -> None:
    torch.manual_seed(0)
    plain, adapted = (torch.randn(20, 7).log_softmax(-1) for _ in range(2))
    same = compare("lm", [plain], [adapted], [plain], [adapted])
    none = compare("lm", [plain], [adapted], [plain], [plain])
    assert same.score == pytest.approx(1)
    assert same.direction == pytest.approx(1)
    assert none.score == pytest.approx(0, abs=1e-6)
    assert same_answers([adapted], [adapted]) == 1
    assert same_answers([torch.eye(4)], [torch.eye(4).flip(0)]) == 0
    with pytest.raises(ValueError, match="shapes"):
        compare("lm", [plain], [adapted], [plain], [adapted[:, :5]])


def test_every_row_is_of_an_installed_method() -> None:
    for row in ROWS.values():
        assert any(row.takes(space) for space in AS_IT_IS), row.name
    assert ROWS["copy"].takes("input")
    assert ROWS["copy"].of("output") == "output_ada"
    assert not ROWS["pinv_input"].takes("input")
    assert not ROWS["distil"].takes("output")


def test_the_plan_has_every_sibling_and_row_once() -> None:
    cells = plan(FULL)
    assert len(set(cells)) == len(cells)
    assert {cell.sibling for cell in cells if cell.part == "lm"} == {"source", *LM_SIBLINGS}
    assert {cell.sibling for cell in cells if cell.part == "denoiser"} == {"source", *DENOISER_SIBLINGS}
    assert {"bare", "retrained", "measures", *ROWS} <= {cell.what for cell in cells}
    assert len(LM_SIBLINGS) >= 12
    assert len(FULL.lm.tasks) >= 4


def test_a_merged_adapter_with_a_bias_gives_a_layer_without_one_a_bias() -> None:
    from peft import LoraConfig, get_peft_model

    from xadapt.reading import detach

    torch.manual_seed(0)
    base = llama(SHORT.lm.tiny).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot merge it; here the layer gets a bias
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = copy.deepcopy(base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a vector among the tensors is taken for a shard
        adapter = detach(model)
    torch.testing.assert_close(logits(put_on(base, adapter)), logits(model.eval()), rtol=1e-4, atol=1e-4)
    assert base.state_dict().keys() == before.keys()
