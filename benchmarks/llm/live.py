"""lm-eval's view of a model that is loaded already, where that differs from lm-eval's own."""

from __future__ import annotations

import logging
from typing import Any

from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM

from benchmarks.llm.bases import device


class LiveModel(HFLM):
    """HFLM, with beam search as transformers does it."""

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        """Token ids of prompts and continuations, as HFLM's.

        lm-eval's stopping criterion (0.4.13) takes the rows that it is shown for the texts of the batch. With beams they are
        candidates, and those of the first questions end the search for all. transformers itself ends a beam at the end of
        a text, and HFLM cuts what follows a stop string afterwards.
        """
        beams = generation_kwargs.get("num_beams", 1) > 1
        return super()._model_generate(context, max_length, [] if beams else stop, **generation_kwargs)


def live(model: Any, tokenizer: Any, batch: int) -> LiveModel:
    """`model` for lm-eval, sharing its questions with the other processes of this cell, if there are any."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each thing that is done on purpose here
    lm = LiveModel(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(device()))
    accelerator = Accelerator(cpu=device().type == "cpu")
    if accelerator.num_processes > 1:
        # For a live model HFLM assumes a single process. These three are what its own distributed set-up sets
        # (lm-eval 0.4.13); a test holds that two processes find what one finds.
        lm.accelerator, lm._rank, lm._world_size = accelerator, accelerator.process_index, accelerator.num_processes
    return lm
