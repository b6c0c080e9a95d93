"""Coupling projection, upgraded mapping and alignment: shapes, the paper's options, and their limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xadapt_a4a.alignment import Alignment
from xadapt_a4a.branch import Branch
from xadapt_a4a.coupling import CouplingProjection, coupling_dim
from xadapt_a4a.upgraded import LinearMapping, MappingBlock, UpgradedMapping, build_mapping

WIDTHS = [8, 16, 16, 8]


def features(tokens: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, tokens, width) for width in WIDTHS]


class TestCouplingDim:
    def test_it_is_the_least_common_multiple(self) -> None:
        assert coupling_dim([320, 640, 1280]) == 1280
        assert coupling_dim([6, 4]) == 12

    @pytest.mark.parametrize(("ratio", "dim"), [(0.5, 640), (1.0, 1280), (2.0, 2560)])
    def test_ratios_of_the_paper(self, ratio: float, dim: int) -> None:
        assert coupling_dim([320, 640, 1280], ratio) == dim

    def test_widths_without_common_factors_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"11520, times 1 11520, above the limit of 8192.*coupling_width=1280"):
            coupling_dim([1280, 1152])

    @pytest.mark.parametrize("ratio", [0.3, 0, -1, float("nan")])
    def test_ratios_that_give_no_width_are_refused(self, ratio: float) -> None:
        with pytest.raises(ValueError, match=r"Write 0.5, 1 or 2"):
            coupling_dim([8, 16], ratio)


class TestProjection:
    def test_rows_are_layer_after_layer(self) -> None:
        projection = CouplingProjection(WIDTHS, 16)
        given = features()
        rows = projection(given)
        assert rows.shape == (2, 4 * 3, 16)
        torch.testing.assert_close(rows[:, 3:6], projection.linears["16"](given[1]))

    def test_one_linear_per_width_or_per_layer(self) -> None:
        assert len(CouplingProjection(WIDTHS, 16).linears) == 2
        assert len(CouplingProjection(WIDTHS, 16, share="layer").linears) == 4
        assert CouplingProjection(WIDTHS, 16, share="layer")(features()).shape == (2, 12, 16)

    def test_interpolation_has_no_parameters_and_keeps_features_of_full_width(self) -> None:
        projection = CouplingProjection(WIDTHS, 16, mode="interpolate")
        assert not list(projection.parameters())
        given = features()
        torch.testing.assert_close(projection(given)[:, 3:6], given[1])

    def test_unknown_options_are_named(self) -> None:
        with pytest.raises(ValueError, match="write share='width' or share='layer'"):
            CouplingProjection(WIDTHS, 16, share="model")
        with pytest.raises(ValueError, match="projection='linear'"):
            CouplingProjection(WIDTHS, 16, mode="none")


class TestMapping:
    def test_learnable_rows_take_in_the_reference(self) -> None:
        mapping = UpgradedMapping(10, 16, depth=2, head_dim=8)
        reference = torch.randn(2, 12, 16)
        assert mapping(reference).shape == (2, 10, 16)
        assert not torch.allclose(mapping(reference), mapping(torch.randn(2, 12, 16)))

    def test_a_block_is_attention_over_reference_and_learnable_rows(self) -> None:
        """Eq. 9 written out for one head."""
        block = MappingBlock(8, head_dim=8)
        reference, learnable = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
        own = block.norm_learnable(learnable)
        rows = torch.cat([block.norm_reference(reference), own], dim=1)
        scores = block.to_q(own) @ block.to_k(rows).transpose(1, 2) / 8**0.5
        attended = learnable + block.to_out(scores.softmax(-1) @ block.to_v(rows))
        torch.testing.assert_close(block(reference, learnable), attended + block.ffn(attended))

    def test_widths_that_heads_do_not_divide(self) -> None:
        assert MappingBlock(32, head_dim=64)(torch.randn(1, 5, 32), torch.randn(1, 3, 32)).shape == (1, 3, 32)

    def test_linear_mapping(self) -> None:
        assert LinearMapping(12, 10, 16)(torch.randn(2, 12, 16)).shape == (2, 10, 16)

    def test_too_many_rows_are_refused_unless_allowed(self) -> None:
        sizes = {"depth": 1, "head_dim": 8, "ffn_ratio": 4}
        with pytest.raises(ValueError, match=r"4112 \+ 17990 = 22102 rows, more than 4096.*max_rows=22102"):
            build_mapping("attention", 4112, 17990, 8, max_rows=4096, **sizes)
        assert build_mapping("attention", 20, 20, 8, max_rows=40, **sizes)
        with pytest.raises(ValueError, match="mapping='attention' or mapping='linear'"):
            build_mapping("none", 20, 20, 8, max_rows=40, **sizes)
        with pytest.raises(ValueError, match="depth=0"):
            UpgradedMapping(10, 16, depth=0)


class TestAlignment:
    def test_each_layer_gets_its_own_rows_in_its_own_width(self) -> None:
        alignment = Alignment(16, [8, 24, 8])
        rows = torch.randn(2, 3 * 5, 16)
        aligned = alignment(rows)
        assert [tuple(x.shape) for x in aligned] == [(2, 5, 8), (2, 5, 24), (2, 5, 8)]
        torch.testing.assert_close(aligned[2], alignment.linears["8"](rows[:, 10:]))

    def test_pooling_has_no_parameters(self) -> None:
        alignment = Alignment(16, [8, 24, 8], mode="pool")
        assert not list(alignment.parameters())
        assert [x.shape[-1] for x in alignment(torch.randn(2, 15, 16))] == [8, 24, 8]


def test_the_whole_way_is_equations_7_to_12() -> None:
    """Written out with plain products, layer by layer and head by head, as the paper has it plus the residuals."""
    torch.manual_seed(0)
    tokens, dim, heads, targets, rounds = 3, 16, 2, [6, 10, 6], 2
    mapping = UpgradedMapping(len(targets) * tokens, dim, depth=rounds, head_dim=8, ffn_ratio=2)
    branch = Branch(CouplingProjection(WIDTHS, dim), mapping, Alignment(dim, targets)).double()
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    k = [one.double() for one in features(tokens)]
    weights = branch.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    reference = torch.cat([affine(one, f"projection.linears.{one.shape[-1]}") for one in k], dim=1)  # Eq. 7
    assert reference.shape == (2, len(WIDTHS) * tokens, dim)
    learnt = weights["mapping.learnable"].expand(2, -1, -1)
    for number in range(rounds):  # Eq. 9
        at = f"mapping.blocks.{number}"
        own = norm(learnt, f"{at}.norm_learnable")
        rows = torch.cat([norm(reference, f"{at}.norm_reference"), own], dim=1)
        attended = []
        for head in range(heads):
            part = slice(8 * head, 8 * head + 8)
            q, key, value = (
                x @ weights[f"{at}.{name}.weight"][part].T
                for x, name in ((own, "to_q"), (rows, "to_k"), (rows, "to_v"))
            )
            attended.append((q @ key.transpose(1, 2) / 8**0.5).softmax(-1) @ value)
        learnt = learnt + torch.cat(attended, -1) @ weights[f"{at}.to_out.weight"].T
        hidden = torch.nn.functional.gelu(norm(learnt, f"{at}.ffn.0") @ weights[f"{at}.ffn.1.weight"].T)
        learnt = learnt + hidden @ weights[f"{at}.ffn.3.weight"].T
    expected = [  # Eq. 11
        affine(learnt[:, tokens * i : tokens * (i + 1)], f"alignment.linears.{width}")
        for i, width in enumerate(targets)
    ]
    for found, wanted in zip(branch(k), expected, strict=True):
        torch.testing.assert_close(found, wanted)
