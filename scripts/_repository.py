"""Imported first by every script of this folder: "python scripts/x.py" then runs the code of its own checkout.

Python itself puts only the script's folder on the path. The repository goes before all else, so that neither an
installed copy nor another checkout on PYTHONPATH is taken.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(1, str(ROOT / "clients/python"))  # the robot's side of the policy server
