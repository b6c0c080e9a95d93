"""What the module map says: lines of the user's own, its summary, and any two trees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_gpt2, make_llama
from tests.test_module_map import SOURCE, TARGET, Layers, mapped, network, pairs
from xadapt.base import open_base
from xadapt.module_map import Coverage, MappedLayer, map_modules


class TestOverride:
    def test_lines_come_before_everything_else(self) -> None:
        found = mapped(SOURCE, TARGET, override={"a.0.x": "b.1.y"})
        assert found.of("a.0.x") == (
            MappedLayer("a.0.x", "b.1.y", "given", "a.0.x → b.1.y by the map given; the same shape"),
        )
        assert found.of("head")[0].relation == "same"

    def test_a_star_is_a_number(self) -> None:
        found = mapped(SOURCE, TARGET, override={"a.*.x": "b.*.y"})
        assert pairs(found) == {"a.0.x": "b.0.y", "a.1.x": "b.1.y", "head": "head"}

    def test_a_module_stands_for_all_below_it(self) -> None:
        source = {"a.q": (4, 4), "a.up": (4, 4)}
        found = mapped(source, {"z.q": (4, 4), "z.up": (8, 4), "other": (1, 1)}, override={"a": "z"})
        assert pairs(found) == {"a.q": "z.q", "a.up": "z.up"}
        assert [line.relation for line in found.lines] == ["given", "reshaped"]

    def test_a_layer_s_own_line_goes_before_its_module_s(self) -> None:
        source, target = {"a.q": (4, 4), "a.k": (4, 4)}, {"z.q": (4, 4), "z.k": (4, 4)}
        found = mapped(source, target, override={"a": "z", "a.q": None})
        assert pairs(found) == {"a.k": "z.k"}

    def test_null_leaves_out(self) -> None:
        found = mapped(SOURCE, TARGET, override={"head": None})
        assert found.why_unmatched("head") == "left out by the map given"
        assert found.of("head") == ()
        assert "head" in [layer.path for layer in found.unmatched_target]

    def test_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "map.json"
        path.write_text(json.dumps({"a.0.x": "b.0.y", "head": None}))
        for override in (path, str(path)):
            found = mapped(SOURCE, TARGET, override=override)
            assert found.of("a.0.x")[0].target == "b.0.y"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"a.0.xx": "b.0.y"}, r"names 'a.0.xx', which the source has not. Did you mean 'a.0.x'"),
            ({"a.0.x": "b.0.yy"}, r"sends 'a.0.x' to 'b.0.yy', which the target has not. Did you mean 'b.0.y'"),
            ({"c.*.x": "b.*.y"}, r"names 'c.\*.x', which the source has not"),
            ({"a.0.x": "b.*.y"}, r"write as many \* on both sides"),
            ({"a.0.x": "b.0.y", "a.1.x": "b.0.y"}, r"both 'a.0.x' and 'a.1.x' to 'b.0.y'"),
            ({"a.0.x": "b.0.y", "a.*.x": "b.1.y"}, r"sends 'a.0.x' both to 'b.0.y' and to 'b.1.y'"),
        ],
    )
    def test_wrong_lines_are_refused(self, override: dict[str, str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mapped(SOURCE, TARGET, override=override)

    @pytest.mark.parametrize("override", [{"a.0.x": 3}, {"a.0.x": ["b.0.y"]}, {3: "b.0.y"}, ["a.0.x"]])
    def test_wrong_types_are_refused(self, override: Any) -> None:
        with pytest.raises(TypeError, match=r"for example|For example"):
            mapped(SOURCE, TARGET, override=override)

    @pytest.mark.parametrize("text", ["[1]", "{", '{"a.0.x": "b.0.y", "a.0.x": null}'])
    def test_a_bad_file_is_refused(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "map.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"map\.json"):
            mapped(SOURCE, TARGET, override=path)
        with pytest.raises(ValueError, match=r"nowhere\.json cannot be read"):
            mapped(SOURCE, TARGET, override=tmp_path / "nowhere.json")


class TestModuleMap:
    FOUND = mapped({"up": (4, 4), "down": (4, 4), "gone": (3, 3)}, {"up": (4, 4), "down": (8, 4), "new": (2, 2)})

    def test_coverage(self) -> None:
        coverage = self.FOUND.coverage
        assert coverage == Coverage(3, 3, 2, 2, {"same": 1, "reshaped": 1})
        assert str(coverage) == "2 of 3 source layers → 2 of 3 target layers (1 same, 1 reshaped)"

    def test_a_summary_lists_what_does_not_fit(self) -> None:
        assert self.FOUND.summary().splitlines() == [
            "2 of 3 source layers → 2 of 3 target layers (1 same, 1 reshaped)",
            "  down → down: other output widths (4 × 4 in the source, 8 × 4 in the target)",
            "  gone → nothing: the target has no 'gone' in its root",
            "  nothing → new: the source has no 'new' in its root",
        ]

    def test_of_an_adapter_s_layers_only(self) -> None:
        found = self.FOUND.restricted(["up", "gone"])
        assert str(found.coverage) == "1 of 2 source layers → 1 of 1 target layers (1 same)"

    def test_bases_without_anything_in_common(self) -> None:
        found = map_modules(open_base(make_llama()).modules(), network({"conv": (3, 3, 3)}))
        assert not found.lines
        assert str(found.coverage) == "0 of 16 source layers → 0 of 1 target layers (nothing)"
        assert map_modules({}, {}).coverage.source == 0

    def test_live_bases_of_two_families(self) -> None:
        """GPT-2's fused c_attn against Llama's q, k and v, which have other head counts: no rows then."""
        found = map_modules(open_base(make_gpt2()).modules(), open_base(make_llama()).modules())
        lines = found.of("transformer.h.1.attn.c_attn")
        assert [line.target.rpartition(".")[2] for line in lines] == ["q_proj", "k_proj", "v_proj"]
        assert found.of("transformer.h.1.mlp.c_proj")[0].target == "model.layers.1.mlp.down_proj"
        assert found.of("transformer.wte")[0].target == "model.embed_tokens"


NAMES = st.sampled_from(
    ["model", "layers", "h", "attn", "self_attn", "q_proj", "to_q", "qkv_proj", "k_proj", "v_proj", "0", "1", "2", "10"]
)
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=5).map(".".join),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    max_size=12,
)


class TestAnyTwoTrees:
    @given(TREES, TREES)
    @settings(max_examples=300, deadline=None)
    def test_each_layer_is_mapped_or_listed_with_a_reason(self, source: Layers, target: Layers) -> None:
        found = mapped(source, target)
        for layers, lines, left in (
            (source, {line.source for line in found.lines}, found.unmatched_source),
            (target, {line.target for line in found.lines}, found.unmatched_target),
        ):
            unmatched = [layer.path for layer in left]
            assert all(layer.reason for layer in left)
            assert sorted([*lines, *unmatched]) == sorted(layers)
        single = [line.target for line in found.lines if line.relation != "part"]
        assert len(single) == len(set(single))

    @given(TREES)
    @settings(max_examples=100, deadline=None)
    def test_each_maps_onto_itself(self, layers: Layers) -> None:
        found = mapped(layers, layers)
        assert {line.source: line.target for line in found.lines} == {path: path for path in layers}
        assert {line.relation for line in found.lines} <= {"same"}
