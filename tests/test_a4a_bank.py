"""Maps for batches: guidance, images per prompt, several references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.a4a_attaching import embeds, make
from tests.a4a_models import (
    SD15_WIDTHS,
    plus_file,
    run,
    sd15_like,
)
from xadapt_a4a import A4AModel


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestBatches:
    def test_guidance_is_both_halves_in_one(self) -> None:
        target = sd15_like()
        adapter = make(target)
        bank = adapter.encode(embeds())
        maps = bank.for_call(guidance=True, num_images_per_prompt=3)
        assert maps[0][0].shape[0] == 12
        key = bank.positive[0][0]
        assert torch.equal(maps[0][0][6:9], key[:1].expand(3, -1, -1))
        assert torch.equal(maps[0][0][9:], key[1:].expand(3, -1, -1))
        assert torch.equal(maps[0][0][:6], bank.negative[0][0].expand(6, -1, -1))

    def test_one_reference_serves_any_batch(self) -> None:
        target = sd15_like()
        adapter = make(target)
        one = adapter.encode(embeds(1))
        with adapter.attached(target, one, guidance=False):
            broadcast = run(target, batch=4)
        with adapter.attached(target, adapter.encode(embeds(1).expand(4, -1)), guidance=False):
            torch.testing.assert_close(run(target, batch=4), broadcast)
        with adapter.attached(target, one, guidance=True):  # [negative, negative, positive, positive]
            guided = run(target, batch=4)
        torch.testing.assert_close(guided[2:], broadcast[2:])
        assert not torch.allclose(guided[:2], broadcast[:2])

    @pytest.mark.parametrize("guidance", [True, False])
    def test_another_batch_than_the_models_is_refused(self, guidance: bool) -> None:
        target = sd15_like()
        adapter = make(target)
        with (
            adapter.attached(target, adapter.encode(embeds(2)), guidance=guidance),
            pytest.raises(ValueError, match=r"batch of 3.*guidance=True.*num_images_per_prompt=n"),
        ):
            run(target, batch=3)

    def test_several_references_are_attended_to_together(self) -> None:
        target = sd15_like()
        adapter = make(target)
        two = embeds(2)
        bank = adapter.encode(two[None])
        assert bank.batch == 1
        assert bank.positive[0][0].shape[1] == 2 * adapter.source.num_tokens
        assert bank.for_call(guidance=True)[0][0].shape[0] == 2
        first = adapter.encode(two[:1])
        twice = adapter.encode(two[:1].expand(2, -1)[None])
        with adapter.attached(target, first, guidance=False):
            expected = run(target)
        with adapter.attached(target, twice, guidance=False):  # the same image twice says nothing new
            torch.testing.assert_close(run(target), expected)

    def test_diffusers_own_form_of_embeddings(self) -> None:
        adapter = make(sd15_like())
        positive, negative = embeds(2)[:, None], embeds(2, seed=1)[:, None]
        bank = adapter.encode([torch.cat([negative, positive])])
        expected = adapter.encode(positive, negative)
        assert torch.equal(bank.positive[0][0], expected.positive[0][0])
        assert torch.equal(bank.negative[0][0], expected.negative[0][0])
        with pytest.raises(ValueError, match=r"\[negative; positive\]"):
            adapter.encode([positive, negative])

    def test_adapters_of_hidden_states_have_no_default_negative(self) -> None:
        target = sd15_like()
        torch.manual_seed(0)
        adapter = A4AModel.from_ip_adapter(plus_file(SD15_WIDTHS), target, depth=1).eval()
        bank = adapter.encode(torch.randn(2, 9, 16))
        assert bank.negative is None
        with pytest.raises(ValueError, match="negative_image_embeds=…"):
            adapter.attach(target, bank)
        adapter.attach(target, bank, guidance=False).detach()
        assert adapter.encode(torch.randn(2, 9, 16), torch.zeros(1, 9, 16)).for_call(guidance=True)

    def test_negatives_of_another_number_are_refused(self) -> None:
        with pytest.raises(ValueError, match="2 samples of 4 tokens, the negative embeddings 3 of 4"):
            make(sd15_like()).encode(embeds(2), embeds(3))
        with pytest.raises(ValueError, match="1 samples of 8 tokens, the negative embeddings 1 of 12"):
            make(sd15_like()).encode(embeds(2)[None], embeds(3)[None])

    @pytest.mark.parametrize(("number", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
    def test_numbers_of_images_that_are_none(self, number: Any, error: type[Exception]) -> None:
        target = sd15_like()
        adapter = make(target)
        with pytest.raises(error, match="num_images_per_prompt"):
            adapter.attach(target, adapter.encode(embeds()), num_images_per_prompt=number)
