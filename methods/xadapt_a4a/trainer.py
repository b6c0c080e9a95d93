"""Training through accelerate: processes, precision, accumulation, averages, checkpoints that are resumed exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from .accelerators import placed, recomputing, to_device
from .bars import bar
from .checkpoints import CheckpointFolder, RunState, check_settings, load_weights, read_state, write_state
from .draws import sample_generators
from .dropping import default_drop
from .objective import Objective
from .reference import ReferenceAdapter
from .run import Observer, Progress, Run, averaged
from .stream import Batches, alike, signature
from .training import check_batch, frozen, training, training_step

EMA = "ema"  # the folder of the averaged adapter in a checkpoint


class Trainer:
    """Trains one adapter on one frozen target.

    Args:
        model: an `A4AModel`, or a baseline.
        optimizer: over the model's parameters.
        accelerator: with gradient_accumulation_steps set.
        observer: for samples and metrics on the way.
    """

    def __init__(
        self,
        model: ReferenceAdapter,
        target: nn.Module,
        objective: Objective,
        optimizer: Callable[[ReferenceAdapter], torch.optim.Optimizer],
        run: Run,
        accelerator: Accelerator,
        observer: Observer | None = None,
    ) -> None:
        self._model, self._target, self._objective = model, target, objective
        self._make_optimizer, self._run, self._accelerator, self._observer = optimizer, run, accelerator, observer
        self._folder = CheckpointFolder(run.checkpoints, run.keep_checkpoints) if run.checkpoints else None
        self._per_step = accelerator.gradient_accumulation_steps * accelerator.num_processes
        self._settings: dict[str, Any] = {
            **run.settings,
            **{
                name: getattr(run, name)
                for name in ("seed", "image_drop", "text_drop", "both_drop", "ema", "max_grad_norm")
            },
            "batches_per_step": self._per_step,
            "mixed_precision": accelerator.mixed_precision,
            "prediction": objective.prediction,
        }

    def train(self, batches: Batches) -> list[float]:
        """The loss of each step, from the first one on. The model has the averaged weights afterwards, where one is kept.

        With `checkpoints`, a run that was interrupted goes on from the newest one, and to the bit as if it had not been.

        Raises:
            ValueError: a checkpoint is of a run with other settings or other data, or damaged; a batch lacks something; the loss
                is no number.
        """
        with (
            frozen(self._target),
            training(self._model),
            placed(self._target, self._accelerator) as device,
            recomputing(self._target, self._run.recompute),
        ):
            nn.Module.to(self._model, device)
            optimizer = self._make_optimizer(self._model)
            ema = EMAModel(self._model.parameters(), decay=self._run.ema) if self._run.ema else None
            state = self._resumed(optimizer, ema) or RunState(settings=self._settings)
            network, prepared = self._accelerator.prepare(self._model, optimizer, device_placement=[False, False])
            if self._accelerator.scaler is not None and "scaler" in state.facts:
                self._accelerator.scaler.load_state_dict(state.facts["scaler"])
            self._init_trackers()
            try:
                self._loop(batches, network, prepared, optimizer, ema, state, device)
            finally:
                self._accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # takes autocast off the model
                vars(self._model).pop("forward", None)  # and leaves this
        if ema is not None:
            ema.copy_to(self._model.parameters())
        return state.losses

    def _loop(
        self,
        batches: Batches,
        network: Any,
        prepared: Any,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel | None,
        state: RunState,
        device: torch.device,
    ) -> None:
        main = self._accelerator.is_main_process
        stream = self._entered(batches, state)
        with bar("Training", self._run.steps, state.step, show=main) as advance:
            while state.step < self._run.steps:
                loss = self._step(stream, network, prepared, state, device)
                if ema is not None and not self._accelerator.optimizer_step_was_skipped:
                    ema.step(self._model.parameters())
                state.step += 1
                state.losses.append(loss)
                advance(f"loss {loss:.4f}")
                self._accelerator.log({"loss": loss, **self._observe(state, ema)}, step=state.step)
                if self._folder and (state.step % self._run.checkpoint_every == 0 or state.step == self._run.steps):
                    self._save(state, optimizer, ema)

    def _step(self, stream: Any, network: Any, prepared: Any, state: RunState, device: torch.device) -> float:
        """One step of the optimiser: as many batches as are accumulated."""
        run, accelerator = self._run, self._accelerator
        losses = []
        for micro in range(accelerator.gradient_accumulation_steps):
            number, batch = next(stream)
            check_batch(batch)
            if micro == 0 and self._folder is not None:
                state.batch = signature(batch)
            with accelerator.accumulate(network):
                loss = training_step(
                    self._model,
                    self._target,
                    to_device(dict(batch), device),
                    self._objective,
                    sample_generators(run.seed, number, len(batch["latents"])),
                    image_drop=run.image_drop,
                    text_drop=default_drop(run.text_drop, batch),
                    both_drop=default_drop(run.both_drop, batch),
                    forward=network,
                    autocast=accelerator.autocast,
                    backward=accelerator.backward,
                )
                losses.append(loss)
                if run.max_grad_norm and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), run.max_grad_norm)
                prepared.step()
                prepared.zero_grad()
        mean = sum(losses) / len(losses)
        if accelerator.num_processes > 1:
            mean = accelerator.reduce(torch.tensor(mean, device=device), reduction="mean").item()
        return mean

    def _entered(self, batches: Batches, state: RunState) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """This process's batches from here on; ValueError if the data is not what the run has seen before."""
        accelerator = self._accelerator
        first = max(0, state.step - 1) * self._per_step  # the step before is read again, to see that it is the same
        stream = batches.numbered(first + accelerator.process_index, accelerator.num_processes, self._run.seed)
        if state.step:
            seen, *_ = [next(stream)[1] for _ in range(accelerator.gradient_accumulation_steps)]
            check_batch(seen)
            if accelerator.is_main_process and not alike(signature(seen), state.batch):
                raise ValueError(
                    f"The data is not what it was: the batch of step {state.step} differs from the one that the checkpoint in "
                    f"{self._run.checkpoints} has seen. Give the same data in the same order, or name another folder in "
                    "checkpoints=… to begin anew."
                )
        return stream

    def _observe(self, state: RunState, ema: EMAModel | None) -> Mapping[str, float]:
        if self._observer is None or not self._accelerator.is_main_process:
            return {}
        self._model.eval()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                shown = Progress(state.step, self._run.steps, state.losses[-1], self._model, self._target, ema)
                return self._observer(shown) or {}
        finally:
            self._model.train()

    def _init_trackers(self) -> None:
        if self._accelerator.log_with:
            plain = (bool, int, float, str)
            flat = {name: one if isinstance(one, plain) else str(one) for name, one in self._settings.items()}
            self._accelerator.init_trackers("a4a", config=flat)

    def _save(self, state: RunState, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> None:
        scaler = self._accelerator.scaler
        state.facts = {} if scaler is None else {"scaler": scaler.state_dict()}
        if ema is not None:
            state.facts["ema_steps"] = ema.optimization_step

        def fill(part: Path) -> None:
            self._model.save_pretrained(part)
            if ema is not None:
                with averaged(self._model, ema):
                    self._model.save_pretrained(part / EMA)
            write_state(part, state, optimizer)

        if self._folder and self._accelerator.is_main_process:
            self._folder.write(state.step, fill)
        self._accelerator.wait_for_everyone()

    def _resumed(self, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> RunState | None:
        """The state of the newest checkpoint, with the weights put in their places; None without one."""
        if self._folder is None:
            return None
        if self._accelerator.is_main_process:
            self._folder.sweep()
        self._accelerator.wait_for_everyone()
        newest = self._folder.newest()
        if newest is None:
            return None
        check_settings(newest, self._settings)
        state = read_state(newest, optimizer)
        if state.step > self._run.steps:
            raise ValueError(
                f"{newest} is at step {state.step}, beyond steps={self._run.steps}. Raise steps, or name another folder in "
                "checkpoints=… to begin anew."
            )
        if ema is not None:
            load_weights(self._model, newest / EMA / SAFETENSORS_WEIGHTS_NAME)
            ema.shadow_params = [parameter.detach().clone() for parameter in self._model.parameters()]
            ema.optimization_step = state.facts["ema_steps"]
        load_weights(self._model, newest / SAFETENSORS_WEIGHTS_NAME)
        return state
