"""configs/provla.yaml on small directories of SigLIP and Qwen2: the recipe itself, trained, resumed and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import main_eval
import main_train
from inference.predictor import VLAPredictor
from tests.helpers import write_episodes
from utils.calculate_normalization_stats import calculate_for_config
from utils.checkpoint import load_checkpoint
from utils.config_utils import load_config

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "provla.yaml"
DIM = 14


@pytest.fixture
def overrides(tmp_path: Path, tiny_siglip_llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recipe on small models and few, small episodes; what makes it ProVLA's stays as the file says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    demos = write_episodes(tmp_path / "demos.parquet", [5] * 20, state_dim=DIM, action_dim=DIM, image_size=32)
    settings = {
        "data.train_parquet_files": demos,
        "data.normalization_stats_path": tmp_path / "stats.json",
        "data.batch_size": 20,
        "data.num_workers": 0,
        "model.vlm_config.vision_model_name_or_path": tiny_siglip_llm_dir / "siglip",
        "model.vlm_config.language_model_name_or_path": tiny_siglip_llm_dir / "qwen2",
        "model.vlm_config.fusion.hidden_dim": 32,
        "model.action_head_config.unet_width": 16,
        "model.action_head_config.hidden_dim": 32,
        "training.checkpoint_dir": tmp_path / "experiments",
        "training.num_threads": 1,
        "training.val_num_plots": 0,
        "lr_scheduler.warmup_steps": 2,
        "inference.num_inference_steps": 4,
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    statistics = calculate_for_config(load_config(CONFIG, set_args=given))
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    return given


def train(overrides: list[str], *more: str, flags: tuple[str, ...] = ()) -> None:
    main_train.main(["--config_path", str(CONFIG), *flags, "--set", *overrides, *more])


def test_the_file_is_the_recipe() -> None:
    config = load_config(CONFIG)
    data, vlm, head = config.data, config.model.vlm_config, config.model.action_head_config
    assert "siglip-base-patch16-224" in vlm.vision_model_name_or_path
    assert "Qwen2.5-0.5B" in vlm.language_model_name_or_path
    assert (head.per_action_dim, head.horizon, head.unet_width, head.num_train_timesteps) == (14, 16, 256, 100)
    assert (head.type, head.denoiser, head.scheduler) == ("diffusion", "unet", "ddim")
    assert config.inference.num_inference_steps == 50
    assert (vlm.lora.rank, vlm.lora.alpha, vlm.lora.targets) == (16, 32, ("q_proj", "v_proj"))
    assert vlm.lora.vision and vlm.lora.language
    assert config.optimizer.lr == 2e-4 and config.training.gradient_accumulation_steps == 10
    assert (config.lr_scheduler.type, config.lr_scheduler.warmup_steps) == ("warmup_cosine", 100)
    assert (config.training.early_stopping_patience, config.training.val_every_n_epochs) == (5, 3)
    assert (data.val_fraction, data.max_episodes) == (0.1, None)


@pytest.mark.slow
def test_trains_resumes_and_evaluates(tmp_path: Path, overrides: list[str]) -> None:
    """18 of 20 episodes train, 90 samples, 4.5 steps of 10 micro-batches per epoch; validation every third epoch."""
    whole = tmp_path / "experiments" / "whole" / "checkpoints"
    train(overrides, "training.epochs=6", flags=("--experiment_name", "whole"))
    checkpoint = load_checkpoint(whole / "checkpoint_epoch_6.pth.tar")
    assert checkpoint["step"] == 27 and (whole / "model_best.pth.tar").is_file()
    lines = (whole.parent / "logs" / "metrics.jsonl").read_text().splitlines()
    validated = [line["step"] for line in map(json.loads, lines) if "val_loss" in line]
    assert validated == [14, 27]
    adapters = [name for name in checkpoint["model"] if ".lora_" in name]
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapters} == {"q_proj", "v_proj"}
    assert {name.split(".")[1] for name in adapters} == {"vision_tower", "language_model"}
    assert all(checkpoint["model"][name].abs().sum() > 0 for name in adapters), "lora_B has left zero"

    (whole / "checkpoint_epoch_6.pth.tar").unlink()
    third = str(whole / "checkpoint_epoch_3.pth.tar")
    train(overrides, "training.epochs=6", flags=("--experiment_name", "whole", "--resume_checkpoint", third))
    again = load_checkpoint(whole / "checkpoint_epoch_6.pth.tar")
    assert all(torch.equal(value, again["model"][name]) for name, value in checkpoint["model"].items())

    out = tmp_path / "evaluation"
    main_eval.main(
        ["--checkpoint_path", str(whole / "model_best.pth.tar"), "--device", "cpu", "--num_workers", "0"]
        + ["--eval_data_path", str(tmp_path / "demos.parquet"), "--output_dir", str(out)]
    )
    policy = json.loads((out / "metrics.json").read_text())["predictors"]["policy"]
    assert policy["samples"] == 100 and len(policy["per_dimension"]["mse"]) == DIM


@pytest.mark.slow
def test_stops_early_and_limits_episodes(tmp_path: Path, overrides: list[str]) -> None:
    """At a learning rate of almost nothing no validation is better than the first."""
    limited = [*overrides, "data.max_episodes=10"]
    statistics = calculate_for_config(load_config(CONFIG, set_args=limited))
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    train(limited, "optimizer.lr=1e-20", "training.epochs=60")
    folder = tmp_path / "experiments" / "provla"
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    validated = [line["epoch"] for line in lines if "val_loss" in line]
    assert len(validated) == 1 + 5 and validated[-1] < 19, "patience 5, every 3 epochs"
    assert "early stop" in (folder / "logs" / "train.log").read_text()
    assert load_checkpoint(folder / "checkpoints" / "model_best.pth.tar")["num_samples"] == 45  # 9 of 10 episodes


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized(tmp_path: Path, overrides: list[str], quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    chosen = (f"model.vlm_config.quantization={quantization}", "training.max_steps=2")
    train(overrides, *chosen)
    folder = tmp_path / "experiments" / "provla" / "checkpoints"
    path = folder / "checkpoint_epoch_1.pth.tar"
    stored = {
        value.dtype for name, value in load_checkpoint(path)["model"].items() if "mlp" in name and "tower" in name
    }
    assert (torch.int8 if quantization == "8bit" else torch.uint8) in stored
    frame = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    action = VLAPredictor.from_checkpoint(path, "cpu").predict(frame, prompt="open the window", state=[0.0] * DIM)
    assert action.shape == (16, DIM) and torch.from_numpy(action).isfinite().all()
