"""Frames of packets at random: the same bits as decoding from the beginning, whatever the codec and its key frames."""

from __future__ import annotations

import multiprocessing
import shutil
import struct

import av
import numpy as np
import pytest

import data.video_packets as module
from data.decoding import ObservationError
from data.video_packets import NO_TIME, PacketReader, PacketWriter, decoding_starts
from tests.data.video_files import ENCODINGS, FPS, decoded, encode
from utils.parquet_utils import DataError

GOPS = (1, 2, 12)
COUNT = 40


def copied(folder, *paths):
    """(reader, frames of each file) of packets copied to a folder."""
    folder.mkdir()
    writer = PacketWriter(folder)
    frames = [writer.add(path) for path in paths]
    return PacketReader(folder, writer.close()), [part.packets.tolist() for part in frames]


@pytest.mark.parametrize("gop", GOPS)
@pytest.mark.parametrize("name", ENCODINGS)
def test_every_frame_at_random_is_that_of_sequential_decoding(tmp_path, name, gop):
    path = encode(tmp_path, name, gop)
    wanted = decoded(path)
    assert len({frame.tobytes() for frame in wanted}) == COUNT, "frames that are alike would show nothing"
    reader, (packets,) = copied(tmp_path / "cache", path)
    assert len(packets) == COUNT
    backwards, shuffled = range(COUNT)[::-1], np.random.default_rng(gop).permutation(COUNT)
    for order in (range(COUNT), backwards, shuffled):
        for i in order:
            assert np.array_equal(reader.frames([packets[i]])[0], wanted[i]), f"frame {i}"
    for first in range(0, COUNT - 4):  # windows, decoded in one go
        window = reader.frames(packets[first : first + 4])
        assert all(np.array_equal(a, b) for a, b in zip(window, wanted[first : first + 4], strict=True))
    assert reader.damaged(packets) is None


def test_what_is_decoded_for_a_frame(tmp_path):
    reader, (packets,) = copied(tmp_path / "two", encode(tmp_path, "av1", 2))
    assert reader.packets_per_frame(np.array(packets)) == 1.5
    open_group, (others,) = copied(tmp_path / "open", encode(tmp_path, "hevc_open", 12))
    closed, (same,) = copied(tmp_path / "closed", encode(tmp_path, "hevc", 12))
    more = open_group.packets_per_frame(np.array(others)) - closed.packets_per_frame(np.array(same))
    assert more > 0.5, "leading pictures of an open group need the group before"


def test_where_decoding_begins():
    """Times of I0 P3 B1 B2 I6 B4 B5 P8: the B frames that are decoded after I6 are shown before it."""
    times = np.array([0, 3, 1, 2, 6, 4, 5, 8, NO_TIME])
    key = [True, False, False, False, True, False, False, False, False]
    assert decoding_starts(times, key).tolist() == [0, 0, 0, 0, 4, 0, 0, 4, 4]


def test_files_of_several_codecs_lie_in_one_folder(tmp_path):
    names = ["h264_b_frames", "av1", "hevc", "vp9", "h264"]
    paths = [encode(tmp_path, name, 12) for name in names]
    paths.append(shutil.copy(paths[1], tmp_path / "again.mp4"))  # shares its decoder with the first of that kind
    reader, packets = copied(tmp_path / "cache", *paths)
    wanted = [decoded(path) for path in paths]
    assert len(reader._settings) == 5
    rng = np.random.default_rng(0)
    for _ in range(120):
        file, i = int(rng.integers(len(paths))), int(rng.integers(COUNT))
        assert np.array_equal(reader.frames([packets[file][i]])[0], wanted[file][i])


def test_few_decoders_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_CODECS", 2)
    paths = [encode(tmp_path, name, 2) for name in ("h264", "av1", "vp9")]
    reader, packets = copied(tmp_path / "cache", *paths)
    wanted = [decoded(path) for path in paths]
    for i in range(6):
        for file in range(3):
            assert np.array_equal(reader.frames([packets[file][i]])[0], wanted[file][i])
            assert len(reader._codecs) <= 2


@pytest.mark.parametrize("tags", [{"color_range": 2}, {"colorspace": 1}, {"colorspace": 5, "color_range": 2}])
@pytest.mark.parametrize("name", ["h264", "vp9_alt_ref", "av1"])
def test_colours_are_converted_as_the_stream_says(tmp_path, name, tags):
    path = encode(tmp_path, name, 2, **tags)
    reader, (packets,) = copied(tmp_path / "cache", path)
    assert all(np.array_equal(reader.frames([p])[0], frame) for p, frame in zip(packets, decoded(path), strict=True))


