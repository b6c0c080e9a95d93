"""The fingerprint of a base: equal for one model however it is stored, different for its siblings, cheap."""

from __future__ import annotations

import pytest
import torch

from xadapt.fingerprint import LayerPrint, compare, layer_print


def weight(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*shape or (64, 48), generator=torch.Generator().manual_seed(seed))


def test_the_same_numbers_have_the_same_print() -> None:
    assert layer_print(weight()).compare(layer_print(weight())) == "same"
    assert layer_print(weight()).compare(layer_print(torch.nn.Parameter(weight()))) == "same"


def test_other_numbers_have_another() -> None:
    assert layer_print(weight(0)).compare(layer_print(weight(1))) == "differs"
    # A fine-tuned sibling differs everywhere, if only a little.
    assert layer_print(weight()).compare(layer_print(weight() * (1 + 1e-5))) == "differs"


def test_another_width_is_said_to_be_one() -> None:
    assert layer_print(weight(0, 64, 48)).compare(layer_print(weight(0, 48, 64))) == "other shape"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_it_is_kept_in_does_not_matter(dtype: torch.dtype) -> None:
    half = weight().to(dtype)
    assert layer_print(half).compare(layer_print(half.float())) == "same"
    assert layer_print(half).dtype != layer_print(half.float()).dtype


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (1024,), (8, 4, 3, 3)])
def test_small_tensors_have_one_too(shape: tuple[int, ...]) -> None:
    assert layer_print(weight(0, *shape)).compare(layer_print(weight(0, *shape))) == "same"
    assert layer_print(weight(0, *shape)).compare(layer_print(weight(1, *shape))) == "differs"


def test_what_cannot_be_read_is_unknown() -> None:
    meta = layer_print(torch.empty(64, 48, device="meta"))
    assert meta.digest == ""
    assert meta.compare(layer_print(weight())) == "unknown"


def test_it_is_one_line_of_a_config() -> None:
    for found in (layer_print(weight()), layer_print(torch.empty(3, device="meta"))):
        assert LayerPrint.from_text(found.as_text()) == found
    with pytest.raises(ValueError, match="no fingerprint"):
        LayerPrint.from_text("64 by 48")


def test_layers_are_compared_one_by_one() -> None:
    recorded = {"a": layer_print(weight(0)).as_text(), "b": layer_print(weight(1)).as_text(), "gone": "3x3 float32 00"}
    base = {"a.weight": weight(0), "b.weight": weight(2)}
    assert compare(recorded, base) == {"a": "same", "b": "differs", "gone": "unknown"}


def test_it_reads_a_thousand_numbers_of_a_large_weight() -> None:
    large = weight(0, 4096, 512)
    changed = large.clone()
    changed.view(-1)[300_000] += 1  # between two of the blocks: what a fingerprint is too cheap to see
    assert layer_print(large) == layer_print(changed)
