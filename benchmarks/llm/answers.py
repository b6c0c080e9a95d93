"""Answers out of generated text, by the rules of the evaluation scripts that the paper used."""

from __future__ import annotations

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
    """The first number after "The answer is: ", rounded; None if there is none. "1,234.0" is 1234."""
    _, said, rest = text.partition("The answer is: ")
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?", rest) if said else None
    return round(float(found[0].replace(",", ""))) if found else None


def gsm8k_gold(answer: str) -> int:
    """What follows #### in GSM8K's own answers."""
    return round(float(answer.rpartition("####")[2].strip().replace(",", "")))


def code(text: str) -> str:
    """The first Python block, or all of it, cut off where tests or a main program begin."""
    block = re.search(r"```python\n(.*?)(?:```|$)", text, flags=re.DOTALL)
    found = block[1] if block else text
    for end in ("\nif __name__", "\n# Example usage", "\nassert"):
        found = found.partition(end)[0]
    return found.strip("\n") + "\n"
