"""Where the datasets are that the lerobot library wrote, what is in them, and ways to read and to damage copies."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.convert.episode_writer import ImageEncoding

REPOSITORY = Path(__file__).resolve().parents[3]
FIXTURES = REPOSITORY / "tests" / "fixtures"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CAMERAS = [f"{FRONT}=image_1", f"{WRIST}=image_2"]
COLUMNS = {"image_1": FRONT, "image_2": WRIST}
DATASETS = [(version, kind) for version in ("v21", "v30") for kind in ("image", "video")]
LENGTHS = [31, 17, 44, 25, 60, 12]
STARTS = np.cumsum([0, *LENGTHS])
PNG = ImageEncoding("png")


def reference(kind: str) -> dict[str, np.ndarray]:
    """What lerobot itself reads from the dataset."""
    with np.load(FIXTURES / f"{kind}.reference.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def read(folder: Path) -> pa.Table:
    """All files of a conversion in the order of their names."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def video_files(version: str, feature: str) -> list[Path]:
    folder = FIXTURES / f"lerobot_{version}_video" / "videos"
    return sorted(folder.glob(f"{feature}/*/*.mp4" if version == "v30" else f"*/{feature}/*.mp4"))


def all_frames(paths: list[Path]) -> np.ndarray:
    """Every frame of some videos, decoded from their beginnings."""
    frames = []
    for path in paths:
        with av.open(str(path)) as container:
            frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def nearest(frames: np.ndarray, truth: np.ndarray) -> list[int]:
    """For each frame, which true one of its episode is most like it."""
    result: list[int] = []
    for begin, end in zip(STARTS, STARTS[1:], strict=False):
        pixels = truth[begin:end].astype(np.int16)
        result += [int(begin + np.abs(pixels - frame).mean(axis=(1, 2, 3)).argmin()) for frame in frames[begin:end]]
    return result


def edit_info(root: Path, **changes) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(path: Path, change) -> None:
    """Rewrite a Parquet file with `change(table)`, in one row group."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def replaced(table: pa.Table, name: str, values) -> pa.Table:
    position = table.column_names.index(name)
    return table.set_column(position, name, pa.array(values, table.schema.field(name).type))
