"""Names that mean the same in different architectures, and prefixes that differ between wrappers of one network."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

SYNONYMS = tuple(
    frozenset(group.split())
    for group in (
        "model transformer gpt_neox backbone language_model",
        "layers h blocks",
        "self_attn attention attn self_attention",
        "mlp feed_forward ffn",
        "embed_tokens wte embed_in word_embeddings tok_embeddings",
        "lm_head embed_out",
        "q_proj to_q query wq",
        "k_proj to_k key wk",
        "v_proj to_v value wv",
        "o_proj out_proj dense c_proj wo",
        "qkv_proj to_qkv Wqkv c_attn",
        "gate_proj w1",
        "up_proj fc1 dense_h_to_4h c_fc fc_in w3",
        "down_proj fc2 dense_4h_to_h c_proj fc_out w2",
        "proj_out linear2",
    )
)
QUERIES, KEYS, VALUES, OUTPUTS = (
    next(group for group in SYNONYMS if name in group) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
)


def are_synonyms(one: str, other: str) -> bool:
    """Whether two architectures call modules of one role so."""
    return any(one in group and other in group for group in SYNONYMS)


def renamed_prefix(source: Iterable[str], target: Iterable[str]) -> tuple[str, str] | None:
    """The prefixes ("model", "model.language_model") by which most layers of two bases differ, or None.

    Each source path votes with the target path that shares the longest end with it. Numbers count as equal: the bases may
    have other depths.
    """
    by_end: defaultdict[str, list[list[str]]] = defaultdict(list)
    for pattern in dict.fromkeys(map(_pattern, target)):
        names = pattern.split(".")
        by_end[names[-1]].append(names)
    votes: Counter[tuple[str, str]] = Counter()
    for pattern in dict.fromkeys(map(_pattern, source)):
        names = pattern.split(".")
        shared, other = max(((_shared_end(names, other), other) for other in by_end[names[-1]]), default=(0, names))
        if shared == len(names) == len(other):
            votes["", ""] += 1
        elif shared >= 2:
            votes[".".join(names[:-shared]), ".".join(other[:-shared])] += 1
    if not votes:
        return None
    (prefixes, _), *_ = votes.most_common(1)
    numbered = any("*" in prefix for prefix in prefixes)  # one block's name, not one wrapper's
    return None if numbered or prefixes == ("", "") else prefixes


def replace_prefix(path: str, old: str, new: str) -> str:
    """`path` with the module prefix `old` replaced by `new`, or as it is."""
    if not old:
        return f"{new}.{path}" if new else path
    if path != old and not path.startswith(f"{old}."):
        return path
    rest = path[len(old) + 1 :]
    return ".".join(part for part in (new, rest) if part)


def _pattern(path: str) -> str:
    return ".".join("*" if name.isdecimal() else name for name in path.split("."))


def _shared_end(one: list[str], other: list[str]) -> int:
    shared = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        shared += 1
    return shared
