"""The module map's rules, each on the smallest tree of modules that shows it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.conftest import make_llama
from xadapt.base import open_base
from xadapt.module_map import MappedLayer, ModuleMap, map_modules, weight_similarity
from xadapt.module_map.depth import align, nearness
from xadapt.module_map.names import renamed_prefix, replace_prefix

Layers = Mapping[str, "tuple[int, ...] | nn.Module"]


def network(layers: Layers) -> dict[str, nn.Module]:
    """Modules by path: a linear from (out, in), a convolution from (out, in, kernel), or the module itself."""
    return {path: layer if isinstance(layer, nn.Module) else _layer(*layer) for path, layer in layers.items()}


def _layer(outputs: int, inputs: int, kernel: int = 0) -> nn.Module:
    with torch.device("meta"):
        return nn.Conv2d(inputs, outputs, kernel) if kernel else nn.Linear(inputs, outputs)


def stack(blocks: int, shape: tuple[int, int] = (4, 4), path: str = "layers.{}.up") -> Layers:
    return {path.format(number): shape for number in range(blocks)}


def mapped(source: Layers, target: Layers, **options: Any) -> ModuleMap:
    return map_modules(network(source), network(target), **options)


def only(found: ModuleMap) -> MappedLayer:
    (line,) = found.lines
    return line


def pairs(found: ModuleMap) -> dict[str, str]:
    return {line.source: line.target for line in found.lines}


class TestShapes:
    def test_the_same_layer(self) -> None:
        line = only(mapped({"a.q": (4, 4)}, {"a.q": (4, 4)}))
        assert line == MappedLayer("a.q", "a.q", "same", "the same name and shape")
        assert line.fits

    @pytest.mark.parametrize(
        ("source", "target", "relation", "reason"),
        [
            ((4, 4), (8, 4), "reshaped", "other output widths (4 × 4 in the source, 8 × 4 in the target)"),
            ((4, 4), (4, 8), "reshaped", "other input widths (4 × 4 in the source, 4 × 8 in the target)"),
            ((4, 4), (8, 8), "reshaped", "other input and output widths (4 × 4 in the source, 8 × 8 in the target)"),
            ((4, 4, 1), (4, 4), "reshaped", "convolution 4 × 4 × 1 × 1 there, linear 4 × 4 here"),
            ((4, 4, 1), (4, 4, 3), "reshaped", "the kernel is 1 × 1 in the source, 3 × 3 in the target"),
        ],
    )
    def test_a_layer_whose_shape_changed(
        self, source: tuple[int, ...], target: tuple[int, ...], relation: str, reason: str
    ) -> None:
        line = only(mapped({"up": source}, {"up": target}))
        assert (line.relation, line.reason) == (relation, reason)
        assert not line.fits

    @pytest.mark.parametrize(
        ("name", "source", "target"),
        [
            ("k_proj", (8, 16), (4, 16)),
            ("to_v", (8, 16), (4, 16)),
            ("q_proj", (16, 16), (32, 16)),
            ("o_proj", (16, 16), (16, 32)),
        ],
    )
    def test_other_numbers_of_heads(self, name: str, source: tuple[int, int], target: tuple[int, int]) -> None:
        line = only(mapped({f"self_attn.{name}": source}, {f"self_attn.{name}": target}))
        assert line.relation == "heads"
        assert "heads" in line.reason

    def test_another_vocabulary(self) -> None:
        with torch.device("meta"):
            found = mapped({"embed": nn.Embedding(10, 4)}, {"embed": nn.Embedding(12, 4)})
        assert only(found).reason == "another vocabulary: 10 in the source, 12 in the target"

    def test_gpt_2_s_transposed_weights_are_read_the_right_way_round(self) -> None:
        with torch.device("meta"):
            found = mapped({"fc": Conv1D(8, 4)}, {"fc": nn.Linear(4, 8)})
        assert only(found).relation == "same"

    def test_norms_and_modules_without_weights_are_no_layers(self) -> None:
        found = mapped({"norm": nn.LayerNorm(4), "act": nn.GELU(), "up": (4, 4)}, {"up": (4, 4)})
        assert pairs(found) == {"up": "up"}
        assert not found.unmatched_source

    def test_quantised_layers_say_their_widths_themselves(self) -> None:
        packed = nn.Linear(4, 8, bias=False)
        packed.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
        assert only(mapped({"up": packed}, {"up": (8, 4)})).relation == "same"


class TestNames:
    def test_synonyms(self) -> None:
        line = only(mapped({"h.0.attention.dense": (4, 4)}, {"layers.0.self_attn.o_proj": (4, 4)}))
        assert line.relation == "renamed"
        assert line.reason == (
            "h is called layers in the target; attention is called self_attn in the target; "
            "dense is called o_proj in the target; the same shape"
        )

    def test_the_only_one_left_if_built_alike(self) -> None:
        one = {"mlp.up": (4, 4), "weird.a": (4, 3), "weird.b": (3, 4)}
        other = {"mlp.up": (4, 4), "odd.a": (4, 3), "odd.b": (3, 4)}
        assert pairs(mapped(one, other)) == {"mlp.up": "mlp.up", "weird.a": "odd.a", "weird.b": "odd.b"}
        unlike = {**other, "odd.b": (5, 4)}
        found = mapped(one, unlike)
        assert found.why_unmatched("weird.a") == "the target has no 'weird' in its root"

    def test_a_layer_alone_and_in_a_list_of_one(self) -> None:
        line = only(mapped({"attn.to_out.0": (4, 4)}, {"attn.to_out": (4, 4)}))
        assert (line.relation, line.reason) == ("renamed", "attn.to_out.0 is attn.to_out in the target; the same shape")

    @pytest.mark.parametrize("prefix", ["model", "model.language_model", "base.model.text"])
    def test_a_prefix(self, prefix: str) -> None:
        bare = {"layers.0.attn.q": (4, 4), "layers.1.attn.q": (4, 4)}
        wrapped = {f"{prefix}.{path}": shape for path, shape in bare.items()}
        for source, target in ((bare, wrapped), (wrapped, bare)):
            found = mapped(source, target)
            assert found.coverage.mapped_source == 2
            assert {line.relation for line in found.lines} == {"renamed"}
            assert [line.target for line in found.lines] == list(target)

    def test_a_prefix_under_which_layers_would_collide_is_left(self) -> None:
        source = {"a.layers.0.q.x": (4, 4), "a.layers.1.q.x": (4, 4)}
        target = {"b.layers.0.q.x": (4, 4), "b.layers.1.q.x": (4, 4), "a.layers.0.q.x": (4, 4)}
        assert len(set(pairs(mapped(source, target)).values())) == len(pairs(mapped(source, target)))

    def test_renamed_prefix(self) -> None:
        assert renamed_prefix(["m.layers.0.q"], ["m.t.layers.7.q"]) == ("m", "m.t")
        assert renamed_prefix(["m.layers.0.q"], ["m.layers.7.q"]) is None
        assert renamed_prefix(["m.layers.0.q"], ["m.layers.0.k"]) is None
        assert renamed_prefix([], []) is None

    def test_replace_prefix(self) -> None:
        assert replace_prefix("a.b.c", "a.b", "x") == "x.c"
        assert replace_prefix("ab.c", "a", "x") == "ab.c"
        assert replace_prefix("c", "", "x.y") == "x.y.c"
        assert replace_prefix("x.c", "x", "") == "c"


SPLIT: Layers = {"attn.q_proj": (8, 8), "attn.k_proj": (4, 8), "attn.v_proj": (4, 8)}


class TestFused:
    @pytest.mark.parametrize("name", ["qkv_proj", "to_qkv", "c_attn", "Wqkv"])
    def test_queries_keys_and_values(self, name: str) -> None:
        found = mapped(SPLIT, {f"attn.{name}": (16, 8)})
        assert [line.relation for line in found.lines] == ["part"] * 3
        assert [line.rows for line in found.lines] == [(0, 8), (8, 12), (12, 16)]
        assert found.lines[1].reason == f"k_proj is outputs 8 to 11 of the fused {name} in the target"
        back = mapped({f"attn.{name}": (16, 8)}, SPLIT)
        assert [line.relation for line in back.lines] == ["whole"] * 3
        assert [line.rows for line in back.lines] == [(0, 8), (8, 12), (12, 16)]

    def test_flux_s_single_blocks(self) -> None:
        split = {f"blocks.0.attn.to_{name}": (4, 4) for name in "qkv"} | {"blocks.0.proj_mlp": (16, 4)}
        for fused in ("attn.to_qkv_mlp_proj", "linear1"):
            found = mapped(split, {f"blocks.0.{fused}": (28, 4)})
            assert [line.rows for line in found.lines] == [(0, 4), (4, 8), (8, 12), (12, 28)]

    def test_head_by_head_there_are_no_rows(self) -> None:
        found = mapped(SPLIT, {"attn.query_key_value": (16, 8)})
        assert [line.rows for line in found.lines] == [None] * 3
        assert "alternate head by head" in found.lines[0].reason

    def test_of_other_widths_there_are_no_rows(self) -> None:
        found = mapped(SPLIT, {"attn.qkv_proj": (24, 8)})
        assert [line.rows for line in found.lines] == [None] * 3
        assert "of another width (q_proj, k_proj, v_proj are 16 × 8, qkv_proj is 24 × 8)" in found.lines[0].reason

    def test_a_part_that_is_missing_leaves_all_unmatched(self) -> None:
        found = mapped({"attn.q_proj": (8, 8), "attn.k_proj": (4, 8)}, {"attn.qkv_proj": (16, 8)})
        assert not found.lines
        assert found.why_unmatched("attn.k_proj") == "the target has no 'k_proj' in attn"

    def test_a_fused_layer_in_both_is_the_same_layer(self) -> None:
        both = {**SPLIT, "attn.to_qkv": (16, 8)}  # what diffusers' fuse_qkv_projections leaves
        found = mapped(SPLIT, both)
        assert {line.relation for line in found.lines} == {"same"}
        assert [layer.path for layer in found.unmatched_target] == ["attn.to_qkv"]

    def test_notes_of_the_way_there_are_kept(self) -> None:
        found = mapped(
            {f"layers.{number}.{path}": shape for number in range(2) for path, shape in SPLIT.items()},
            {f"layers.{number}.attn.qkv_proj": (16, 8) for number in range(3)},
        )
        assert "1 is aligned with 2; q_proj is outputs 0 to 7" in found.of("layers.1.attn.q_proj")[0].reason


class TestAlign:
    def test_it_is_the_best_monotone_one(self) -> None:
        """Against all there are."""
        generator = torch.Generator().manual_seed(0)
        for n, m in ((3, 5), (5, 3), (4, 4), (1, 4)):
            similarity = torch.rand(n, m, generator=generator).tolist()
            found = align(similarity)
            assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(found))
            best = max(
                sum(similarity[i][j] for i, j in zip(rows, columns, strict=True))
                for size in range(min(n, m) + 1)
                for rows in itertools.combinations(range(n), size)
                for columns in itertools.combinations(range(m), size)
            )
            assert sum(similarity[i][j] for i, j in found) == pytest.approx(best)

    def test_unlike_blocks_are_not_paired(self) -> None:
        assert align([[1.0, 0.0], [0.0, 0.0]]) == [(0, 0)]
        assert align([[-1.0]]) == []

    def test_nothing_aligns_with_nothing(self) -> None:
        assert align([]) == align([[]]) == []

    @pytest.mark.parametrize("matrix", [[[1.0], [1.0, 2.0]], [[float("nan")]]])
    def test_what_is_no_matrix_is_refused(self, matrix: list[list[float]]) -> None:
        with pytest.raises(ValueError, match=r"\[source blocks\]\[target blocks\]"):
            align(matrix)

    def test_nearness_is_highest_at_equal_relative_depth(self) -> None:
        assert nearness(0, 4, 0, 9) == nearness(3, 4, 8, 9) == 1
        assert 0 < nearness(0, 4, 8, 9) < nearness(0, 4, 1, 9) < 1
        assert nearness(0, 1, 0, 1) == 1


class TestDepth:
    def test_by_default_relative_depth_decides(self) -> None:
        found = mapped(stack(3), stack(5))
        assert list(pairs(found).values()) == ["layers.0.up", "layers.2.up", "layers.4.up"]
        assert found.lines[1].relation == "aligned"
        assert found.lines[1].reason == "layers has 3 blocks and 5 in the target: 1 is aligned with 2; the same shape"
        assert [layer.path for layer in found.unmatched_target] == ["layers.1.up", "layers.3.up"]
        assert found.unmatched_target[0].reason == (
            "layers has 5 blocks and 3 in the source: none is aligned with this one"
        )

    def test_shapes_decide_first(self) -> None:
        odd = {"layers.1.up": (9, 9)}
        found = mapped({**stack(3), **odd}, {**stack(2), "layers.1.up": (9, 9)})
        assert pairs(found) == {"layers.0.up": "layers.0.up", "layers.1.up": "layers.1.up"}

    def test_a_similarity_of_one_s_own(self) -> None:
        asked = []

        def similarity(source: str, target: str) -> float:
            asked.append((source, target))
            return 1.0 if (source, target) in (("layers.0", "layers.3"), ("layers.1", "layers.4")) else 0.0

        found = mapped(stack(2), stack(5), similarity=similarity)
        assert pairs(found) == {"layers.0.up": "layers.3.up", "layers.1.up": "layers.4.up"}
        assert len(asked) == 10

    def test_stacks_of_equal_depth_are_not_aligned(self) -> None:
        found = mapped(stack(3), stack(3), similarity=lambda one, other: pytest.fail("asked"))
        assert {line.relation for line in found.lines} == {"same"}

    def test_weights_tell_which_blocks_a_pruned_sibling_kept(self) -> None:
        whole, pruned = make_llama(layers=6), make_llama(layers=6)
        kept = [0, 1, 4]
        pruned.model.layers = nn.ModuleList(pruned.model.layers[number] for number in kept)
        source, target = open_base(whole), open_base(pruned)
        similarity = weight_similarity(source.weights(), target.weights())
        found = map_modules(source.modules(), target.modules(), similarity=similarity)
        for number, original in enumerate(kept):
            (line,) = found.of(f"model.layers.{original}.mlp.up_proj")
            assert line.target == f"model.layers.{number}.mlp.up_proj"
        assert similarity("model.layers.4", "model.layers.2") == pytest.approx(1)
        assert similarity("model.layers.4", "model.layers.0") < 0.2
        assert similarity("model.layers.4", "nowhere") == 0


SOURCE: Layers = {"a.0.x": (4, 4), "a.1.x": (4, 4), "head": (2, 4)}
TARGET: Layers = {"b.0.y": (4, 4), "b.1.y": (4, 4), "head": (2, 4)}
