"""Devices that a machine does not have are refused in one line."""

from __future__ import annotations

import pytest
import torch

from utils.misc import pick_device


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device is 'cuda', but this machine has 0 GPUs .* give auto, cpu or one"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device is 'cuda:7', but this machine has 2 GPUs"):
        pick_device("cuda:7")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    for name in ("gpu", "cuda:x", "", "0"):
        with pytest.raises(ValueError, match=f"device is '{name}'; give auto, cpu, cuda, cuda:1, ... or mps"):
            pick_device(name)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="a machine with MPS")
def test_no_mps():
    with pytest.raises(ValueError, match="device is 'mps', which torch .* can't use here; give cpu"):
        pick_device("mps")


def test_auto_takes_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
