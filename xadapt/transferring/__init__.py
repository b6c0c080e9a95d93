"""Transfer: an adapter carried to another base by a method, and written there whole. `transfer.py` is the verb."""
