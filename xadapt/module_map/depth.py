"""Monotone alignment of two stacks of blocks by dynamic programming. Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence


def align(similarity: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs (i, j), increasing in both, that have the largest sum of similarities (Needleman and Wunsch 1970, no gap cost).

    Each block is in one pair at most, so an update is never added twice. Blocks of similarity 0 or less are never paired, and
    ones of a low similarity are left out where they would keep better pairs apart.

    Args:
        similarity: [n][m], of source block i and target block j.

    Raises:
        ValueError: the rows have different lengths, or a number is NaN.
    """
    n, m = len(similarity), len(similarity[0]) if similarity else 0
    for row in similarity:
        if len(row) != m or any(value != value for value in row):
            raise ValueError("similarity is a matrix of numbers, [source blocks][target blocks], without NaN.")
    best = [[0.0] * (m + 1) for _ in range(n + 1)]  # of the first i and the first j
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            best[i][j] = max(best[i - 1][j], best[i][j - 1], best[i - 1][j - 1] + max(0.0, similarity[i - 1][j - 1]))
    pairs: list[tuple[int, int]] = []
    i, j = n, m
    while i and j:
        value = similarity[i - 1][j - 1]
        # Pairing goes before skipping: of equal sums, the one that covers more.
        if value > 0 and best[i][j] == best[i - 1][j - 1] + value:
            pairs.append((i - 1, j - 1))
            i, j = i - 1, j - 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def nearness(i: int, n: int, j: int, m: int) -> float:
    """How near block i of n and block j of m are in relative depth: 1 at the same, above 0 always."""
    one, other = (i / (n - 1) if n > 1 else 0.0), (j / (m - 1) if m > 1 else 0.0)
    return 1 - 0.999 * abs(one - other)  # above 0, or the ends could never be paired
