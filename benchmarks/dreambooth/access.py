"""Whether the models of a preset can be had: asked before the first cell, by the smallest file of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.dreambooth.settings import Settings
from benchmarks.frame.advice import advice_for

PIPELINE, MODEL, DATA = "model_index.json", "config.json", "README.md"

UNREACHED = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError")


def check_access(settings: Settings) -> None:
    """Raises ValueError with every pipeline, judge and data set that is missing, gated or no folder of its kind, and what to do."""
    used = {name for experiment in settings.experiments for name in experiment.pairs}
    pairs = [pair for pair in settings.pairs if pair.name in used]
    wanted = {(pair.source, pair.source_revision, PIPELINE): None for pair in pairs}
    wanted |= {(pair.target, pair.target_revision, PIPELINE): None for pair in pairs}
    judges = [settings.judge.clip, settings.judge.dino, settings.judge.classifier]
    wanted |= {(judge, None, MODEL): None for judge in judges if judge is not None}
    if not Path(settings.images).expanduser().is_dir():  # a folder is looked through by itself
        wanted |= {(settings.images, None, DATA): None}
    wrong = list(problems(wanted))
    if wrong:
        raise ValueError("these cannot be had:\n  " + "\n  ".join(wrong))


def problems(wanted: Iterable[tuple[str, str | None, str]]) -> Iterable[str]:
    """One line for each (name or folder, revision, file) that is not there."""
    connected = True
    for name, revision, file in wanted:
        folder = Path(name).expanduser()
        if folder.is_dir():
            if not (folder / file).is_file():
                yield f"{name}: the folder holds no {file}; save_pretrained writes one."
            continue
        if folder.is_absolute() or name.startswith("."):
            yield f"{name}: there is no such folder."
            continue
        error = _from_hub(name, revision, file, connected)
        if error is not None:
            connected &= (
                type(error).__name__ not in UNREACHED
            )  # each further try would take half a minute to say the same
            yield f"{name}: {advice_for(error) or str(error).strip().splitlines()[0]}"


def _from_hub(name: str, revision: str | None, file: str, connected: bool) -> Exception | None:
    """Why the hub, and the local cache of it, do not give the file."""
    from huggingface_hub import hf_hub_download

    try:
        kind = "dataset" if file == DATA else "model"
        hf_hub_download(name, file, revision=revision, repo_type=kind, local_files_only=not connected)
    except Exception as error:  # gated, unknown, offline, a name that is none: all of them are for the user to mend
        return error
    return None
