"""Several ranks train as one process does: real gloo groups, real files, a real tiny model."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from data.sampler import PassBatchSampler, StepBatchSampler
from model.vla_model import VLAModel
from scripts.export_checkpoint import export_checkpoint
from tests.ranks import (
    DETERMINISTIC,
    losses,
    run_ranks,
    run_training,
    train_counted,
    train_idle,
    validations,
    write_project,
)
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.config_utils import ConfigError, config_from_dict


@pytest.fixture
def config_path(tmp_path, tiny_paligemma_dir):
    return write_project(tmp_path, tiny_paligemma_dir)


def final(folder: Path) -> dict:
    """The run's last checkpoint."""
    paths = folder.glob("checkpoints/checkpoint_epoch_*.pth.tar")
    return max((load_checkpoint(path) for path in paths), key=lambda checkpoint: checkpoint["step"])


def final_path(folder: Path) -> Path:
    return max(folder.glob("checkpoints/checkpoint_epoch_*.pth.tar"), key=lambda path: load_checkpoint(path)["step"])


def difference(a: dict, b: dict) -> float:
    """Largest absolute difference of two checkpoints' weights."""
    assert a["model"].keys() == b["model"].keys()
    return max((value.double() - b["model"][key].double()).abs().max().item() for key, value in a["model"].items())


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_equal_one_process(config_path, accumulation):
    """At the same global batch, with uneven padding over the ranks: weights, losses, norms and validation."""
    one = run_training(config_path, "one", 6, *DETERMINISTIC)
    split = f"training.gradient_accumulation_steps={accumulation}"
    two = run_training(config_path, "two", 6, *DETERMINISTIC, split, ranks=2)
    assert difference(final(one), final(two)) < 1e-6
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    for a, b in zip(validations(one), validations(two), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_resume_of_two_ranks_is_bitwise(config_path, strategy):
    """12 steps = 5 + resume + 7 in weights, optimizer state and logged losses, noise and dropout included."""
    settings = (f"training.strategy={strategy}", "model.action_head_config.dropout_prob=0.1", "training.ema_decay=0.9")
    whole = run_training(config_path, "whole", 12, *settings, ranks=2)
    run = run_training(config_path, "run", 5, *settings, ranks=2)
    run_training(config_path, "run", 12, *settings, ranks=2, resume=final_path(run))
    a, b = final(whole), final(run)
    assert a["step"] == b["step"] == 12 and difference(a, b) == 0
    assert losses(whole) == losses(run)
    assert all(torch.equal(value, b["ema"]["weights"][name]) for name, value in a["ema"]["weights"].items())
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for index, values in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][index][key]) for key, value in values.items())


