"""Verify: whether a carried adapter does on the target what it did on its source, without labels. `verify.py` is the verb."""
