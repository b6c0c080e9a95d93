"""Answers out of generated text, by the rules of the evaluation scripts that the paper used."""

from __future__ import annotations

import math
import re

CHOICES = {  # commonsense task -> what counts as an answer
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_iqa": r"answer[1-5]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option1|option2",
    "arc_easy": r"answer[1-5]",
    "arc_challenge": r"answer[1-5]",
    "openbookqa": r"answer[1-5]",
}


def choice(text: str, task: str) -> str:
    """The first answer after the last "### Response:", case-sensitive; "" if there is none, which is wrong."""
    found = re.search(CHOICES[task], text.rpartition("### Response:")[2])
    return found[0] if found else ""


def number(text: str) -> int | None:
    """The first number after the last "The answer is: ", rounded; None if there is none. "1,234.0" is 1234, "7/2" is 4."""
    _, said, rest = text.rpartition("The answer is: ")
    found = re.search(r"([-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+)(?:/(\d+))?", rest) if said else None
    if not found:
        return None
    value = float(found[1].replace(",", "")) / (float(found[2] or 1) or 1)
    return round(value) if math.isfinite(value) else None  # some repeat a digit until they are stopped


def gsm8k_gold(answer: str) -> int:
    """What follows #### in GSM8K's own answers."""
    return round(float(answer.rpartition("####")[2].strip().replace(",", "")))


def code(text: str) -> str:
    """The first Python block, or all of it, cut off at a main program, an example, or the first assert, wherever it stands."""
    block = re.search(r"```python\n(.*?)(?:```|$)", text, flags=re.DOTALL)
    found = block[1] if block else text
    for end in ("if __name__", "# Example usage", "assert"):
        found = found.partition(end)[0]
    return found.strip("\n").rstrip() + "\n"
