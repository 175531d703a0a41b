"""scripts/film_strip.py: first and last frames, sizes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference.closed_loop.video import write_video
from scripts.film_strip import film_strip, main


def gray_video(levels: list[int], side: int = 32) -> list[np.ndarray]:
    return [np.full((side, side, 3), level, np.uint8) for level in levels]


def test_rows_run_from_the_first_frame_to_the_last() -> None:
    long, short = gray_video(list(range(0, 250, 10))), gray_video([5, 245])
    strip = np.asarray(film_strip([long, short], num_frames=5, height=32))
    assert strip.shape == (2 * 32 + 4, 5 * 32 + 4 * 4, 3)
    columns = [x * 36 + 16 for x in range(5)]
    assert strip[16, columns, 0].tolist() == [0, 60, 120, 180, 240]
    assert strip[52, columns[0], 0] == 5 and strip[52, columns[-1], 0] == 245


def test_writes_a_picture_of_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", gray_video([20, 120, 220]), fps=10)
    main(["--videos", str(tmp_path / "a.mp4"), "--frames", "3", "--height", "16", "--output", str(tmp_path / "s.png")])
    assert "wrote" in capsys.readouterr().out
    middle = np.asarray(Image.open(tmp_path / "s.png").convert("L"))[8, [8, 28, 48]]
    assert np.abs(middle.astype(int) - [20, 120, 220]).max() < 12  # lossy codec


def test_a_grid_is_left_out_where_its_episodes_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["grid", "open-v3", "open-v3_seed1", "open-v3_seed2", "close-v3_seed1"]
    for name in names:
        write_video(tmp_path / f"{name}.mp4", gray_video([20, 220]), fps=10)
    videos, output = [str(tmp_path / f"{name}.mp4") for name in names], str(tmp_path / "s.png")
    size = ["--frames", "2", "--height", "16", "--output", output]
    main(["--videos", *videos, *size])
    assert Image.open(output).size[1] == 3 * 16 + 2 * 4
    assert "without grid.mp4, open-v3.mp4, of several episodes" in capsys.readouterr().out
    main(["--videos", videos[0], *size])  # asked for alone
    assert Image.open(output).size[1] == 16


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=r"a\.mp4: no readable video .*main_eval\.py"):
        main(["--videos", str(tmp_path / "a.mp4"), "--output", str(tmp_path / "s.png")])
    with pytest.raises(SystemExit, match=r"missing\.mp4: no readable video"):
        main(["--videos", str(tmp_path / "missing.mp4"), "--output", str(tmp_path / "s.png")])


def test_too_few_frames_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--videos", "a.mp4", "--frames", "1", "--output", str(tmp_path / "s.png")])
    assert "--frames 1" in capsys.readouterr().err
