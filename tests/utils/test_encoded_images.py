"""Headers of frames: JPEG and PNG alone, and nothing that is cheap to send and dear to decode."""

from __future__ import annotations

import random

import pytest

from benchmarks.fuzz_messages import OTHER_FORMATS, encoded, png_chunk
from utils.encoded_images import ImageHeaderError, encoded_size, is_image

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}])
def test_sizes(options):
    assert encoded_size(encoded("JPEG", (31, 17), **options)) == (31, 17)
    assert encoded_size(encoded("PNG", (31, 17))) == (31, 17)


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_other_formats_are_not_opened(kind):
    data = encoded(kind, (256, 256))
    assert not is_image(data)
    with pytest.raises(ImageHeaderError, match="another format"):
        encoded_size(data)


def test_dear_images():
    progressive = encoded("JPEG", (64, 64), progressive=True)
    scan = progressive.rindex(b"\xff\xda")
    with pytest.raises(ImageHeaderError, match="a JPEG of 5.. scans; at most 32"):
        encoded_size(progressive[:scan] + progressive[scan:-2] * 500)
    plain = encoded("JPEG")
    for filling in (b"\xff\xe1\0\4ab", b"\xff", b"\xff\0", b"\xff\xd0"):
        with pytest.raises(ImageHeaderError, match="more than 1024 segments before its pixels"):
            encoded_size(plain[:2] + filling * 5000 + plain[2:])
    start = encoded("PNG")[:33]
    for kind in (b"IDAT", b"tEXt"):
        with pytest.raises(ImageHeaderError, match="more than 29. chunks"):
            encoded_size(start + png_chunk(kind) * 3000)
    with pytest.raises(ImageHeaderError, match="without its header"):
        encoded_size(PNG + png_chunk(b"IDAT"))
    with pytest.raises(ImageHeaderError, match="0 x 16"):
        encoded_size(PNG + png_chunk(b"IHDR", (16).to_bytes(4, "big") + bytes(9)))


def test_cut_and_random_bytes_are_named():
    rng = random.Random(0)
    for whole in (encoded("JPEG"), encoded("PNG")):
        for cut in range(len(whole)):
            try:
                assert encoded_size(whole[:cut]) == (16, 16)
            except ImageHeaderError:
                pass
        for _ in range(200):
            try:
                encoded_size(whole[:12] + rng.randbytes(50))
            except ImageHeaderError:
                pass
