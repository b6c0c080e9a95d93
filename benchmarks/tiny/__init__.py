"""A source model, its siblings, and what becomes of an adapter there: trained from scratch, offline, in minutes on one core."""
