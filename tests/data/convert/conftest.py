"""Recordings that the tests of converters share."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.data.convert.recordings import jpeg, pictures


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """An HDF5 file of one episode of 10 steps with whatever a test may want to map."""
    path = tmp_path / "in" / "SCENE3_open_the_drawer_demo.hdf5"
    path.parent.mkdir()
    rgb = pictures(10)
    with h5py.File(path, "w") as file:
        file["rgb"], file["bgr"], file["chw"] = rgb, rgb[..., ::-1], rgb.transpose(0, 3, 1, 2)
        file["unit"] = rgb.astype(np.float32) / 255
        file["upside_down"] = rgb[:, ::-1]
        file["jpegs"] = np.array([jpeg(image) for image in rgb], dtype="S")
        file["state"] = np.arange(40.0).reshape(10, 4)
        file["action"] = np.arange(10.0).repeat(2).reshape(10, 2) / 10
        file["nan"] = np.where(np.arange(20).reshape(10, 2) == 7, np.nan, 0.0)
        file["valid"] = np.arange(10) % 5 != 2
        file["modes"], file["score"] = np.arange(10) % 2, np.where(np.arange(10) == 3, np.nan, 0.0)
        file.attrs["ended"] = "1"
        file["done"] = np.arange(10) == 9
        file["text"] = np.array([b"first"] * 5 + ["zweiter, für alle".encode()] * 5, dtype="S")
        file["codes"] = np.array([[ord(c) for c in "gö"] + [0, 0]] * 10, dtype=np.int32)
        file.attrs["info"] = json.dumps({"lang": '"lift it"', "letters": list("push")})
        file.attrs["task"] = b"press the button"
    return path