@pytest.mark.slow
def test_fsdp_equals_ddp_and_its_checkpoint_is_anyones(config_path):
    """10 steps of AdamW; then one process, and ranks of the other strategy, go on from the sharded run's file."""
    average = "training.ema_decay=0.9"
    ddp = run_training(config_path, "ddp", 10, average, ranks=2)
    fsdp = run_training(config_path, "fsdp", 10, average, "training.strategy=fsdp", ranks=2)
    assert difference(final(ddp), final(fsdp)) < 1e-5
    assert difference({"model": final(ddp)["ema"]["weights"]}, {"model": final(fsdp)["ema"]["weights"]}) < 1e-5
    for a, b in zip(losses(ddp) + validations(ddp), losses(fsdp) + validations(fsdp), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    saved = final(fsdp)
    assert all(type(value) is torch.Tensor for value in saved["model"].values())
    assert isinstance(VLAModel.from_checkpoint(saved), VLAModel)

    path = final_path(fsdp)
    single = run_training(config_path, "fsdp", 12, average, resume=path)
    assert final(single)["step"] == 12 and len(losses(single)) == 12


def test_gradients_are_exchanged_once_a_step(config_path):
    """With the last of the accumulated micro-batches alone (`no_sync`)."""
    found = {}
    for accumulation in (1, 2):
        settings = (f"training.gradient_accumulation_steps={accumulation}", "training.max_steps=3", *DETERMINISTIC)
        flags = ["--config_path", str(config_path), "--experiment_name", f"of_{accumulation}", "--set", *settings]
        run_ranks(functools.partial(train_counted, flags), 2, config_path.parent)
        counts = config_path.parent.glob(f"experiments/of_{accumulation}/exchanges_*")
        found[accumulation] = [int(path.read_text()) for path in counts]
    assert found[1] == found[2] and len(found[1]) == 2 and min(found[1]) >= 3


@pytest.mark.slow
def test_accumulation_matches_under_fsdp(config_path):
    settings = (*DETERMINISTIC, "training.gradient_accumulation_steps=2")
    one = run_training(config_path, "one", 4, *settings)
    two = run_training(config_path, "two", 4, *settings, "training.strategy=fsdp", ranks=2)
    assert difference(final(one), final(two)) < 1e-6


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_in_the_same_order(config_path):
    whole = run_training(config_path, "whole", 8, *DETERMINISTIC)
    run = run_training(config_path, "run", 3, *DETERMINISTIC, ranks=2)
    run_training(config_path, "run", 8, *DETERMINISTIC, ranks=4, resume=final_path(run))
    assert difference(final(whole), final(run)) < 1e-6
    for a, b in zip(losses(whole), losses(run), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "quantization"), [("ddp", "none"), ("ddp", "4bit"), ("fsdp", "none")])
def test_adapters_and_frozen_weights_train_on_two_ranks(config_path, strategy, quantization):
    settings = (*DETERMINISTIC, "model.vlm_config.lora={rank: 2}", "model.vlm_config.freeze_vision_tower=true")
    settings += (f"model.vlm_config.quantization={quantization}", "training.save_adapters_only=true")
    one = run_training(config_path, "one", 4, *settings)
    two = run_training(config_path, "two", 4, *settings, f"training.strategy={strategy}", ranks=2)
    assert difference(final(one), final(two)) < 1e-6


@pytest.mark.slow
def test_bfloat16_on_shards_keeps_float32_masters(config_path):
    settings = (*DETERMINISTIC, "model.vlm_config.dtype=bfloat16", "model.vlm_config.freeze_vision_tower=true")
    one = run_training(config_path, "one", 4, *settings)
    two = run_training(config_path, "two", 4, *settings, "training.strategy=fsdp", ranks=2)
    a, b = final(one), final(two)
    assert {key: value.dtype for key, value in a["model"].items()} == {k: v.dtype for k, v in b["model"].items()}
    assert difference(a, b) < 2e-3  # norms of the blocks are gathered in bfloat16
    assert [line["loss"] for line in losses(one)] == pytest.approx([line["loss"] for line in losses(two)], rel=2e-2)


def test_a_parameter_that_the_loss_does_not_reach(config_path):
    """DDP would wait for its gradient; it is found beforehand, and stays in the optimizer as in one process."""
    flags = ["--config_path", str(config_path), "--set", "training.max_steps=3"]
    run_ranks(functools.partial(train_idle, flags), 2, config_path.parent)
    saved = final(config_path.parent / "experiments/run")
    assert torch.equal(saved["model"]["action_head.idle"], torch.ones(3))
    optimizer = saved["optimizer"]
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == 1 + len(optimizer["state"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.vlm_config.dtype=float16", "strategy is fsdp and model.vlm_config.dtype float16"),
        ("optimizer.type=AdamW8bit", "strategy is fsdp and optimizer.type AdamW8bit"),
    ],
)
def test_what_fsdp_cannot_shard_is_refused(config_path, setting, message):
    with pytest.raises(AssertionError, match=message):
        run_training(config_path, "run", 1, setting, "training.strategy=fsdp", ranks=1)