def test_frames_are_turned_as_the_display_matrix_says(tmp_path):
    path = encode(tmp_path, "h264", 2)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    matrix = at + 4 + (32 if data[at] else 20) + 16
    plain = decoded(path)
    for number, (numbers, quarters) in enumerate((((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2))):
        a, b, c, d = (65536 * n for n in numbers)
        data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(data)
        reader, (packets,) = copied(tmp_path / f"cache_{number}", path)
        assert np.array_equal(reader.frames([packets[7]])[0], np.rot90(plain[7], quarters))
        assert np.array_equal(decoded(path)[7], np.rot90(plain[7], quarters))
    data[matrix : matrix + 36] = struct.pack(">9i", 56756, 32768, 0, -32768, 56756, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"frames are turned by -?\d+ degrees; wanted a multiple of 90"):
        copied(tmp_path / "odd", path)


def test_deep_grey_frames_are_no_colour(tmp_path):
    path = tmp_path / "depth.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", FPS)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "gray16le"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32), 3000, np.uint16), format="gray16le")))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="frames are gray16le, depth and not colour; choose another camera"):
        copied(tmp_path / "cache", path)


def _decode_in(reader, packets, queue):
    queue.put([frame.tobytes() for frame in reader.frames(packets)])


def test_a_forked_process_makes_its_own_decoder(tmp_path):
    path = encode(tmp_path, "h264_b_frames", 12)
    reader, (packets,) = copied(tmp_path / "cache", path)
    wanted = [frame.tobytes() for frame in decoded(path)]
    assert reader.frames([packets[7]])[0].tobytes() == wanted[7]  # the context of this process is in use
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_decode_in, args=(reader, packets, queue))
    process.start()
    try:
        assert queue.get(timeout=60) == wanted, "a decoder of the parent's must not be touched"
    finally:
        process.kill()


def test_a_changed_packet_is_noticed_once(tmp_path):
    path = encode(tmp_path, "h264", 2)
    reader, (packets,) = copied(tmp_path / "cache", path)
    content = bytearray((tmp_path / "cache/packets.bin").read_bytes())
    content[int(reader._offsets[3]) + 5] ^= 16
    (tmp_path / "cache/packets.bin").write_bytes(content)
    changed = PacketReader(tmp_path / "cache", {"bytes": len(content), "streams": reader._settings})
    assert changed.damaged(packets[:3]) is None and changed.damaged(packets[3:]) == 3
    assert changed.damaged(packets[:2]) is None


def test_packets_that_are_cut_off(tmp_path):
    reader, _ = copied(tmp_path / "cache", encode(tmp_path, "h264", 2))
    with pytest.raises(ValueError, match="packets.bin is cut off"):
        PacketReader(tmp_path / "cache", {"bytes": 1, "streams": reader._settings})


def test_packets_that_no_decoder_takes(tmp_path):
    path = encode(tmp_path, "av1", 2)
    folder = tmp_path / "cache"
    reader, (packets,) = copied(folder, path)
    size = (folder / "packets.bin").stat().st_size
    (folder / "packets.bin").write_bytes(b"\xff" * size)
    broken = PacketReader(folder, {"bytes": size, "streams": reader._settings})
    with pytest.raises(ObservationError, match="its video can't be decoded there"):
        broken.frames([packets[4]])


def test_frames_are_found_by_time(tmp_path):
    (tmp_path / "cache").mkdir()
    writer = PacketWriter(tmp_path / "cache")
    path = encode(tmp_path, "h264_b_frames", 12)
    frames = writer.add(path)
    assert writer.add(path) is frames, "a file is copied once"
    assert np.allclose(frames.seconds, np.arange(COUNT) / FPS) and sorted(frames.packets) == list(range(COUNT))
    times = [(i / FPS + 4e-5, 1e-4) for i in (3, 5, 4)]
    assert frames.find(times, "x", 0).tolist() == frames.packets[[3, 5, 4]].tolist()
    with pytest.raises(
        DataError, match=r"x 11: .* no frame within 0.0001 s of 0.2250 s \(the next one is at 0.2500 s\)"
    ):
        frames.find([(0.2, 1e-4), (0.225, 1e-4)], "x", 10)
    with pytest.raises(DataError, match=r"no frame within .* \(it ends before\)"):
        frames.find([(2.0, 1e-4)], "x", 0)


def test_the_converter_reads_the_same_frames(tmp_path):
    """`decoded` goes through VideoReader; this holds it to PyAV's plain loop."""
    path = encode(tmp_path, "h264_b_frames", 12)
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert all(np.array_equal(a, b) for a, b in zip(plain, decoded(path), strict=True))
