"""Whether the models of a preset can be had: asked before the first cell, by the smallest file of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.dreambooth.settings import Settings
from benchmarks.frame.advice import advice_for

PIPELINE, MODEL = "model_index.json", "config.json"


def check_access(settings: Settings) -> None:
    """Raises ValueError with every pipeline and judge that is missing, gated or no folder of its kind, and what to do."""
    used = {name for experiment in settings.experiments for name in experiment.pairs}
    pairs = [pair for pair in settings.pairs if pair.name in used]
    wanted = {(pair.source, pair.source_revision, PIPELINE): None for pair in pairs}
    wanted |= {(pair.target, pair.target_revision, PIPELINE): None for pair in pairs}
    judges = [settings.judge.clip, settings.judge.dino, settings.judge.classifier]
    wanted |= {(judge, None, MODEL): None for judge in judges if judge is not None}
    wrong = list(problems(wanted))
    if wrong:
        raise ValueError("these cannot be had:\n  " + "\n  ".join(wrong))


def problems(wanted: Iterable[tuple[str, str | None, str]]) -> Iterable[str]:
    """One line for each (name or folder, revision, file) that is not there."""
    for name, revision, file in wanted:
        folder = Path(name).expanduser()
        if folder.is_dir():
            if not (folder / file).is_file():
                yield f"{name}: the folder holds no {file}; save_pretrained writes one."
            continue
        if folder.is_absolute() or name.startswith("."):
            yield f"{name}: there is no such folder."
            continue
        error = _from_hub(name, revision, file)
        if error is not None:
            yield f"{name}: {advice_for(error) or str(error).strip().splitlines()[0]}"


def _from_hub(name: str, revision: str | None, file: str) -> Exception | None:
    """Why the hub, and the local cache of it, do not give the file."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, file, revision=revision)
    except Exception as error:  # gated, unknown, offline, a name that is none: all of them are for the user to mend
        return error
    return None
