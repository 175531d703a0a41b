"""msgpack with arrays: what openpi's client packs is read, everything else is refused with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import vla_client.wire as client_wire
from openpi_client import msgpack_numpy

import inference.serving.wire as server_wire
from inference.serving.wire import WireError, pack, unpack

MESSAGE = {
    "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "state": np.array([0.5, -1.0], np.float32),
    "big": np.array([[1.5]], ">f8"),
    "empty": np.zeros((0, 3), np.int64),
    "scalar": np.float32(0.25),
    "flag": True,
    "text": "öffne",
    "nested": [{"a": 1}, None],
}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    return a == b


@pytest.mark.parametrize("packer", [pack, msgpack_numpy.packb])
@pytest.mark.parametrize("unpacker", [unpack, msgpack_numpy.unpackb])
def test_the_same_bytes_as_openpis_client(packer, unpacker):
    assert same(unpacker(packer(MESSAGE)), MESSAGE)


def array(data=b"\0" * 8, dtype="<f4", shape=(2,)):
    whole = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    return msgpack.packb({"a": whole})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no msgpack"),
        (b"\xc1", "no msgpack"),
        (pack({"a": 1})[:-1], "no msgpack"),
        (pack({"a": 1}) + b"\0", "no msgpack"),
        (b"\x91" * 5000 + b"\x90", "no msgpack"),
        (b"\xdd\xff\xff\xff\xff", "no msgpack"),
        (b"\xdd\x00\x00\x10\x01" + b"\x00" * 4097, "4097 exceeds max_array_len"),
        (b"\x92" + (b"\xdc\x03\xe8" + b"\x90" * 1000) * 2, "more than 1024 lists and dicts in a message"),
        (b"\x91" * 33 + b"\x90", "more than 32 deep"),
        (msgpack.packb([[0] * 4000] * 5), "more than 16384 values in a message"),
        (b"\xdf\x00\x00\x10\x01", "4097 exceeds max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "cut off"),
        (b"\xdc\x00", "cut off"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 1e308, b"dtype": "<f2"}), "does not fit"),
        (msgpack.packb({b"__npgeneric__": True, b"data": float("nan"), b"dtype": "<i4"}), "does not fit"),
        (msgpack.packb(msgpack.ExtType(1, b"x")), "extension type 1"),
        (array(dtype="|O"), "dtype '|O'"),
        (array(dtype="<U4"), "dtype '<U4'"),
        (array(dtype="<c8"), "dtype '<c8'"),
        (array(dtype="f4,f4"), "dtype 'f4,f4'"),
        (array(dtype="(2,)f4"), r"dtype '\(2,\)f4'"),
        (array(dtype="(1,1"), r"dtype '\(1,1'"),  # numpy's own parser raises SyntaxError here
        (array(dtype="f4,("), r"dtype 'f4,\('"),
        (array(dtype="<f16"), "dtype '<f16'"),
        (array(dtype="f" * 10_000), r"dtype 'f{80}' \.\.\."),
        (array(dtype=7), "dtype 7"),
        (array(dtype=None), "dtype None"),
        (array(shape=[3]), r"shape \(3,\) .* 8 bytes of data; wanted 12"),
        (array(shape=[-2]), r"shape \[-2\]"),
        (array(shape=[2**40, 2**40]), "8 bytes of data"),
        (array(data=b"", shape=[2**40, 0, 1, 3]), "without elements .* each size is at most 4096"),
        (array(shape=[1] * 9), "at most 8 sizes"),
        (array(shape=[1] * 4000), r"at most 8 sizes"),
        (array(shape="2"), "shape '2'"),
        (array(data="text"), "str of data"),
        (msgpack.packb({b"__npgeneric__": True, b"data": b"x", b"dtype": "<f4"}), "a number is given as bytes"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "does not fit"),
    ],
)
def test_unsound_messages_are_named(data, message):
    with pytest.raises(WireError, match=message):
        unpack(data)


@pytest.mark.parametrize("value", [0, 200, -1, -33, 2**16, 2**40, -(2**40), 0.5, None, True, "a" * 300, b"b" * 70_000])
def test_every_length_and_size_is_walked_over(value):
    message = {"a": [value] * 20, "b": {str(i): value for i in range(20)}, "c": value}
    assert unpack(pack(message)) == message
    assert unpack(msgpack.packb(message, use_single_float=True)) == message


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["a"]), np.complex64(1j), {1, 2}, object()])
def test_what_can_not_be_sent(value):
    with pytest.raises(WireError, match="can't"):
        pack({"a": value})


def test_the_client_needs_no_torch():
    code = "import sys, vla_client as c; assert c.pack and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": "clients/python"})
    code = "import runpy, sys; runpy.run_path('scripts/client_example.py'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_format_has_one_file():
    assert Path(server_wire.__file__).resolve() == Path(client_wire.__file__).resolve()
