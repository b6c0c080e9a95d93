"""Check: what carrying an adapter from one base to another would meet, measured before anything is carried.

`check.py` is the verb; `thresholds.py` and `decisions.py` turn measures into verdicts and need no torch.
"""
