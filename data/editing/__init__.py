"""Editing recorded episodes into a new folder: `edits.py` is what can be asked for, `plan.py` what becomes of which
row, `write.py` the files. `scripts/edit_dataset.py` is the command.
"""
