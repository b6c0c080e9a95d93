"""The prompts of the two recipes, character by character: a blank more or less is another protocol.

Facts about public training scripts; `tests/test_bench_llm.py` holds their hashes.
"""

from __future__ import annotations

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
INDENT = " " * 16
"""Every line of the commonsense prompts after the first has it: a triple-quoted string within a function."""


def commonsense_training(instruction: str) -> str:
    """Two blanks after the first sentence, blanks on the empty line before the response."""
    return f"{ALPACA}  \n\n{INDENT}### Instruction:\n{INDENT}{instruction}\n{INDENT}\n{INDENT}### Response:\n{INDENT}"


def commonsense_evaluation(instruction: str) -> str:
    """One blank after the first sentence, none on the empty lines: not what was trained on, and so it was evaluated."""
    return f"{ALPACA} \n\n{INDENT}### Instruction:\n{INDENT}{instruction}\n\n{INDENT}### Response:\n{INDENT}"


def plain(instruction: str) -> str:
    """Of the math and code recipe, for training and evaluation."""
    return f"{ALPACA}\n\n### Instruction:\n{instruction}\n\n### Response:"
