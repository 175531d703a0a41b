"""Files and folders that somebody changed, a function of the random generator; `fuzz_files.py` loads them.

Each kind is a function (rng, folder, secret, marker) that makes its case in `folder` and returns what loads it.
`secret` is a file outside of the folder that no case may read, `marker` one that only executed code would write.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.crafted_folders import damaged_cache, hdf5_folder, lerobot_folder
from data.processing import ObservationError
from inference.predictor import VLAPredictor
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.config_utils import ConfigError, load_config
from utils.parquet_utils import DataError
from utils.statistics import StatisticsError

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
POLICIES = ("flow.pth.tar", "discrete_delta.pth.tar", "diffusion_siglip_llm.pth.tar")
OURS = (CheckpointError, ConfigError, DataError, ObservationError, StatisticsError)
Load = Callable[[], None]


class WrongValueError(AssertionError):
    """A damaged file was accepted, and its values are not the original's."""


ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**70,
    400_000,
    1e308,
    math.nan,
    math.inf,
    "",
    "..",
    "a/b",
    "\x1b[2J\n",
    "x" * 5000,
]
ODD += [[], {}, [[]], {"a": {}}, [0.5] * 300, "auto_map", {"auto_map": {"AutoTokenizer": "evil.Evil"}}, b"bytes"]


@functools.cache
def original(name: str) -> dict[str, Any]:
    """A policy of the fixtures, with its optimizer."""
    return load_checkpoint(FIXTURES / "policies" / name)


def act(path: pathlib.Path) -> None:
    """Load a policy and predict once; its actions must be finite."""
    predictor = VLAPredictor.from_checkpoint(path, device="cpu")
    state = np.zeros(predictor.state_dim, np.float32)
    actions = predictor.predict(np.zeros((32, 32, 3), np.uint8), prompt="open it", state=state, seed=0)
    if not np.isfinite(actions).all():
        raise WrongValueError("actions that are not finite")


def compare(name: str, path: pathlib.Path, for_inference: bool) -> None:
    """Load a checkpoint; whatever it holds must be as it was saved."""
    if not same(original(name), found := load_checkpoint(path, for_inference=for_inference), for_inference):
        raise WrongValueError(f"{len(found)} entries, not those that were saved")


def same(wanted: Any, found: Any, without_optimizer: bool = False) -> bool:
    """Whether two nested values are equal, tensors to the bit."""
    if isinstance(wanted, dict):
        keys = wanted.keys() - ({"optimizer"} if without_optimizer else set())
        return keys == found.keys() and all(same(wanted[key], found[key]) for key in keys)
    if isinstance(wanted, list | tuple):
        return len(wanted) == len(found) and all(map(same, wanted, found))
    return torch.equal(wanted, found) if isinstance(wanted, torch.Tensor) else wanted == found


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut, doubled or put in."""
    changed = bytearray(data)
    near_end = rng.random() < 0.3  # where the directory of an archive is
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(0, len(changed) - 3000), len(changed)) if near_end else rng.randrange(len(changed))
        kind = rng.randrange(5)
        if kind < 2:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, struct.pack("<I", rng.getrandbits(32))])
        elif kind == 3:
            del changed[at : at + rng.choice([1, 64, len(changed)])]
        else:
            changed[at:at] = rng.randbytes(rng.choice([1, 64]))
    return bytes(changed)


def damaged_checkpoint(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """Bytes of a checkpoint changed, its checksums left."""
    name, path = rng.choice(POLICIES), folder / "c.pth.tar"
    path.write_bytes(damaged(rng, (FIXTURES / "policies" / name).read_bytes()))
    return functools.partial(compare, name, path, rng.random() < 0.5)


def rewritten_archive(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """A checkpoint's records in another archive: compressed, doubled, renamed, with others beside them."""
    name, path = rng.choice(POLICIES), folder / "c.pth.tar"
    with zipfile.ZipFile(FIXTURES / "policies" / name) as source:
        records = [(info.filename, source.read(info)) for info in source.infolist()]
    kind = rng.randrange(6)
    chosen = rng.sample(range(len(records)), rng.choice([1, 3, len(records)]))
    if kind == 1:
        records.append(records[rng.choice(chosen)])
    if kind == 2:
        records.append((rng.choice(["../evil.py", "/evil", "archive/code/a.py", "archive/../x", "other/data/0"]), b"x"))
    if kind == 3:
        records.pop(chosen[0])
    if kind == 4:
        i, j = rng.sample(range(len(records)), 2)
        records[i], records[j] = (records[i][0], records[j][1]), (records[j][0], records[i][1])
    with zipfile.ZipFile(path, "w") as target:
        for i, (record, content) in enumerate(records):
            method = rng.choice([8, 12, 14]) if kind == 0 and i in chosen else zipfile.ZIP_STORED
            target.writestr(record, content, method)
    if kind == 5:
        path.write_bytes(rng.choice([rng.randbytes(70) + path.read_bytes(), path.read_bytes() + bytes(30)]))
    return functools.partial(compare, name, path, False) if kind != 4 else functools.partial(act, path)


