"""`xadapt.check`: measures and verdicts on tiny pairs, with and without data, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import xadapt
from tests.conftest import make_llama
from tests.verb_models import IDS, drifted, input_folder, lora_folder, rotated_values, unet_lora_folder
from xadapt.cli import main
from xadapt.cli.options import print_json
from xadapt.data import Amount


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("check")
    source = make_llama()
    source.save_pretrained(work / "source")
    drifted(source).save_pretrained(work / "drifted")
    make_llama(hidden_size=64).save_pretrained(work / "wider")
    lora_folder(work / "lora")
    input_folder(work / "input")
    return work


class TestWithoutData:
    def test_drift(self, work: Path) -> None:
        found = xadapt.check(work / "lora", work / "source", work / "drifted")
        assert found.verdict == "carries"
        assert found.recommended == "copy"
        assert len(found.layers) == 4
        for layer in found.layers:
            weight = "model.layers.0.self_attn.q_proj.weight"
            assert layer.weight_drift == pytest.approx(0.1, abs=0.02)
            assert layer.update_change == pytest.approx(0, abs=1e-6)  # a LoRA is the same update everywhere
            assert layer.inputs_moved is None
        one, other = (xadapt.open_base(work / name).weights()[weight] for name in ("source", "drifted"))
        assert found.layers[0].weight_drift == pytest.approx(float((other - one).norm() / one.norm()), rel=1e-5)

    def test_an_adapter_in_feature_space_changes_its_update(self, work: Path) -> None:
        found = xadapt.check(work / "input", work / "source", work / "drifted")
        assert found.recommended == "input_ada"
        assert found.belongs == {"same": 4}
        for layer in found.layers:
            assert layer.update_change == pytest.approx(0.1, abs=0.05)

    def test_a_rotated_basis_is_seen_from_weights_alone(self) -> None:
        source = make_llama()
        adapter = lora_folder_in_memory(["v_proj"])
        found = xadapt.check(adapter, source, rotated_values(source))
        assert {layer.way for layer in found.decision.layers} == {"input space"}
        assert found.verdict == "carries by layer"

    def test_a_target_that_the_adapter_was_merged_into(self, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Once more it would count twice."""
        xadapt.merge(work / "lora", work / "source", work / "merged")
        found = xadapt.check(work / "lora", work / "source", work / "merged")
        assert found.verdict == "refused"
        assert [layer.drift_along_update for layer in found.layers] == pytest.approx([1.0] * 4, abs=1e-3)
        given = ["--source", str(work / "source"), "--target", str(work / "merged"), "--out", str(work / "twice")]
        assert main(["transfer", str(work / "lora"), *given]) == 3
        assert "the adapter was merged into it, and would count twice" in capsys.readouterr().err
        assert not (work / "twice").exists()

    def test_a_target_that_has_a_little_of_it_is_none(self, work: Path) -> None:
        xadapt.merge(work / "lora", work / "source", work / "little", weights=[0.1])
        found = xadapt.check(work / "lora", work / "source", work / "little")
        assert found.verdict == "carries"
        assert [layer.update_in_drift for layer in found.layers] == pytest.approx([0.1] * 4, abs=1e-2)

    def test_another_width(self, work: Path) -> None:
        found = xadapt.check(work / "lora", work / "source", work / "wider")
        assert found.verdict == "needs data"
        assert all("32 × 32 in the source" in layer.reason for layer in found.layers if "q_proj" in layer.source)

    def test_less_depth_is_refused_from_half_the_layers_on(self, work: Path) -> None:
        found = xadapt.check(work / "lora", work / "source", make_llama(layers=1))
        assert found.verdict == "refused"
        assert found.refused

    def test_another_base_is_told(self, work: Path) -> None:
        found = xadapt.check(work / "input", work / "drifted", work / "source")
        assert not found.belongs_to_source
        assert any("is not the base that the adapter was trained on" in note for note in found.notes)

    def test_a_map_of_ones_own(self, work: Path) -> None:
        lines = {"model.layers.0.self_attn.q_proj": None}
        found = xadapt.check(work / "lora", work / "source", work / "drifted", map=lines)
        assert [layer.source for layer in found.layers if layer.target is None] == list(lines)

    def test_nan_is_named(self, work: Path) -> None:
        broken = make_llama()
        with torch.no_grad():
            broken.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight of .* holds NaN"):
            xadapt.check(work / "lora", work / "source", broken)

    def test_an_adapter_of_another_architecture(self, work: Path, gpt2: Any) -> None:
        with pytest.raises(ValueError, match="lacks"):
            xadapt.check(work / "lora", gpt2, work / "source")


