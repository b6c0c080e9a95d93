"""One training: a mode's adapter on one base, by transformers' Trainer."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.frame.cell import HOW, Cell, Estimate, Result, how
from benchmarks.llm.bases import Base, load
from benchmarks.llm.recipes import TEXTS, examples, fingerprint, tokenise
from benchmarks.llm.settings import Adapter, Data, Machine, Mode, Recipe, Schedule

if TYPE_CHECKING:
    from peft import PeftConfig

    from benchmarks.frame.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Training(Cell):
    """Its artifact `adapter/` is a PEFT folder; its result holds the loss on the examples that were kept back."""

    packages = ("accelerate",)

    base_model: Base
    recipe: Recipe
    mode: Mode
    adapter: Adapter
    schedule: Schedule
    learning_rate: float
    seed: int
    examples: int = 0  # how many a generated recipe makes
    data: Data = field(default_factory=Data)
    machine: Machine = field(default_factory=Machine, metadata=HOW)
    hours: float = how(0.0)
    megabytes: float = how(0.0)

    def needs(self) -> tuple[Cell, ...]:
        return self.base_model.cells()

    def process_count(self) -> int:
        return self.machine.training_processes

    def estimate(self) -> Estimate:
        return Estimate(hours=self.hours, megabytes=self.megabytes)

    def base(self) -> str:
        return f"{self.base_model.label()} in {self.schedule.dtype}"

    def describe(self) -> str:
        return f"{self.mode} on {self.base_model.label()}, {self.recipe}, lr {self.learning_rate:g}, seed {self.seed}"

    def run(self, worker: Worker) -> Result:
        import torch
        from peft import get_peft_model
        from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

        import xadapt

        set_seed(self.seed)
        base, tokenizer = load(self.base_model, self.schedule.dtype, worker)  # its own copy: Trainer hooks into it
        base.config.use_cache = False
        if self.machine.gradient_checkpointing:
            base.enable_input_require_grads()  # or the frozen first layers cut the graph
        model: Any = get_peft_model(base, adapter_config(self.mode, self.adapter))
        found = examples(self.recipe, self.data, self.examples, self.seed)
        kept_back = self.schedule.validation
        if not 0 < kept_back < len(found):
            raise ValueError(f"validation = {kept_back} of {len(found)} examples; keep back one at least, and not all.")
        text = TEXTS[self.recipe]
        tokens = [tokenise(example, text, tokenizer, self.schedule.length) for example in found]
        collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, return_tensors="pt")
        trainer = Trainer(
            model=model,
            args=self._arguments(worker),
            train_dataset=tokens[kept_back:],
            eval_dataset=tokens[:kept_back],
            data_collator=collate,
        )
        trained = trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        if not math.isfinite(loss):
            raise ValueError(
                f"the training has diverged: its validation loss is {loss}. Leave the learning rate {self.learning_rate:g} out, "
                "or take mixed_precision bf16 in the place of fp16."
            )
        if worker.is_main:
            _keep_logs(worker.out / "trainer", worker.out / "trackers")
            shutil.rmtree(worker.out / "trainer", ignore_errors=True)
            xadapt.save(trainer.accelerator.unwrap_model(trainer.model), worker.out / "adapter")
        result: Result = {
            "validation_loss": float(loss),
            "training_loss": float(trained.training_loss),
            "steps": int(trained.global_step),
            "data": fingerprint(found),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        if torch.cuda.is_available():
            result["peak_gpu_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
        return result

    def _arguments(self, worker: Worker) -> Any:
        import torch
        from transformers import TrainingArguments

        schedule, machine = self.schedule, self.machine
        micro = min(machine.micro_batch, schedule.batch // machine.training_processes)
        names = TrainingArguments.__dataclass_fields__  # transformers 5 has renamed the field
        checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        renamed: dict[str, Any] = {checkpointing: machine.gradient_checkpointing}
        looks = "steps" if schedule.evaluate_every else "no"
        return TrainingArguments(
            output_dir=str(worker.out / "trainer"),
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=machine.evaluation_batch,
            gradient_accumulation_steps=schedule.batch // (micro * machine.training_processes),
            num_train_epochs=schedule.epochs,
            max_steps=schedule.max_steps,
            learning_rate=self.learning_rate,
            lr_scheduler_type=schedule.scheduler,
            warmup_steps=schedule.warmup,
            weight_decay=schedule.weight_decay,
            max_grad_norm=schedule.clip,
            optim=schedule.optimizer,
            fp16=schedule.mixed_precision == "fp16",
            bf16=schedule.mixed_precision == "bf16",
            **renamed,
            eval_strategy=looks,
            eval_steps=schedule.evaluate_every or None,
            save_strategy=looks if schedule.keep_best else "no",
            save_steps=schedule.evaluate_every or 500,
            save_total_limit=1,
            load_best_model_at_end=schedule.keep_best,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            label_names=["labels"],  # Trainer cannot read them off a PeftModel
            remove_unused_columns=False,
            ddp_find_unused_parameters=False if machine.training_processes > 1 else None,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=list(machine.trackers) or "none",
            run_name=self.name,
            logging_strategy="steps" if machine.trackers else "no",
            logging_steps=10,
            disable_tqdm=worker.quiet,
            seed=self.seed,
            data_seed=self.seed,
        )


def _keep_logs(trainer: Path, kept: Path) -> None:
    """What tensorboard has written goes on with the adapter; the rest of Trainer's folder goes."""
    if (trainer / "runs").is_dir():
        os.replace(trainer / "runs", kept)


def adapter_config(mode: Mode, adapter: Adapter) -> PeftConfig:
    """The PEFT config of a mode, in stock PEFT or xadapt."""
    from peft import LoraConfig

    import xadapt

    shared: dict[str, Any] = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(adapter.target_modules),
        "task_type": "CAUSAL_LM",
    }
    kind, _, space = mode.partition("-")
    if kind == "hybrid":
        return xadapt.HybridAdaConfig(space=space, feature_r=adapter.feature_rank, **shared)
    if kind == "dora":
        shared["use_dora"] = True
    classes = {"input": xadapt.InputAdaConfig, "output": xadapt.OutputAdaConfig}
    return classes.get(space or kind, LoraConfig)(**shared)