def crafted_pickle(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """An index that calls functions, asks for memory, or lies about tensors."""
    name, path = POLICIES[0], folder / "c.pth.tar"
    call = f"touch {marker}".encode()
    text = b"X" + struct.pack("<I", len(call)) + call
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu"
    number = rng.choice([b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"J" + struct.pack("<i", rng.choice([4, 10**9, -1]))])
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    sizes = [b"J\x04\0\0\0tQK\0K\x04\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR."]
    sizes += [b"J\x04\0\0\0tQK\0J\0\0\0\x7f\x85K\0\x85\x89NtR.", number + b"tQK\0K\4\x85K\1\x85\x89NtR."]
    sizes += [b"J\x04\0\0\0tQK\x09K\4\x85K\1\x85\x89NtR.", b"J\x04\0\0\0tQJ\xff\xff\xff\xffK\4\x85K\1\x85\x89NtR."]
    pickles = [
        b"cos\nsystem\n" + text + b"\x85R.",
        b"cposix\nsystem\n" + text + b"\x85R.",
        b"cbuiltins\neval\n" + text + b"\x85R.",
        b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x40\x85R.",
        b"cbuiltins\ngetattr\n" + text + b"\x85R.",
        b"ctorch\nload\n" + text + b"\x85R.",
        b"ctorch.hub\nload\n" + text + b"\x85R.",
        b"ctorch._utils\n_rebuild_parameter\n" + text + b"\x85R.",
        b"(" * rng.choice([10, 100_000]) + b"." + b"l" * 100,
        b"]" * 50_000 + b"a" * 49_999 + b".",
        b"Nr\xff\xff\xff\x7f.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8e" + b"\xff" * 7 + b"\x7f.",
        b"}"
        + b"".join(
            b"]q" + bytes([i]) + (b"h" + bytes([i - 1]) + b"ah" + bytes([i - 1]) + b"a" if i else b"")
            for i in range(60)
        )
        + b".",
        b"ccollections\nOrderedDict\n)R}X\x01\0\0\0aNsb.",
        b"\x82\x01.",
        b"i os\nsystem\n.",
        rng.randbytes(200),
        pickle.dumps({"a": 1}, protocol=4),
        pickle.dumps(pathlib.Path(secret), protocol=2),
        *(tensor + size for size in sizes),
    ]
    with zipfile.ZipFile(FIXTURES / "policies" / name) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = b"\x80\x02" + rng.choice(pickles) if rng.random() < 0.7 else damaged(rng, content)
            target.writestr(info.filename, content)
    return functools.partial(act, path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested value, those of lists at their first items only."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value[:2]):
            found += places(item, (*path, i))
    return found


def with_odd_value(rng: random.Random, value: Any, odd: Any) -> Any:
    """A nested value with `odd` at one of its places; what is not on the way is shared."""
    sections = [key for key in value if key not in ("model", "optimizer", "ema")] if isinstance(value, dict) else []
    top = (rng.choice(sections),) if sections and "format" in value else ()
    inside = functools.reduce(lambda v, key: v[key], top, value)
    place = top + rng.choice([(), *places(inside)] if top else places(inside))

    def put(item: Any, rest: tuple[Any, ...]) -> Any:
        if not rest:
            return odd
        copy = item.copy()
        copy[rest[0]] = put(item[rest[0]], rest[1:])
        return copy

    return put(value, place)


def odd_checkpoint(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """A checkpoint whose description says something else at one place, its checksums right."""
    checkpoint, path = dict(original(rng.choice(POLICIES))), folder / "c.pth.tar"
    del checkpoint["optimizer"], checkpoint["format"]
    checkpoint["format"] = "paligemma-vla/1"
    tensors = [
        torch.zeros(1).expand(10**9),
        torch.full((4,), math.nan),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(0),
    ]
    if rng.random() < 0.2:
        section = rng.choice([key for key in ("model", "ema", "tokenizer_files") if key in checkpoint])
        weights = dict(checkpoint[section]["weights"] if section == "ema" else checkpoint[section])
        weights[rng.choice([*weights, "..", "evil.py", "../../x", "a\nb"])] = rng.choice([*tensors, *ODD])
        checkpoint[section] = {**checkpoint["ema"], "weights": weights} if section == "ema" else weights
    else:
        checkpoint = with_odd_value(rng, checkpoint, rng.choice([*ODD, *tensors]))
    torch.save(checkpoint, path)
    return functools.partial(act, path)


def evil_tokenizer(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """Tokenizer files that name code beside them, in a checkpoint or in an exported folder."""
    code = f"open({str(marker)!r}, 'w')\nclass Evil:\n    pass\n".encode()
    kind = rng.choice(["auto_map", "custom_code", "file only", "config.json"])
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    files = {"evil.py": code} if kind != "custom_code" else {}
    if kind in ("auto_map", "custom_code"):
        files["tokenizer_config.json"] = json.dumps(config).encode()
    if kind == "config.json":
        files["config.json"] = json.dumps({"model_type": "llama", "auto_map": {"AutoTokenizer": "evil.Evil"}}).encode()
    if rng.random() < 0.5:
        checkpoint = {key: value for key, value in original(POLICIES[0]).items() if key not in ("optimizer", "format")}
        given = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in files.items()}
        checkpoint["tokenizer_files"] = {**checkpoint["tokenizer_files"], **given}
        save_checkpoint(checkpoint, folder / "c.pth.tar")
        return functools.partial(act, folder / "c.pth.tar")
    exported = copied_export(folder)
    for name, content in files.items():
        (exported / "tokenizer" / name).write_bytes(content)
    sign(exported)
    return functools.partial(act, exported)


def copied_export(folder: pathlib.Path) -> pathlib.Path:
    """A writable copy of the exported policy."""
    return pathlib.Path(shutil.copytree(FIXTURES / "policies" / "flow_export", folder / "policy"))


def sign(folder: pathlib.Path, **changes: Any) -> None:
    """Write the digests of a changed folder anew."""
    manifest = json.loads((folder / "policy.json").read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "policy.json"]
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "policy.json").write_text(json.dumps({**manifest, "sha256": digests, **changes}))


def changed_export(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """An exported folder with another file, link, value or name, its digests right."""
    exported = copied_export(folder)
    texts = ["config.yaml", "statistics.json", "backbone_config.json", "preprocessor_config.json"]
    texts += ["tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"]
    chosen = exported / rng.choice(texts)
    kind = rng.randrange(9)
    if kind == 0:
        bomb = {
            "config.yaml": "a: &a [x, x]\n"
            + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}]\n" for i in range(9))
        }
        deep = bomb.get(chosen.name, "[" * 100_000)
        chosen.write_text(deep)
    elif kind in (1, 2):
        text = chosen.read_text()
        content = yaml.safe_load(text) if chosen.suffix == ".yaml" else json.loads(text)
        odd = rng.choice([value for value in ODD if not isinstance(value, bytes)])
        content = with_odd_value(rng, {"x": content}, odd).get("x")
        chosen.write_text(yaml.safe_dump(content) if chosen.suffix == ".yaml" else json.dumps(content))
    elif kind == 3:
        chosen.write_bytes(damaged(rng, chosen.read_bytes()))
    elif kind == 4:
        chosen.unlink()
        chosen.symlink_to(secret)
    elif kind == 5:
        (exported / rng.choice(["evil.py", "tokenizer/evil.py", "a.pkl", "tokenizer/x.bin", "setup.py"])).write_bytes(
            b"x"
        )
    elif kind == 6:
        path = exported / "model.safetensors"
        path.write_bytes(damaged(rng, path.read_bytes()[:3000]) + path.read_bytes()[3000:])
    elif kind == 7:
        shutil.rmtree(exported / "tokenizer")
        if rng.random() < 0.5:
            os.symlink(secret.parent, exported / "tokenizer")
    link = {"sha256": {f"../../secret/{secret.name}": hashlib.sha256(secret.read_bytes()).hexdigest()}}
    odd = {rng.choice(["step", "cameras", "base", "sha256", "format"]): rng.choice(ODD[:-1])}
    sign(exported, **(rng.choice([link, odd]) if kind == 8 else {}))
    return functools.partial(act, exported)


def odd_config(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """A YAML configuration of odd values, tags and aliases."""
    path = folder / "config.yaml"
    bomb = "x0: &x0 [a, a, a, a, a, a, a, a, a]\n"
    bomb += "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12))
    texts = [
        bomb + "data: *x11",
        bomb.replace("x0: ", "data:\n  a: ", 1) if rng.random() < 0.5 else bomb,
        "data: &d\n  mixture: *d",
        "&a [*a]",
        f"data: !!python/object/apply:os.system ['touch {marker}']",
        "base: [1]",
        "base: .",
        "base: config.yaml",
        "[" * 5000,
        "training: {experiment_name: '..'}",
        'training: {experiment_name: "a\\x1b[2J\\nb"}',
        "data: {batch_size: 1" + "0" * 5000 + "}",
        "data: {batch_size: 1e400}",
        "? {a: b}\n: c",
        "data: {batch_size: 0x" + "f" * 400 + "}",
        rng.randbytes(50).decode("latin-1"),
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ]
    text = rng.choice(texts)
    if rng.random() < 0.4:
        content = yaml.safe_load((FIXTURES / "policies" / "flow_export" / "config.yaml").read_text())
        odd = rng.choice([value for value in ODD if not isinstance(value, bytes)])
        text = yaml.safe_dump(with_odd_value(rng, content, odd))
    path.write_bytes(text.encode("utf-8" if rng.random() < 0.9 else "utf-16"))
    return functools.partial(load_config, path)


KINDS: dict[str, Callable[[random.Random, pathlib.Path, pathlib.Path, pathlib.Path], Load]] = {
    "damaged_checkpoint": damaged_checkpoint,
    "rewritten_archive": rewritten_archive,
    "crafted_pickle": crafted_pickle,
    "odd_checkpoint": odd_checkpoint,
    "evil_tokenizer": evil_tokenizer,
    "changed_export": changed_export,
    "odd_config": odd_config,
    "lerobot_folder": lerobot_folder,
    "hdf5_folder": hdf5_folder,
    "damaged_cache": damaged_cache,
}
