"""The driver: settings, cells, tables, report."""

from __future__ import annotations

from pathlib import Path

from benchmarks.dreambooth.access import check_access
from benchmarks.dreambooth.grids import grids
from benchmarks.dreambooth.plots import plots
from benchmarks.dreambooth.settings import Settings
from benchmarks.dreambooth.stages import adaptings, stages
from benchmarks.dreambooth.subjects import chosen
from benchmarks.dreambooth.tables import tables
from benchmarks.frame.driver import Driver
from benchmarks.frame.trackers import check_trackers


def prepare(settings: Settings) -> None:
    """What would fail in every cell, said once before the first.

    Raises:
        ValueError: a subject without a class word or without images, an optimiser that is not installed, a batch that
            cannot be shared, an adaptation that this method does not have, a tracker, a model or a data set that cannot be
            had.
    """
    from benchmarks.dreambooth.images import subject_images
    from benchmarks.dreambooth.loop import shares
    from benchmarks.dreambooth.optimizers import check_installed

    named = {name for experiment in settings.experiments for name in experiment.subjects}
    names = tuple(dict.fromkeys([*settings.subjects, *settings.tuning.subjects, *sorted(named)]))
    subjects = chosen(settings.subjects_file, names)
    if settings.models == "loaded" and Path(settings.images).expanduser().is_dir():
        for subject in subjects:
            subject_images(settings.images, subject.name)
    check_trackers([settings.compute.log_with] if settings.compute.log_with else [])
    shares(settings.training.batch, settings.compute.micro_batch, settings.compute.processes)
    for _, pair, adapting in adaptings(settings):
        check_installed(pair.optimizer)
        adapting.config()
    if settings.models == "loaded":
        check_access(settings)


DRIVER = Driver(
    name="dreambooth",
    title="DreamBooth across sibling models",
    settings=Settings,
    stages=stages,
    tables=tables,
    html=lambda settings, records, store: [*plots(settings, records, store), *grids(settings, records, store)],
    prepare=prepare,
)
