"""Which layer of one base is which layer of another, with a reason for each line, from module names and shapes alone."""

from .lines import Coverage, MappedLayer, ModuleMap, Relation, Unmatched
from .mapping import map_modules
from .override import read_override
from .weights import weight_similarity

__all__ = [
    "Coverage",
    "MappedLayer",
    "ModuleMap",
    "Relation",
    "Unmatched",
    "map_modules",
    "read_override",
    "weight_similarity",
]
