"""What a reader has to know before the numbers, told from the settings that they were made with."""

from __future__ import annotations

from benchmarks.zoo.results import Results


def notes(results: Results) -> list[str]:
    """How it was measured."""
    settings = results["settings"]
    lm, denoiser, halves = settings["lm"], settings["denoiser"], settings["halves"]
    seeds = settings["seeds"]
    return [
        f"{len(seeds)} seed(s). A seed has its own source, siblings, adapters and lines. A cell is one adapter (a task, a space) on one "
        "sibling of one seed.",
        f"Language model: {lm['tiny']['layers']} layers of {lm['tiny']['hidden']} features, adapters on "
        f"{', '.join(lm['target_modules'])} at rank {lm['rank']}, {lm['adapt_steps']} steps; learning rates chosen by the loss on a "
        f"source of a seed of its own, out of {', '.join(f'{rate:g}' for rate in lm['learning_rate_grid'])}. Scored on {lm['test_lines']} "
        f"lines of numbers that neither training nor calibration draws from.{_rates(results)}",
        f"Denoiser: the one of benchmarks/tiny with its learning rates, adapters on the cross-attention's k and v at rank "
        f"{denoiser['tiny']['rank']}, {denoiser['tiny']['adapt_steps']} steps. Scored on {10 * denoiser['images_per_digit']} digits.",
        f"Methods that look at data get {lm['calibration_lines']} lines of the old tasks and as many of the new one, these with the adapted "
        "source's own answers in the place of labels; denoisers get noisy images of the old styles, asked for by old words or the new "
        "name. auto judges by the answers of the new lines, and by the new name, alone: the rest is neutral, as `transfer(neutral=…)` takes "
        "it. Methods that train get more of the task's inputs. On another draw of these verify's score is measured.",
        "The form of verify's scores and auto's defaults were chosen by looking at cells of this zoo, of all siblings and tasks. The half "
        "held out tells what fitting the numbers is worth on other cells; it does not tell that of the form.",
        "A method that refuses a cell scores what the bare target scores. Leaving the target bare counts as a choice in hindsight. "
        "Retrained (a LoRA, with labels, on the target) is the ceiling, and no choice.",
        "The best in hindsight of many noisy scores is a little too good. auto, which may mix layers of several methods, can also do better "
        "than any of them; its regret is negative there.",
        f"Thresholds are fitted on cells with the siblings {', '.join(halves['lm_siblings'])} and the tasks {', '.join(halves['lm_tasks'])} "
        f"(denoiser: {', '.join(halves['denoiser_siblings'])}; {', '.join(halves['denoiser_tasks'])}); held out are cells of which neither "
        "the sibling nor the task is among these.",
    ]


def provenance_line(results: Results) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    hardware, git, cells = results["hardware"], results["git"], results["cells"]
    revision = f"{git['revision'][:12]}{' with changes' if git['modified'] else ''}" if git["revision"] else "unknown"
    return (
        f"{results['when']}; {cells['finished']} of {cells['planned']} cells, {sum(results['seconds'].values()) / 60:.0f} minutes of "
        f"work on one thread of a {hardware['processor']} shared with other jobs. {versions}. Revision {revision}. Written by "
        f"`{results['command']}`; edit nothing here by hand."
    )


def _rates(results: Results) -> str:
    """Per space the rate with the lowest mean loss over the tasks."""
    tried = results["learning_rates"]
    chosen = []
    for space in dict.fromkeys(row["space"] for row in tried):
        losses: dict[float, float] = {}
        for row in tried:
            if row["space"] == space:
                losses[row["learning_rate"]] = losses.get(row["learning_rate"], 0.0) + row["loss"]
        chosen.append(f"{space} {min(losses, key=lambda rate: losses[rate]):g}")
    return f" Chosen: {', '.join(chosen)}." if chosen else ""