def test_a_non_finite_loss_is_reported_alike_on_all_ranks(config_path):
    settings = (*DETERMINISTIC, "optimizer.lr=1e30", "training.grad_clip_norm=null")
    with pytest.raises(AssertionError) as failure:
        run_training(config_path, "run", 3, *settings, ranks=2)
    named = re.findall("samples with a non-finite loss: (.*?)\\. The optimizer", str(failure.value))
    assert len(named) == 2 and named[0] == named[1] and "train.parquet row" in named[0]


def test_ranks_share_every_step_and_every_pass():
    for world in (1, 2, 4):
        shares = [iter(StepBatchSampler(22, 8, seed=0, rank=rank, world_size=world)) for rank in range(world)]
        steps = [sum((next(share) for share in shares), []) for _ in range(6)]
        if world == 1:
            expected = steps
        assert steps == expected
    for size, batch_size, world in ((9, 2, 2), (9, 2, 4), (1, 4, 3), (12, 3, 2)):
        shares = [PassBatchSampler(size, batch_size, rank=rank, world_size=world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1 and all(len(list(share)) == len(share) for share in shares)
        seen = [index for share in shares for batch in list(share)[: share.num_own] for index in batch]
        assert sorted(seen) == list(range(size))


def test_a_limited_pass_is_spread_over_all_samples():
    """`val_max_batches`: two tasks in two files both choose the best model, however few samples are taken."""
    whole = [index for batch in PassBatchSampler(1000, 8, limit=40) for index in batch]
    assert len(whole) == 40 and whole == list(range(0, 1000, 25))
    shares = [PassBatchSampler(1000, 4, limit=40, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(index for share in shares for batch in share for index in batch) == whole
    assert [list(batch) for batch in PassBatchSampler(5, 2, limit=9)] == [[0, 1], [2, 3], [4]]


@pytest.mark.slow
def test_shards_are_written_by_every_rank_and_read_by_anyone(config_path, tmp_path):
    """The same weights and moments as in one file; exported, resumed in one process, and cleaned up after."""
    one_file = run_training(config_path, "one_file", 4, "training.strategy=fsdp", ranks=2)
    settings = ("training.strategy=fsdp", "training.checkpoint_format=shards")
    folder = run_training(config_path, "run", 4, *settings, ranks=2)
    path = final_path(folder)
    (shards,) = (folder / "checkpoints").glob("*.shards")
    assert len(list(shards.glob("*.safetensors"))) == 2
    assert path.stat().st_size < sum(file.stat().st_size for file in shards.iterdir())
    a, b = final(one_file), final(folder)
    assert difference(a, b) == 0 and all(type(value) is torch.Tensor for value in b["model"].values())
    for index, values in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][index][key]) for key, value in values.items())
    assert "state" not in load_checkpoint(path, for_inference=True).get("optimizer", {})

    export_checkpoint(path, tmp_path / "exported.pth.tar")
    assert difference(load_checkpoint(tmp_path / "exported.pth.tar"), a) == 0
    with pytest.raises(CheckpointError, match="exists; choose another --output_path"):
        export_checkpoint(path, tmp_path / "exported.pth.tar")

    run_training(config_path, "run", 6, *settings, "training.keep_last_k=1", ranks=2, resume=path)
    assert final(folder)["step"] == 6
    used = {torch.load(file, weights_only=True)["shards"]["folder"] for file in folder.rglob("*.pth.tar")}
    assert {file.name for file in folder.rglob("*.shards")} == used, "shards of pruned checkpoints are gone"

    newest = final_path(folder)
    part = next(newest.parent.joinpath(torch.load(newest, weights_only=True)["shards"]["folder"]).iterdir())
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{part.name}: damaged \(checksum\)"):
        load_checkpoint(newest)
    part.unlink()
    with pytest.raises(CheckpointError, match="should have .* bytes, found nothing; keep them together"):
        load_checkpoint(newest)


def test_shards_need_something_sharded():
    with pytest.raises(ConfigError, match="checkpoint_format is shards, but training.strategy ddp shards nothing"):
        config_from_dict({"training": {"checkpoint_format": "shards"}})
