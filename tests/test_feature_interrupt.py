"""Ctrl-C: in the middle of training the adapter is whole and can be saved; in the middle of saving nothing half loads."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft.config
import peft.peft_model
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import xadapt
from tests.feature_models import CONFIG, SPACES, Mlp, adapted, attach, feature_layers, mlp_batch, weights

TARGETS = ["lin0", "lin1"]
both_spaces = pytest.mark.parametrize("space", SPACES)


def press_ctrl_c(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def where_to_stop(model: PeftModel, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Places in a training step; each call arms one of them, for the second time it is passed."""
    count = itertools.count(1)

    def on_second(*_: Any) -> None:
        if next(count) == 2:
            press_ctrl_c()

    layer = feature_layers(model)[0]
    yield "forward", lambda: layer.base_layer.register_forward_pre_hook(on_second)
    yield "backward", lambda: next(p for p in model.parameters() if p.requires_grad).register_hook(on_second)
    yield "before the step", lambda: optimizer.register_step_pre_hook(on_second)
    yield "after the step", lambda: optimizer.register_step_post_hook(on_second)


@both_spaces
@pytest.mark.parametrize("place", range(4), ids=["forward", "backward", "before the step", "after the step"])
def test_during_training_the_adapter_so_far_is_kept(space: str, place: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = attach(Mlp(), CONFIG[space](r=2, target_modules=TARGETS)), mlp_batch()
    base = {name: tensor for name, tensor in weights(model).items() if "lora_" not in name}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    _, arm = list(where_to_stop(model, optimizer))[place]
    handle = arm()

    def steps(number: int) -> list[float]:
        losses = []
        for _ in range(number):
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with pytest.raises(KeyboardInterrupt):
        steps(5)
    handle.remove()

    # One step has been made, and nothing but the adapter by it.
    output = model.eval()(x)
    assert not torch.allclose(output, Mlp()(x), atol=1e-6)
    for name, tensor in base.items():
        assert torch.equal(model.state_dict()[name], tensor)
    model.save_pretrained(tmp_path)
    assert torch.equal(xadapt.load(Mlp(), tmp_path)(x), output)
    # And it goes on.
    losses = steps(3)
    assert losses[-1] < losses[0]


class TestDuringSave:
    """PEFT writes the model card, the tensors, the config, in this order; a folder without the config is no adapter."""

    @pytest.mark.parametrize("place", ["card", "tensors", "half of the tensors", "config", "half of the config"])
    def test_a_new_folder_does_not_load(self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted(Mlp(), CONFIG["input"](r=2, target_modules=TARGETS))
        folder = tmp_path / "adapter"

        def half(path: Path) -> None:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

        def tensors(state: dict[str, Tensor], path: str, **options: Any) -> None:
            if place == "half of the tensors":
                save_file(state, path, **options)
                half(Path(path))
            press_ctrl_c()

        def config(self: Any, path: str, **options: Any) -> None:
            if place == "half of the config":
                save_config(self, path, **options)
                half(Path(path) / "adapter_config.json")
            press_ctrl_c()

        save_file, save_config = peft.peft_model.safe_save_file, peft.config.PeftConfigMixin.save_pretrained
        if place == "card":
            monkeypatch.setattr(PeftModel, "create_or_update_model_card", press_ctrl_c)
        elif "tensors" in place:
            monkeypatch.setattr(peft.peft_model, "safe_save_file", tensors)
        else:
            monkeypatch.setattr(peft.config.PeftConfigMixin, "save_pretrained", config)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)

        base = Mlp()
        before = weights(base)
        with pytest.raises(ValueError, match=r"no adapter_config\.json|is not JSON"):
            xadapt.load(base, folder)
        assert weights(base).keys() == before.keys()
        # The adapter in memory is as good as before: saved again, it loads.
        monkeypatch.undo()
        model.save_pretrained(folder)
        assert torch.equal(xadapt.load(Mlp(), folder)(mlp_batch()), model(mlp_batch()))


@both_spaces
def test_during_a_merge_what_is_merged_can_be_unmerged(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(Mlp(), CONFIG[space](r=2, target_modules=TARGETS)), mlp_batch()
    expected = model(x)
    second: Any = feature_layers(model)[1]
    monkeypatch.setattr(second, "merge", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter()
    monkeypatch.undo()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)  # one layer is merged, the other is not
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(second.base_layer, nn.Linear)
