"""Validation on a real tiny model: the numbers, whatever the batches and ranks, and the pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.loader import VLADataset, make_loader
from data.processing import processors_from_config
from model.vla_model import VLAModel
from tests.helpers import write_episodes
from tests.policies import act, model_section
from training.run_log import RunLog
from training.validation import validate
from utils.batch import steps_with_loss
from utils.calculate_normalization_stats import calculate_statistics
from utils.config_utils import ConfigError, config_from_dict, config_to_dict
from utils.misc import derive_seed


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_paligemma_dir):
    """(config, model, held-out set of 12 samples)."""
    folder = tmp_path_factory.mktemp("validation")
    files = [write_episodes(folder / "val.parquet", [7, 5], image_size=32)]
    config = config_from_dict(
        {
            "data": {"state_dim": 4, "num_workers": 0, "cache_dir": str(folder / "cache")},
            "model": model_section(tiny_paligemma_dir, num_heads=2),
            "training": {"checkpoint_dir": str(folder), "experiment_name": "run", "val_num_samples": 3},
            "inference": {"num_inference_steps": 2},
        }
    )
    processors = processors_from_config(config)
    dataset = VLADataset(
        files,
        config.data,
        horizon=4,
        per_action_dim=4,
        cameras=config.cameras,
        image_processor=processors[0],
        prompt_tokenizer=processors[1],
    )
    return config, policy_of(config, dataset), dataset


def policy_of(config, dataset):
    torch.manual_seed(0)
    statistics = [calculate_statistics(dataset.store.files, 4, 4)]
    mean, std = dataset.image_processor.mean, dataset.image_processor.std
    return VLAModel.from_pretrained(config, statistics, mean, std).eval()


def batches_of(dataset, size):
    return list(make_loader(dataset, num_workers=0, batch_size=size))


def run(setting, batches, rank=0, reduce_sum=lambda value: value):
    config, model, _ = setting
    return validate(model, batches, len(batches), config, torch.device("cpu"), rank=rank, reduce_sum=reduce_sum)


def test_numbers_by_another_way(setting):
    config, model, dataset = setting
    found = run(setting, batches_of(dataset, 5))
    assert (found.details["samples"], found.details["valid_steps"]) == (12, 12 * 4 - 2 * 6)
    loss, squared, absolute, count, with_loss = 0.0, 0.0, 0.0, 0, 0
    for i, batch in enumerate(batches_of(dataset, 5)):
        torch.manual_seed(derive_seed("validation", config.training.seed, i, 0))
        loss += model(batch).sum().item()
        places = zip(*(batch[key].tolist() for key in ("dataset_index", "episode_index", "frame_index")), strict=True)
        seeds = [derive_seed("validation", config.training.seed, *place, 0) for place in places]
        predicted = act(model, batch, 2, seeds)
        place = batch["state"], batch["dataset_index"]
        error = model.normalizer.normalize_action(predicted, *place) - model.normalizer.normalize_action(
            batch["action"], *place
        )
        valid = ~batch["action_is_pad"]
        squared += error[valid].square().mean(-1).sum().item()
        absolute += (predicted - batch["action"])[valid].abs().mean(-1).sum().item()
        count += valid.sum().item()
        with_loss += steps_with_loss(batch, config).sum().item()
    assert with_loss > count, "the last action is repeated past the end"
    assert found.values["val_loss"] == pytest.approx(loss / with_loss)
    assert found.values["val_action_mse"] == pytest.approx(squared / count)
    assert found.values["val_action_mae"] == pytest.approx(absolute / count)
    assert found.values["val/spread"] > 0
    assert found.values["val/best_of_k_mse_normalized"] < found.values["val_action_mse"]
    assert found.values["val/mse_normalized"] == found.values["val_action_mse"]


def test_batches_and_ranks_change_nothing(setting):
    dataset = setting[2]
    whole = run(setting, batches_of(dataset, 12))
    parts = batches_of(dataset, 3)
    ranks = [parts[0::2], parts[1::2]]
    sent: list[list[torch.Tensor]] = [[], []]
    for rank, batches in enumerate(ranks):
        run(setting, batches, rank, lambda value, rank=rank: (sent[rank].append(value.clone()), value)[1])
    sums = [torch.stack(pair).sum(0) for pair in zip(*sent, strict=True)]
    for rank, batches in enumerate(ranks):
        answers = iter(sums)
        found = run(setting, batches, rank, lambda value, answers=answers: next(answers))
        assert found.details["samples"] == 12
        names = [name for name in whole.values if name != "val_loss"]  # whose noise depends on the rank
        assert {name: found.values[name] for name in names} == pytest.approx(
            {name: whole.values[name] for name in names}, rel=1e-4
        )


def test_pictures_show_the_same_samples_every_time(setting):
    config, _, dataset = setting
    first, again = (run(setting, batches_of(dataset, 3)).plotted for _ in range(2))
    assert first.captions == again.captions and len(set(first.captions)) == 4
    assert first.captions[0] == "default, episode 0, step 0" and first.captions[3] == "default, episode 1, step 2"
    assert first.drawn_KNTA.shape == (16, 4, 4, 4)
    np.testing.assert_array_equal(first.drawn_KNTA, again.drawn_KNTA)
    crowded = run(setting, batches_of(dataset, 12)).plotted  # four samples of one batch
    assert len(set(crowded.captions)) == 4

    log = RunLog(config, is_main=True)
    log.write_validation(7, run(setting, batches_of(dataset, 3)), dataset.names["action"])
    picture = config.experiment_dir / "plots" / "validation_step_000007.png"
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
    line = json.loads((config.experiment_dir / "logs/validation.jsonl").read_text())
    assert line["step"] == 7 and len(line["per_step"]["mse"]) == len(line["per_dimension"]["spread"]) == 4
    log.rewind(6)
    assert (config.experiment_dir / "logs/validation.jsonl").read_text() == ""


def test_a_head_that_does_not_sample_has_no_spread(setting):
    config, _, dataset = setting
    tree = config_to_dict(config)
    tree["model"]["action_head_config"]["type"] = "regression"
    config = config_from_dict(tree)
    found = run((config, policy_of(config, dataset), dataset), batches_of(dataset, 5))
    assert "val/mse" in found.values and not {"val/spread", "val/best_of_k_mse"} & found.values.keys()
    assert found.plotted.drawn_KNTA.shape == (1, 4, 4, 4)


def test_no_pictures_and_bad_settings(setting):
    config, model, dataset = setting
    tree = config_to_dict(config)
    tree["training"] |= {"val_num_plots": 0, "val_num_samples": 1}
    found = run((config_from_dict(tree), model, dataset), batches_of(dataset, 5))
    assert found.plotted is None and "val/spread" not in found.values
    tree["training"]["val_num_plots"] = -1
    with pytest.raises(ConfigError, match="training.val_num_plots is -1; give 0"):
        config_from_dict(tree)
    tree["training"] |= {"val_num_plots": 0, "val_num_samples": 0}
    with pytest.raises(ConfigError, match="training.val_num_samples is 0; it must be positive"):
        config_from_dict(tree)
