"""Training A4A through accelerate: what is counted once whoever computes it, its options, what is left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from torch import Tensor

from tests.a4a_learning import batches, learn, learn_images, same, weights
from tests.a4a_models import batch_for, ip_adapter, pixart_like, sdxl_like
from tests.a4a_pipes import write_image_encoder, write_images, write_pipeline
from xadapt_a4a import A4AModel
from xadapt_a4a.draws import drawn, sample_generators
from xadapt_a4a.objective import objective_of
from xadapt_a4a.run import Progress
from xadapt_a4a.stream import ReadyBatches
from xadapt_a4a.training import training_step


class TestOnce:
    """Who computes a sample makes no difference."""

    def test_accumulated_batches_are_one_step_over_both(self) -> None:
        target, data = pixart_like(), batches(2)
        learned = learn(data, target, accumulate=2, steps=1)
        torch.manual_seed(0)
        model = A4AModel.from_ip_adapter(ip_adapter().tensors, target, depth=1)
        optimizer = torch.optim.AdamW(model.param_groups(1e-3, 1e-3, 1e-3), weight_decay=0.01)
        losses = [
            training_step(
                model,
                target.requires_grad_(False),
                batch,
                objective_of(target),
                sample_generators(0, number, 4),
                image_drop=0.05,
                backward=lambda loss: (loss / 2).backward(),
            )
            for number, batch in enumerate(data)
        ]
        optimizer.step()
        assert learned.losses == [sum(losses) / 2]
        assert all(torch.equal(tensor, weights(learned)[name]) for name, tensor in model.state_dict().items())

    def test_a_sample_draws_the_same_in_any_batch(self) -> None:
        def noise(size: int, generators: Any) -> Tensor:
            return drawn(lambda n, one: torch.randn(n, 3, generator=one), size, generators)

        assert torch.equal(noise(4, sample_generators(0, 7, 4))[:2], noise(2, sample_generators(0, 7, 2)))
        assert not torch.equal(noise(2, sample_generators(0, 7, 2)), noise(2, sample_generators(0, 8, 2)))
        assert not torch.equal(noise(2, sample_generators(0, 7, 2)), noise(2, sample_generators(1, 7, 2)))
        with pytest.raises(ValueError, match="3 generators for 2 samples"):
            noise(2, sample_generators(0, 0, 3))

    def test_two_processes_are_one_with_twice_the_batches(self, tmp_path: Path) -> None:
        alone = learn(accumulate=2, steps=3, ema=0.9)
        write_pipeline("sd15", tmp_path / "pipeline")
        write_image_encoder(tmp_path / "encoder")
        (write_images(tmp_path / "images", 6) / "5.png").write_text("no image")
        encoded = learn_images(tmp_path, cache=str(tmp_path / "alone"), accumulate=2)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        code = f"""
            import json, torch
            from accelerate import PartialState
            from pathlib import Path
            from tests.a4a_learning import learn, learn_images

            learned = learn(steps=3, ema=0.9, checkpoints={str(tmp_path / "run")!r}, checkpoint_every=2)
            state = PartialState()
            assert state.num_processes == 2
            torch.save(learned.model.state_dict(), {str(tmp_path)!r} + f"/{{state.process_index}}.pt")
            folder = Path({str(tmp_path)!r})
            encoded = learn_images(folder, cache=str(folder / "together"))
            try:
                learn_images(folder)
            except ValueError as error:
                assert "name one, cache=" in str(error)
            else:
                raise AssertionError("two processes cannot share a temporary folder")
            losses = [learned.losses, encoded.losses]
            json.dump(losses, open({str(tmp_path)!r} + f"/{{state.process_index}}.json", "w"))
            torch.distributed.destroy_process_group()
        """
        processes = []
        for rank in range(2):
            environment = {
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"},
            }
            run = [sys.executable, "-c", textwrap.dedent(code)]
            processes.append(subprocess.Popen(run, env=environment, stderr=subprocess.PIPE))
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors.decode()[-2000:]
        for name in "01":
            together = torch.load(tmp_path / f"{name}.pt", weights_only=True)
            losses = json.loads((tmp_path / f"{name}.json").read_text())
            torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(alone.losses))
            torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(encoded.losses), rtol=1e-4, atol=1e-5)
            for key, tensor in weights(alone).items():
                torch.testing.assert_close(together[key], tensor, atol=1e-5, rtol=1e-4)
        skipped = (tmp_path / "together" / "skipped.txt").read_text()
        assert skipped == (tmp_path / "alone" / "skipped.txt").read_text() == "5.png\tno image\n"
        assert (tmp_path / "run" / "checkpoint-00000003" / "training.json").is_file()


class TestOptions:
    def test_an_average_is_what_is_learnt(self) -> None:
        shown: list[tuple[bool, bool]] = []

        def observer(progress: Progress) -> None:
            raw = next(progress.model.parameters()).clone()
            with progress.averaged() as model:
                inside = torch.equal(raw, next(model.parameters()))
            shown.append((inside, torch.equal(raw, next(progress.model.parameters()))))

        plain, averaged = learn(), learn(ema=0.9, given={"observer": observer})
        assert plain.losses == averaged.losses
        assert not same(plain, averaged)
        assert shown[-1] == (False, True)

    def test_gradient_checkpointing_of_the_target_changes_nothing(self) -> None:
        target = sdxl_like()
        data = [batch_for(target)]
        plain = learn(data, target)
        assert not target.is_gradient_checkpointing
        again = learn(data, target, checkpointing=True)
        assert not target.is_gradient_checkpointing
        torch.testing.assert_close(again.losses, plain.losses)

    def test_half_precision_leaves_no_trace(self) -> None:
        plain, half = learn(), learn(mixed_precision="bf16")
        assert plain.losses != half.losses
        # bfloat16 keeps 8 bits
        torch.testing.assert_close(half.losses, plain.losses, rtol=0.02, atol=0)
        assert all(tensor.dtype is torch.float32 for tensor in weights(half).values())
        assert type(half.model).forward is A4AModel.forward
        assert "forward" not in vars(half.model)
        assert not AcceleratorState._shared_state

    def test_clipped_gradients(self) -> None:
        assert not same(learn(), learn(max_grad_norm=1e-4))

    def test_metrics_go_to_the_trackers(self) -> None:
        class Kept(GeneralTracker):  # type: ignore[misc]
            name = "kept"
            requires_logging_directory = False
            main_process_only = False

            def __init__(self) -> None:
                super().__init__()
                self.config: dict[str, Any] = {}
                self.values: list[dict[str, Any]] = []

            @property
            def tracker(self) -> Any:
                return self

            def store_init_configuration(self, values: dict[str, Any]) -> None:
                self.config = values

            def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
                self.values.append({**values, "step": step})

        tracker = Kept()
        accelerator = Accelerator(log_with=tracker)
        given = {"accelerator": accelerator, "observer": lambda progress: {"double": 2 * progress.loss}}
        try:
            learned = learn(steps=2, given=given)
        finally:
            AcceleratorState._reset_state()
        assert tracker.config["lr1"] == 1e-3
        assert tracker.values == [
            {"loss": loss, "double": 2 * loss, "step": step} for step, loss in enumerate(learned.losses, 1)
        ]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 0}, "at least one step"),
            ({"ema": 1.0}, r"ema=1\.0 is no decay"),
            ({"accumulate": 0}, "accumulate=0"),
            ({"checkpoint_every": 0}, "checkpoint_every=0"),
            ({"mixed_precision": "fp8"}, "mixed_precision"),
            ({"log_with": "wandbb"}, r"no tracker 'wandbb'. Did you mean 'wandb'"),
            ({"image_drop": 2.0}, r"image_drop=2\.0"),
            ({"text_drop": 0.1}, r"needs empty_text"),
        ],
    )
    def test_options_that_are_none(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            learn(**options)

    def test_an_accelerator_that_accumulates_otherwise(self) -> None:
        accelerator = Accelerator()
        try:
            with pytest.raises(ValueError, match="write accumulate=1 as well"):
                learn(accumulate=2, given={"accelerator": accelerator})
        finally:
            AcceleratorState._reset_state()


class TestReadyBatches:
    def test_a_share_of_an_endless_numbered_sequence(self) -> None:
        data = [{"n": number} for number in range(3)]
        stream = ReadyBatches(data).numbered(4, 2, seed=0)
        assert [(number, batch["n"]) for (number, batch), _ in zip(stream, range(4), strict=False)] == [
            (4, 1),
            (6, 0),
            (8, 2),
            (10, 1),
        ]
