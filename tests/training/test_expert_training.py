"""The action expert trained on data files: prompts that say the state, letterboxed floats, and serving alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import main_train
from data.loader import VLADataset, make_loader
from data.processing import collate_fn
from inference.predictor import VLAPredictor
from inference.published import published_checkpoint
from inference.serving.export_published import export_published
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.pi_fixtures import folder
from tests.policies import merged
from utils.batch import example_batch
from utils.calculate_normalization_stats import calculate_statistics
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config_utils import ConfigError
from utils.parquet_utils import DataError
from utils.statistics import StatisticsError

REPOSITORY = Path(__file__).parents[2]

EXPERT = {"width": 32, "mlp_dim": 48, "num_heads": 4, "max_state_dim": 6, "max_action_dim": 6}
PI0 = {
    "head": {"type": "action_expert", "expert": EXPERT},
    "data": {"image_fit": "pad", "prompt_format": "pi0", "normalization_arithmetic": "lerobot"},
}
PI05 = {
    "head": {"type": "action_expert", "expert": {**EXPERT, "time": "adaptive_norm", "state_token": False}},
    "data": {
        "image_fit": "pad",
        "prompt_format": "pi05",
        "prompt_max_len": 120,
        "normalization_arithmetic": "openpi",
        "normalization_type": "quantile",
    },
}


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_episodes(tmp_path_factory.mktemp("demos") / "demos.parquet", [6, 4])


@pytest.fixture(scope="module", params=[PI0, PI05], ids=["pi0", "pi05"])
def predictor(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_paligemma_dir: Path, demos: Path
) -> VLAPredictor:
    folder = tmp_path_factory.mktemp("run")
    return VLAPredictor.from_checkpoint(train_tiny(folder, tiny_paligemma_dir, [demos], **request.param), device="cpu")


def dataset_of(predictor: VLAPredictor, demos: Path) -> VLADataset:
    head = predictor.config.model.action_head_config
    return VLADataset(
        [demos],
        predictor.config.data,
        horizon=head.horizon,
        per_action_dim=head.per_action_dim,
        cameras=predictor.cameras,
        image_processor=predictor.image_processor,
        prompt_tokenizer=predictor.prompt_tokenizer,
    )


def test_serving_equals_training(predictor: VLAPredictor, demos: Path) -> None:
    dataset = dataset_of(predictor, demos)
    batch = dataset.batch(range(len(dataset)))
    for row in range(len(dataset)):
        frame = dataset.store.image("image_1", row)
        prompt, state = dataset.store.prompt(row), np.array(dataset.store.state[row])
        served = predictor.observe(frame, prompt=prompt, state=state)
        length = served["input_ids"].shape[1]
        assert torch.equal(served["input_ids"][0], batch["input_ids"][row, :length])
        assert batch["prompt_mask"][row].sum() == length
        assert served["image_1"].dtype == torch.float32 and torch.equal(served["image_1"][0], batch["image_1"][row])
        assert 0 <= served["image_1"].min() and served["image_1"].max() <= 1


def test_the_prompt_says_the_normalized_state(predictor: VLAPredictor, demos: Path) -> None:
    dataset = dataset_of(predictor, demos)
    tokenizer, state = predictor.prompt_tokenizer, np.array(dataset.store.state[2])
    text = tokenizer.tokenizer.decode(tokenizer("press it", state))
    if not tokenizer.reads_state:
        assert text.endswith("press it\n")
        return
    batch = {"state": torch.from_numpy(state)[None], "dataset_index": torch.zeros(1, dtype=torch.int64)}
    normalized = predictor.model.normalizer.normalize_state(batch["state"], batch["dataset_index"])[0]
    bins = (torch.floor((normalized + 1) * 128).clamp(-1, 255)).int().tolist()
    assert text.endswith(f"Task: press it, State: {' '.join(map(str, bins))};\nAction: ")


def test_workers_hand_over_floats(predictor: VLAPredictor, demos: Path) -> None:
    dataset = dataset_of(predictor, demos)
    here, there = (list(make_loader(dataset, num_workers=count, batch_size=4)) for count in (0, 2))
    for mine, theirs in zip(here, there, strict=True):
        assert mine["image_1"].dtype == torch.float32
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key]


def test_batches_and_augmentation_keep_the_type_of_images(predictor: VLAPredictor, demos: Path) -> None:
    assert example_batch(predictor.config, image_size=32)["image_1"].dtype == torch.float32
    from model.augmentation import ImageAugmentation
    from utils.config_utils import AugmentationConfig

    augment = ImageAugmentation(AugmentationConfig(enabled=True))
    image = dataset_of(predictor, demos).batch([0])["image_1"]
    for module in (augment.train(), augment.eval()):
        torch.manual_seed(0)
        (floats,) = module([image])
        torch.manual_seed(0)
        (whole,) = module([(image * 255).round().to(torch.uint8)])
        assert floats.dtype == torch.float32
        torch.testing.assert_close(floats * 255, whole.float(), atol=3, rtol=0)


def test_predictions_in_a_batch_are_those_alone(predictor: VLAPredictor, demos: Path) -> None:
    dataset = dataset_of(predictor, demos)
    samples = [dataset[row] for row in (0, 7)]
    together = predictor.predict_batch(collate_fn(samples), [1, 2])
    for i, sample in enumerate(samples):
        alone = predictor.predict_batch(collate_fn([sample]), [1 + i])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


def test_what_nothing_reads_does_not_train(
    predictor: VLAPredictor, tmp_path: Path, tiny_paligemma_dir: Path, demos: Path
) -> None:
    settings: dict[str, Any] = PI05 if predictor.prompt_tokenizer.reads_state else PI0
    path = train_tiny(tmp_path, tiny_paligemma_dir, [demos], **settings)
    model = VLAPredictor.from_checkpoint(path, device="cpu").model
    fresh = type(model).from_checkpoint(torch.load(path, weights_only=True), use_ema=False).train()
    fresh(dataset_of(predictor, demos).batch([0, 1])).sum().backward()
    without = {
        name for name, parameter in fresh.named_parameters() if parameter.requires_grad and parameter.grad is None
    }
    assert without == set()
    resting = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    assert resting and all("language_model.layers.1." in name or "language_model.norm" in name for name in resting)


def handed_back(trained: Path, out: Path, kind: str, statistics: dict[str, Any]) -> None:
    """What training did not change is as it was imported; what it did change is this run's."""
    export_published(load_checkpoint(trained), out, "lerobot")
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder(kind) / "policy", out))
    renewed = {"chunk_size": 6, "n_action_steps": 6, "time_sampling_offset": 0.001}
    changed = {key for key, value in before.items() if value != after[key]}
    assert changed == {"input_features", "output_features", "chunk_size", "n_action_steps"}, changed
    assert all(after[key] == value for key, value in renewed.items())
    assert set(after["input_features"]) == {"observation.images.image_1", "observation.state"}
    assert after["input_features"]["observation.state"]["shape"] == after["output_features"]["action"]["shape"] == [4]
    (file,) = out.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    numbers = load_file(file)
    assert torch.equal(numbers["action.max"], torch.tensor(statistics["action"]["max"]))
    assert numbers["observation.state.mean"].shape == (4,) and "observation.state.count" not in numbers
    assert "observation.images.base_0_rgb.mean" in numbers  # which nothing reads
    settings = {"tokenizer_name_or_path": str(folder(kind) / "tokenizer"), "vision_num_attention_heads": 2}
    here, there = VLAPredictor.from_checkpoint(trained, "cpu"), VLAPredictor.from_pretrained(out, "cpu", **settings)
    seen = {"prompt": "go", "state": np.zeros(4), "seed": 0}
    frames = {"image_1": np.full((30, 50, 3), 90, np.uint8)}
    np.testing.assert_allclose(here.predict(images=frames, **seen), there.predict(images=frames, **seen), atol=1e-6)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_fine_tuning_from_a_published_policy(kind: str, tmp_path: Path, demos: Path, monkeypatch, capsys) -> None:
    """Another robot, other cameras, another horizon; own statistics or the checkpoint's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {"tokenizer_name_or_path": str(folder(kind) / "tokenizer"), "vision_num_attention_heads": 2}
    save_checkpoint(published_checkpoint(folder(kind) / "policy", **settings), tmp_path / "base.pth.tar")
    statistics = calculate_statistics([demos], 4, 4, horizon=6)
    content = {"action_mode": "absolute", "absolute_action_dims": [], "val_fraction": 0.0, "max_episodes": None}
    (tmp_path / "stats.json").write_text(json.dumps({**content, "datasets": {"default": statistics}}))
    config = yaml.safe_load((REPOSITORY / "configs" / "pi0_finetune.yaml").read_text())
    if kind == "pi05":
        config = merged(config, yaml.safe_load((REPOSITORY / "configs" / "pi05_finetune.yaml").read_text()))
        config.pop("base")
    small = {
        "data": {
            "train_parquet_files": [str(demos)],
            "val_parquet_files": [],
            "normalization_stats_path": str(tmp_path / "stats.json"),
            "cameras": ["image_1"],
            "state_dim": 4,
            "batch_size": 4,
            "num_workers": 0,
        },
        "model": {
            "vlm_config": {"dtype": "float32"},
            "action_head_config": {
                "horizon": 6,
                "per_action_dim": 4,
                "noise_draws_per_sample": 2,
                "expert": {"width": 32, "mlp_dim": 64},
            },
        },
        "training": {"max_steps": 2, "checkpoint_dir": str(tmp_path / "runs"), "save_every_n_steps": None},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(merged(config, small)))
    command = ["--config_path", str(path), "--init_checkpoint", str(tmp_path / "base.pth.tar")]
    main_train.main([*command, "--experiment_name", "own"])
    assert "statistics: those of this run's data" in capsys.readouterr().err
    trained = next((tmp_path / "runs" / "own" / "checkpoints").glob("checkpoint_*.pth.tar"))
    predictor = VLAPredictor.from_checkpoint(trained, device="cpu")
    assert predictor.model.statistics[0]["action"]["max"] == statistics["action"]["max"]
    frame = np.zeros((30, 50, 3), np.uint8)
    assert predictor.predict(frame, prompt="go", state=np.zeros(4), seed=0).shape == (6, 4)
    handed_back(trained, tmp_path / "out", kind, statistics)
    with pytest.raises(StatisticsError, match="state.* has 8 values, config wants data.state_dim 4"):
        main_train.main([*command, "--experiment_name", "theirs", "--statistics", "pretrained"])
    with pytest.raises(ConfigError, match="checkpoint of another architecture: .*data.image_fit: checkpoint 'pad'"):
        main_train.main([*command, "--experiment_name", "other", "--set", "data.image_fit=stretch"])
    with pytest.raises(
        DataError, match="data.cameras: the policy is to read wrist, but no file has a column wrist or wr"
    ):
        main_train.main([*command, "--experiment_name", "blind", "--set", "data.cameras=[image_1, wrist]"])
    with pytest.raises(ConfigError, match="--statistics says what a run from an --init_checkpoint normalizes by"):
        main_train.main(["--config_path", str(path), "--statistics", "own"])
