"""A training of A4A that was stopped, or killed, goes on as if it had not been; what does not belong to it is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.a4a_learning import Stop, batches, learn, same, stop_at, weights
from tests.a4a_models import pixart_like
from xadapt_a4a import A4AModel
from xadapt_a4a.checkpoints import CheckpointFolder


class TestResume:
    @pytest.mark.parametrize(
        "options",
        [{}, {"ema": 0.9, "accumulate": 2}, {"mixed_precision": "bf16", "max_grad_norm": 0.5, "train_pta": False}],
    )
    def test_to_the_bit_as_if_it_had_never_stopped(self, tmp_path: Path, options: dict[str, Any]) -> None:
        whole = learn(**options)
        folder = {"checkpoints": str(tmp_path / "run"), "checkpoint_every": 2}
        with pytest.raises(Stop):
            learn(given=stop_at(5), **folder, **options)
        torch.manual_seed(99)  # whatever else has been drawn in between
        resumed = learn(**folder, **options)
        assert same(whole, resumed)
        assert same(whole, learn(**folder, **options))  # finished already: nothing is trained again
        assert [path.name for path in sorted((tmp_path / "run").iterdir())] == [
            "checkpoint-00000004",
            "checkpoint-00000006",
        ]

    def test_a_shuffling_loader_goes_on_where_it_was(self, tmp_path: Path) -> None:
        def loader() -> Any:
            return DataLoader(batches(5), batch_size=None, shuffle=True)

        whole = learn(loader(), steps=8)
        folder = {"checkpoints": str(tmp_path), "checkpoint_every": 3}
        with pytest.raises(Stop):
            learn(loader(), given=stop_at(7), steps=8, **folder)
        torch.manual_seed(5)
        assert learn(loader(), steps=8, **folder).losses == whole.losses

    def test_other_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        folder = {"checkpoints": str(tmp_path), "checkpoint_every": 1, "steps": 1}
        learn(**folder)
        with pytest.raises(ValueError, match=r"lr1 was 0\.001 and is 0\.01; seed was 0 and is 1"):
            learn(**{**folder, "lr1": 1e-2, "seed": 1})
        with pytest.raises(ValueError, match="batches_per_step was 1 and is 2"):
            learn(**{**folder, "accumulate": 2})
        with pytest.raises(ValueError, match="target_fingerprint was"):
            learn(target=pixart_like(seed=1), **folder)
        with pytest.raises(ValueError, match="mixed_precision was 'no' and is 'bf16'"):
            learn(**{**folder, "mixed_precision": "bf16"})
        longer = learn(**{**folder, "steps": 2, "checkpoint_every": 5, "checkpointing": True})
        assert len(longer.losses) == 2
        with pytest.raises(ValueError, match="is at step 2, beyond steps=1"):
            learn(**folder)

    def test_other_data_is_refused(self, tmp_path: Path) -> None:
        folder = {"checkpoints": str(tmp_path), "checkpoint_every": 2, "steps": 2}
        learn(**folder)
        with pytest.raises(ValueError, match="The data is not what it was: the batch of step 2"):
            learn(batches()[::-1], **{**folder, "steps": 4})

    def test_a_crash_in_mid_checkpoint_loses_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = learn()
        folder = {"checkpoints": str(tmp_path), "checkpoint_every": 2}
        replace = os.replace

        def no_space(source: Any, place: Any) -> None:
            if "00000004" in str(place):
                raise OSError(28, "No space left on device")
            replace(source, place)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", no_space)
            with pytest.raises(OSError, match="No space left"):
                learn(**folder)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000002"]
        half = tmp_path / ".checkpoint-00000004.x"  # what a killed process leaves
        half.mkdir()
        (half / "training.json").write_text("{")
        assert same(whole, learn(**folder))
        assert not half.exists()

    def test_a_killed_process_goes_on(self, tmp_path: Path) -> None:
        code = f"""
            import os, signal
            import xadapt_a4a.checkpoints as checkpoints
            from tests.a4a_learning import learn

            write = checkpoints.write_state
            def killed(folder, state, optimizer):
                if state.step == 4:
                    (folder / "training.safetensors").write_bytes(b"half")
                    os.kill(os.getpid(), signal.SIGKILL)
                write(folder, state, optimizer)
            import xadapt_a4a.trainer as trainer
            trainer.write_state = killed
            learn(checkpoints={str(tmp_path)!r}, checkpoint_every=2)
        """
        ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True)
        assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
        assert len(list(tmp_path.glob(".checkpoint-00000004.*"))) == 1
        assert same(learn(), learn(checkpoints=str(tmp_path), checkpoint_every=2))
        assert not list(tmp_path.glob(".checkpoint*"))

    @pytest.mark.parametrize("name", ["training.safetensors", "training.json", "diffusion_pytorch_model.safetensors"])
    def test_damaged_checkpoints_are_named(self, tmp_path: Path, name: str) -> None:
        folder = {"checkpoints": str(tmp_path), "checkpoint_every": 1, "steps": 2}
        learn(**folder)
        path = tmp_path / "checkpoint-00000002" / name
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(ValueError, match=r"checkpoint-00000002.*(damaged|is not JSON)"):
            learn(**folder)

    def test_a_checkpoint_is_an_adapter(self, tmp_path: Path) -> None:
        learned = learn(checkpoints=str(tmp_path), ema=0.5)
        averaged = A4AModel.from_pretrained(tmp_path / "checkpoint-00000006" / "ema").state_dict()
        raw = A4AModel.from_pretrained(tmp_path / "checkpoint-00000006").state_dict()
        assert all(torch.equal(averaged[name], tensor) for name, tensor in weights(learned).items())
        assert any(not torch.equal(raw[name], tensor) for name, tensor in weights(learned).items())

    def test_where_checkpoints_cannot_lie(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match="should name a folder"):
            learn(checkpoints=str(tmp_path / "file"))
        with pytest.raises(ValueError, match="keep_checkpoints=0"):
            CheckpointFolder(tmp_path, keep=0)
