"""The doctor: every check that demonstrations must pass before a policy is trained on them.

`examine.py` runs the checks, `findings.py` lists the kinds of fault, `inspect_parquet.py` is the command.
Decoding processes import this package, so that it imports nothing itself.
"""
