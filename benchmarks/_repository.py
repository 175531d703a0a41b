"""Imported first by every benchmark of this folder: "python benchmarks/x.py" then runs the code of its own checkout.

Python itself puts only the benchmark's folder on the path. The repository goes before all else, so that neither an
installed copy nor another checkout on PYTHONPATH is taken.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
