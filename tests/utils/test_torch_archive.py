"""Archives of torch.save: what is mapped is what was checked, and an index builds plain values and tensors alone."""

from __future__ import annotations

import math
import struct
import time
import zipfile

import pytest
import torch

from utils.torch_archive import MAX_DIRECTORY_BYTES, ArchiveError, UnsafeArchiveError, open_archive

VALUE = {
    "a": torch.arange(6.0).reshape(2, 3).T,
    "b": [torch.tensor(3), torch.zeros(0), torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16)],
    "c": {"x": (1, None, 2.5, True, "text", 2**70, -1)},
    "d": torch.nn.Linear(2, 2).state_dict(),
}


def test_a_value_comes_back_as_torch_reads_it(tmp_path):
    path = tmp_path / "a.pt"
    shared = torch.arange(4)
    torch.save({**VALUE, "e": shared[1:], "f": shared}, path)
    ours, theirs = open_archive(path).value, torch.load(path, weights_only=True)
    assert ours.keys() == theirs.keys() and ours["c"] == theirs["c"]
    assert torch.equal(ours["a"], theirs["a"]) and ours["a"].stride() == theirs["a"].stride()
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(ours["b"], theirs["b"], strict=True))
    assert type(ours["d"]) is type(theirs["d"]) and ours["d"]._metadata == theirs["d"]._metadata
    ours["f"][1] = 7
    assert ours["e"][0] == 7, "what shared memory shares it still"
    assert torch.load(path, weights_only=True)["f"][1] == 1, "the file is not written to"


def rewrite(path, method=zipfile.ZIP_STORED, only=None, **others):
    """The archive again: records compressed, replaced or added."""
    with zipfile.ZipFile(path) as source:
        records = {info.filename: source.read(info) for info in source.infolist()}
    names = {name.partition("/")[2]: name for name in records}
    records |= {names.get(name, name): content for name, content in others.items()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in records.items():
            chosen = only is None or name.endswith(only)
            target.writestr(name, content, method if chosen else zipfile.ZIP_STORED)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(VALUE, path)
    return path


@pytest.mark.parametrize("only", ["data/0", "data.pkl", None])
def test_compressed_records_are_refused(saved, only):
    """torch.load maps their compressed bytes as weights: 6.5e19 for an action, and no error."""
    rewrite(saved, zipfile.ZIP_DEFLATED, only)
    with pytest.raises(ArchiveError, match="compressed or encrypted; only stored records are read"):
        open_archive(saved)


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/passwd", "a/code/x.py", "b/data/0", "a/data/0x", "a/data/../data/1"]
)
def test_other_names_are_refused(saved, name):
    rewrite(saved, **{name: b"x"})
    with pytest.raises(ArchiveError, match="wanted those of torch.save|there twice"):
        open_archive(saved)


def test_tensors_have_the_bytes_that_they_say(saved):
    rewrite(saved, **{"data/0": bytes(20)})
    with pytest.raises(ArchiveError, match="data/0 of 6 values: 20 bytes"):
        open_archive(saved)
    torch.save({"a": torch.zeros(1).expand(10**10)}, saved)  # 40 GB of one number
    with pytest.raises(ArchiveError, match="a tensor of 10000000000 values on 4 bytes"):
        open_archive(saved)


def test_damage_to_a_record_is_found_by_verify(saved):
    data = bytearray(saved.read_bytes())
    record = open_archive(saved).records["data/0"]
    data[record.begin + 3] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ArchiveError, match="bad CRC-32 for data/0"):
        open_archive(saved).verify()


def test_a_large_directory_is_not_read(saved):
    data = bytearray(saved.read_bytes())
    data[-58:-50] = struct.pack("<Q", MAX_DIRECTORY_BYTES + 1)
    saved.write_bytes(data)
    with pytest.raises(ArchiveError, match="directory has 32,000,001 bytes"):
        open_archive(saved)


CALLS = {
    "system": b"cos\nsystem\nX\x04\0\0\0true\x85R.",
    "bytearray of 64 GB": b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.",
    "getattr": b"cbuiltins\ngetattr\n.",
    "torch.load": b"ctorch\nload\n.",
    "an instance": b"ccollections\nOrderedDict\n)\x81.",
    "attributes": b"ccollections\nOrderedDict\n)R}X\x01\0\0\0aK\1sb.",
    "a class by name": b"(X\2\0\0\0osios\nsystem\n.",
    "the copy registry": b"\x82\x01.",
    "a call of no function": b"X\1\0\0\0a)R.",
}


@pytest.mark.parametrize("kind", CALLS)
def test_an_index_calls_nothing(saved, kind):
    rewrite(saved, **{"data.pkl": b"\x80\x02" + CALLS[kind]})
    with pytest.raises(UnsafeArchiveError):
        open_archive(saved)


DOUBLED = b"]q%c(h%ch%ce"  # a list that holds the one before twice
BOMBS = {
    "a memo of 17 GB": b"Nr\xff\xff\xff\x7f.",
    "a number of 2 GB": b"\x8b\xff\xff\xff\x7f.",
    "depth": b"]" * 50_000 + b"a" * 49_999 + b".",
    "lists that double": b"]q\0" + b"".join(DOUBLED % (i, i - 1, i - 1) for i in range(1, 60)) + b".",
    "marks": b"(" * 100_000 + b".",
    "nothing": b".",
    "cut off": b"}",
    "a set": b"\x8f.",
    "keys": b"}N\x85Ns.",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_an_index_takes_no_memory_or_time(saved, kind):
    rewrite(saved, **{"data.pkl": b"\x80\x02" + BOMBS[kind]})
    started = time.monotonic()
    if kind == "a memo of 17 GB":
        assert open_archive(saved).value is None
    else:
        with pytest.raises(ArchiveError):
            open_archive(saved)
    assert time.monotonic() - started < 5


def test_values_of_other_kinds(saved):
    for value in ({1.5: 2}, {"a": torch.zeros(2, 2).to_sparse()}, {"a": {1, 2}}, {"a": math}):
        try:
            torch.save(value, saved)
        except TypeError:  # a module can't be pickled
            continue
        with pytest.raises(ArchiveError):
            open_archive(saved)
