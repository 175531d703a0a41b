"""Mixtures, splits and sampling weights: right shares, the same samples, inert padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from data.loader import build_datasets, build_sampler, collate_fn, make_loader
from data.processing import processors_from_config
from data.sampler import BLOCK, StepBatchSampler
from data.weighting import sample_probabilities
from model.vla_model import VLAModel
from tests.helpers import episode_rows, write_episodes, write_rows
from tests.policies import act, model_section
from utils.calculate_normalization_stats import calculate_statistics
from utils.config_utils import config_from_dict
from utils.parquet_utils import DataError
from utils.splits import used_episodes, validation_episodes
from utils.statistics import StatisticsError


@pytest.fixture
def mixture(tmp_path, tiny_paligemma_dir):
    """A wide dataset with two cameras, and a narrow one with one camera and a shorter horizon."""
    wide = write_episodes(tmp_path / "wide.parquet", [9, 7], cameras=("image_1", "image_2"), image_size=32)
    narrow = write_episodes(tmp_path / "narrow.parquet", [6, 5, 8], seed=20, state_dim=3, action_dim=2, image_size=32)

    def make(**data):
        tree = {
            "data": {
                "mixture": [
                    {"path": str(wide), "name": "wide", "weight": 3},
                    {
                        "path": str(narrow),
                        "name": "narrow",
                        "weight": 1,
                        "state_dim": 3,
                        "per_action_dim": 2,
                        "horizon": 2,
                    },
                ],
                "state_dim": 4,
                "batch_size": 8,
                "cache_dir": str(tmp_path / "cache"),
                **data,
            },
            "model": model_section(tiny_paligemma_dir, {"use_aux_camera": True}),
        }
        return config_from_dict(tree)

    return make


def model_of(config, train):
    torch.manual_seed(0)
    statistics = [
        calculate_statistics(one.store.files, own.state_dim, own.per_action_dim)
        for one, own in zip(train.datasets, config.datasets, strict=True)
    ]
    model = VLAModel.from_pretrained(config, statistics, (0.5,) * 3, (0.5,) * 3)
    for parameter in model.action_head.parameters():  # gates start at zero: give every path a voice
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_frequencies_follow_the_weights():
    sampler = StepBatchSampler([100, 1000, 50], 50, seed=1, weights=[1, 2, 5])
    draws = np.array(list(itertools.chain.from_iterable(itertools.islice(sampler, 2000))))
    counts = np.histogram(draws, bins=[0, 100, 1100, 1150])[0]
    for count, share in zip(counts, np.array([1, 2, 5]) / 8, strict=True):
        assert abs(count - 100_000 * share) < 3 * np.sqrt(100_000 * share * (1 - share))


def test_order_within_a_dataset_does_not_depend_on_the_others():
    alone = list(itertools.chain.from_iterable(itertools.islice(StepBatchSampler(40, 8, seed=5), 50)))
    mixed = StepBatchSampler([40, 500], 8, seed=5, weights=[1, 3])
    stream = itertools.chain.from_iterable(itertools.islice(mixed, 400))
    first = [i for i in stream if i < 40]
    assert len(first) > 100 and first[: len(alone)] == alone[: len(first)]


@pytest.mark.parametrize("start", [1, 3, 5, 2 * BLOCK // 64 + 7])
def test_a_mixture_resumes_anywhere_and_over_any_number_of_ranks(start):
    options = dict(seed=2, weights=[2, 1, 1])
    whole = list(itertools.islice(StepBatchSampler([30, 7, 90], 64, **options), start + 4))
    resumed = StepBatchSampler([30, 7, 90], 64, **options)
    resumed.start_step = start
    assert list(itertools.islice(resumed, 4)) == whole[start:]
    ranks = [StepBatchSampler([30, 7, 90], 64, **options, rank=rank, world_size=2) for rank in range(2)]
    streams = [list(itertools.islice(rank, start + 1)) for rank in ranks]
    assert streams[0][start] + streams[1][start] == whole[start]


def test_a_weight_of_zero_is_never_drawn():
    sampler = StepBatchSampler([10, 10], 10, seed=0, weights=[1, 0])
    assert max(itertools.chain.from_iterable(itertools.islice(sampler, 100))) < 10


def test_samples_equal_those_of_the_dataset_alone(mixture):
    config = mixture()
    train, _ = build_datasets(config, *processors_from_config(config))
    alone = config_from_dict(
        {
            "data": {
                "train_parquet_files": config.datasets[1].path,
                "state_dim": 3,
                "cache_dir": config.data.cache_dir,
            },
            "model": {
                "vlm_config": {"model_name_or_path": config.model.vlm_config.model_name_or_path},
                "action_head_config": {"horizon": 2, "per_action_dim": 2},
            },
        }
    )
    single, _ = build_datasets(alone, *processors_from_config(alone))
    offset = len(train.datasets[0])
    for i in range(len(single)):
        a, b = single[i], train[offset + i]
        assert torch.equal(a["image_1"], b["image_1"]) and torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["state"], b["state"][:3]) and b["state"][3] == 0
        assert torch.equal(a["action"], b["action"][:2, :2]) and b["action"][2:].abs().sum() == 0
        assert torch.equal(a["action_is_pad"], b["action_is_pad"][:2]) and b["action_is_pad"][2:].all()
        assert b["image_mask"].tolist() == [True, False] and b["dataset_index"] == 1
        assert (a["episode_index"], a["frame_index"]) == (b["episode_index"], b["frame_index"])


def test_padding_is_inert(mixture):
    """No gradient flows to padded state dimensions, action dimensions, steps or cameras, and none changes the loss."""
    config = mixture()
    train, _ = build_datasets(config, *processors_from_config(config))
    model = model_of(config, train)
    batch = collate_fn([train[0], train[len(train.datasets[0])], train[len(train) - 1]])
    batch["state"].requires_grad_()
    batch["action"].requires_grad_()
    torch.manual_seed(1)
    loss = model(batch)
    loss.sum().backward()
    narrow = batch["dataset_index"] == 1
    assert (batch["state"].grad[narrow, 3:] == 0).all() and (batch["state"].grad[:, :3] != 0).all()
    assert (batch["action"].grad[narrow][:, :, 2:] == 0).all()
    assert (batch["action"].grad[batch["action_is_pad"]] == 0).all()
    assert (batch["action"].grad[narrow][:, 0, :2] != 0).all() and (batch["action"].grad[~narrow][:, :, 3] != 0).any()

    spoiled = {key: value.detach().clone() if torch.is_tensor(value) else value for key, value in batch.items()}
    spoiled["state"][narrow, 3:] = 77.0
    spoiled["action"][narrow, :, 2:] = 77.0
    spoiled["action"][spoiled["action_is_pad"]] = 77.0
    spoiled["image_2"][narrow] = 255
    torch.manual_seed(1)
    torch.testing.assert_close(model(spoiled), loss.detach(), atol=0, rtol=0)
    action = act(model, spoiled, 2)
    assert (action[narrow][:, :, 2:] == 0).all() and (action[narrow][:, :, :2] != 0).all()


def test_absent_camera_gets_no_attention(mixture):
    config = mixture()
    train, _ = build_datasets(config, *processors_from_config(config))
    model = model_of(config, train)
    batch = collate_fn([train[0], train[len(train) - 1]])
    seen = []
    model.backbone.backbone.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.encode(batch)
    assert seen == [3], "two cameras of one sample and one of the other: an absent camera costs no vision pass"


def test_sampler_of_a_mixture_and_its_loader(mixture):
    config = mixture()
    train, _ = build_datasets(config, *processors_from_config(config))
    sampler = build_sampler(config, train)
    assert sampler.weights.tolist() == [0.75, 0.25] and sampler.num_samples == 35
    batch = next(iter(make_loader(train, num_workers=0, batch_sampler=sampler)))
    assert batch["state"].shape == (8, 4) and set(batch["dataset_index"].tolist()) == {0, 1}
    assert "narrow: " in train.describe(34) and "row 18" in train.describe(34)


@pytest.mark.parametrize("weighting", ["episode", "task"])
def test_weights_by_episode_and_task(mixture, weighting):
    config = mixture(sample_weighting=weighting)
    train, _ = build_datasets(config, *processors_from_config(config))
    dataset = train.datasets[1]  # episodes of 6, 5 and 8 steps; prompts of the first and third are the same
    probabilities = sample_probabilities(dataset.store, np.arange(len(dataset)), config.data.sample_weighting)
    assert probabilities.sum() == pytest.approx(1)
    per_episode = [probabilities[:6].sum(), probabilities[6:11].sum(), probabilities[11:].sum()]
    expected = [1 / 3] * 3 if weighting == "episode" else [0.5 * 6 / 14, 0.5, 0.5 * 8 / 14]
    assert per_episode == pytest.approx(expected)
    assert next(iter(build_sampler(config, train)))


def test_split_puts_no_episode_on_both_sides(mixture):
    config = mixture(val_fraction=0.4, split_seed=3)
    processors = processors_from_config(config)
    train, val = build_datasets(config, *processors)
    for a, b in zip(train.datasets, val.datasets, strict=True):
        assert not set(a.episodes) & set(b.episodes)
        assert sorted([*a.episodes, *b.episodes]) == list(range(a.store.num_episodes))
        assert len(b.episodes) >= 1 and len(a) + len(b) == len(a.store)
        for i in range(len(b)):
            assert b[i]["episode_index"] in b.episodes
    again, _ = build_datasets(config, *processors)
    assert [list(d.episodes) for d in again.datasets] == [list(d.episodes) for d in train.datasets]


def test_split_function():
    assert validation_episodes("a", 10, 0.0, 0).sum() == 0
    assert validation_episodes("a", 100, 0.1, 0).sum() == 10
    assert validation_episodes("a", 3, 0.01, 0).sum() == 1, "at least one is held out"
    assert validation_episodes("a", 2, 0.99, 0).sum() == 1, "at least one is left"
    assert (validation_episodes("a", 50, 0.3, 0) != validation_episodes("a", 50, 0.3, 1)).any()
    assert (validation_episodes("a", 50, 0.3, 0) != validation_episodes("b", 50, 0.3, 0)).any()


def test_limit_on_episodes(mixture):
    everything, _ = build_datasets(config := mixture(val_fraction=0.4), *processors_from_config(config))
    config = mixture(val_fraction=0.4, max_episodes=3)
    train, val = build_datasets(config, *processors_from_config(config))
    for a, b, whole in zip(train.datasets, val.datasets, everything.datasets, strict=True):
        used = np.flatnonzero(used_episodes(a.name, whole.store.num_episodes, 0, 3))
        assert sorted([*a.episodes, *b.episodes]) == used.tolist() and len(b.episodes) == 1
        assert len(a) == np.diff(a.store.episode_starts)[a.episodes].sum()


def test_limit_function():
    held = validation_episodes("a", 40, 0.25, 1, max_episodes=20)
    used = [used_episodes("a", 40, 1, limit) for limit in (5, 20, 40, 99, None)]
    assert [mask.sum() for mask in used] == [5, 20, 40, 40, 40] and held.sum() == 5
    assert all((small <= large).all() for small, large in itertools.pairwise(used)), (
        "a larger limit adds to a smaller one"
    )
    assert (held <= used[1]).all() and not used[1][:20].all(), "drawn from all over the files"
    assert (used_episodes("a", 40, 2, 20) != used[1]).any()
    no_limit = validation_episodes("a", 40, 0.25, 1)
    assert (validation_episodes("a", 40, 0.25, 1, max_episodes=40) == no_limit).all()


def test_validation_files_and_a_mixture_contradict(mixture):
    config = mixture(val_parquet_files="x")
    with pytest.raises(DataError, match="does not say which dataset of data.mixture it is; use val_fraction"):
        build_datasets(config, *processors_from_config(config))


def test_a_dataset_of_the_wrong_width_is_named(tmp_path, mixture):
    write_rows(tmp_path / "narrow.parquet", episode_rows(4, state_dim=3, action_dim=3))
    config = mixture()
    with pytest.raises(DataError, match=r"narrow\.parquet row 0: action has 3 values, config wants per_action_dim 2"):
        build_datasets(config, *processors_from_config(config))


def test_statistics_of_another_number_of_datasets_are_refused(mixture):
    config = mixture()
    train, _ = build_datasets(config, *processors_from_config(config))
    statistics = calculate_statistics(train.datasets[0].store.files, 4, 4)
    with pytest.raises(StatisticsError, match=r"statistics of 1 datasets, but the config has 2 \(wide, narrow\); calc"):
        VLAModel.from_pretrained(config, [statistics], (0.5,) * 3, (0.5,) * 3)