class TestWithData:
    def test_the_same_model_did_not_move(self, work: Path) -> None:
        found = xadapt.check(work / "lora", work / "source", work / "source", IDS)
        assert all(layer.inputs_moved == layer.outputs_moved == 0 for layer in found.layers)
        assert all(layer.inputs_cka == pytest.approx(1) for layer in found.layers)
        assert found.data == "token ids: 8 samples, 128 tokens"

    def test_a_rotated_basis(self) -> None:
        source = make_llama()
        found = xadapt.check(lora_folder_in_memory(["v_proj"]), source, rotated_values(source), IDS)
        for layer in found.layers:
            assert layer.inputs_moved == pytest.approx(0, abs=1e-4)
            assert layer.outputs_moved is not None
            assert layer.outputs_moved > 0.5
            assert layer.outputs_cka == pytest.approx(1, abs=1e-3)  # which is why it decides nothing

    def test_distance_is_that_of_the_features(self, work: Path) -> None:
        source, target = make_llama(), drifted(make_llama())
        found = xadapt.check(work / "lora", source, target, IDS, amount=Amount(batch=3))
        seen: list[torch.Tensor] = []
        for model in (source, target):
            layer = model.model.layers[1].self_attn.q_proj
            handle = layer.register_forward_hook(lambda module, given, result: seen.append(given[0]))
            with torch.no_grad():
                model(input_ids=IDS)
            handle.remove()
        wanted = float((seen[1] - seen[0]).norm() / seen[0].norm())
        (layer,) = (one for one in found.layers if one.source == "model.layers.1.self_attn.q_proj")
        assert layer.inputs_moved == pytest.approx(wanted, rel=1e-4)

    def test_padding_does_not_count(self, work: Path) -> None:
        padded = {"input_ids": torch.nn.functional.pad(IDS, (0, 5)), "attention_mask": torch.ones(8, 21).long()}
        padded["attention_mask"][:, 16:] = 0
        pair = make_llama(), drifted(make_llama())
        one = xadapt.check(work / "lora", *pair, [padded])
        other = xadapt.check(work / "lora", *pair, IDS)
        for with_padding, without in zip(one.layers, other.layers, strict=True):
            assert with_padding.inputs_moved == pytest.approx(without.inputs_moved, rel=1e-4)

    def test_features_that_are_not_finite_are_named(self, work: Path) -> None:
        broken = make_llama()
        with torch.no_grad():
            broken.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
        with pytest.raises(
            ValueError, match=r"What model\.layers\.1\.self_attn\.q_proj of .* reads on the data holds NaN"
        ):
            xadapt.check(work / "lora", make_llama(), broken, IDS)

    def test_a_denoiser_on_random_latents_says_so(self, tmp_path: Path, unet: Any) -> None:
        adapter = unet_lora_folder(tmp_path / "lora")
        found = xadapt.check(adapter, unet, drifted(unet), "random", amount=Amount(samples=2))
        assert found.data is not None
        assert "random" in found.data
        assert any("not of pictures" in note for note in found.notes)
        assert all(layer.outputs_moved is not None for layer in found.layers)


class TestCommandLine:
    def test_for_programs(self, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = ["check", str(work / "lora"), "--source", str(work / "source"), "--target", str(work / "drifted")]
        assert main([*given, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["verdict"] == "carries"
        assert len(told["layers"]) == 4

    def test_for_people(self, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        given = ["check", str(work / "input"), "--source", str(work / "source"), "--target", str(work / "drifted")]
        assert main(given) == 0
        out = capsys.readouterr().out
        assert "verdict: carries" in out
        assert "recommended method: input_ada" in out
        assert "lowest fifth" in out

    def test_refused_is_3_and_a_mistake_is_2(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_llama(layers=1).save_pretrained(tmp_path / "shallow")
        given = ["check", str(work / "lora"), "--source", str(work / "source"), "--target"]
        assert main([*given, str(tmp_path / "shallow")]) == 3
        assert main([*given, str(tmp_path / "nothing")]) == 2
        assert "nothing" in capsys.readouterr().err


def lora_folder_in_memory(targets: list[str]) -> Any:
    from tests.test_weight_methods import lora_on

    return lora_on(make_llama(), targets)


class TestZeros:
    """Layers that start at zero, as ControlNet's and LoRA-merged adapters' do."""

    def test_a_weight_of_zeros_has_no_drift(self, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        zero = make_llama()
        with torch.no_grad():
            zero.model.layers[0].self_attn.q_proj.weight.zero_()
        found = xadapt.check(work / "lora", zero, work / "source")
        layer = next(one for one in found.layers if one.source == "model.layers.0.self_attn.q_proj")
        assert (layer.weight_drift, layer.weight_cosine) == (None, 0)
        print_json(found.as_dict())
        json.loads(capsys.readouterr().out, parse_constant=_no_constant)
        same = xadapt.check(work / "lora", zero, zero)
        assert next(one for one in same.layers if one.source == layer.source).weight_drift == 0

    def test_json_has_no_infinity(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_json({"a": [float("inf"), 1.5], "b": {"c": float("nan")}, "d": (1,), "e": Path("f")})
        told = json.loads(capsys.readouterr().out, parse_constant=_no_constant)
        assert told == {"a": [None, 1.5], "b": {"c": None}, "d": [1], "e": "f"}


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")
