"""Adapters trained on one language model and carried to its sibling: Table 6 of Revisit Model Adaptation, and your own pair."""
