"""scripts/merge_lora.py: one plain file that predicts as the adapters did."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diagnose_weights
from model.checkpointing import state_to_save
from model.tiny.paligemma import make_tiny_paligemma
from model.vla_model import VLAModel
from scripts.merge_lora import main
from tests.conftest import TINY
from tests.policies import act, checkpoint_of, make_batch, make_policy, policy_config
from training.state import require_train_state
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.config_utils import ConfigError


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def predict(policy: VLAModel) -> torch.Tensor:
    return act(policy.eval(), make_batch(), 3)


@pytest.fixture
def make(tmp_path, tiny_paligemma_dir):
    """A checkpoint file with trained adapters, and what its policy predicts."""
    base = tmp_path / "base"
    shutil.copytree(tiny_paligemma_dir, base)

    def checkpoint(adapters_only: bool = False, **vlm) -> tuple[Path, torch.Tensor]:
        config = policy_config(base, tmp_path, model={"vlm_config": {"lora": {"rank": 4, "vision": True}, **vlm}})
        policy = make_policy(config)
        with torch.no_grad():  # as after training: no zero left that would hide an adapter
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        path = tmp_path / "lora.pth.tar"
        content = {**checkpoint_of(policy, config), **state_to_save(policy, adapters_only), "optimizer": {}}
        save_checkpoint(content, path)
        return path, predict(policy)

    return checkpoint


@pytest.mark.parametrize("adapters_only", [False, True])
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_merged_predicts_alike_without_peft(make, tmp_path, capsys, monkeypatch, adapters_only, quantization):
    path, wanted = make(adapters_only, quantization=quantization)
    output = tmp_path / "merged.pth.tar"
    arguments = ["--checkpoint_path", path, "--output", output]
    if adapters_only:  # the base has moved since
        (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(ConfigError, match="base"):
            run(*arguments)
        arguments += ["--model_name_or_path", tmp_path / "moved"]
    run(*arguments)
    assert f"{output}: " in capsys.readouterr().out
    merged = load_checkpoint(output)
    assert "optimizer" not in merged and not any("lora" in key or "base_layer" in key for key in merged["model"])
    assert merged["config"]["model"]["vlm_config"]["lora"] is None
    for package in ("peft", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    torch.testing.assert_close(predict(VLAModel.from_checkpoint(merged)), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_both_encoders_of_siglip_llm_whose_bases_have_moved(tmp_path, tiny_siglip_llm_dir, quantization):
    vlm = {
        "type": "siglip_llm",
        "vision_model_name_or_path": str(tiny_siglip_llm_dir / "siglip"),
        "language_model_name_or_path": str(tiny_siglip_llm_dir / "qwen2"),
        "fusion": {"hidden_dim": 32, "num_latents": 4, "num_layers": 1, "num_heads": 2},
        "lora": {"rank": 4, "vision": True, "language": True, "targets": ["q_proj", "v_proj"]},
        "quantization": quantization,
    }
    config = policy_config(tmp_path, tmp_path, model={"vlm_config": vlm})
    policy = make_policy(config)
    adapters = [name for name, _ in policy.named_parameters() if ".lora_A." in name]
    for tower in ("vision_tower", "language_model"):
        assert any(tower in name and "q_proj" in name for name in adapters)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    checkpoint = {**checkpoint_of(policy, config), **state_to_save(policy, True), "optimizer": {}}
    gone = {key: str(tmp_path / "gone") for key in vlm if key.endswith("_path")}
    checkpoint["config"]["model"]["vlm_config"] |= gone
    checkpoint["base"] |= {"folders": gone}
    save_checkpoint(checkpoint, tmp_path / "lora.pth.tar")
    arguments = ["--checkpoint_path", tmp_path / "lora.pth.tar", "--output", tmp_path / "merged.pth.tar"]
    with pytest.raises(ConfigError, match="gone"):
        run(*arguments)
    run(*arguments, *(part for key in gone for part in (f"--{key}", vlm[key])))
    merged = load_checkpoint(tmp_path / "merged.pth.tar")
    assert not any("lora" in name for name in merged["model"])
    tolerance = {"none": 1e-5, "4bit": 1e-5, "8bit": 0.05}[quantization]  # 8 bits round what they multiply as well
    torch.testing.assert_close(predict(VLAModel.from_checkpoint(merged)), predict(policy), atol=tolerance, rtol=1e-4)


def test_bfloat16_halves_the_merged_weights(make, tmp_path):
    path, wanted = make()
    run("--checkpoint_path", path, "--output", tmp_path / "m.pth.tar", "--dtype", "bfloat16")
    merged = load_checkpoint(tmp_path / "m.pth.tar")
    name = "backbone.backbone.language_model.layers.0.mlp.up_proj.weight"
    assert merged["model"][name].dtype == torch.bfloat16
    policy = VLAModel.from_checkpoint(merged)
    assert policy.state_dict()[name].dtype == torch.float32, "vlm_config.dtype of the tests: what frozen weights are in"
    torch.testing.assert_close(predict(policy), wanted, atol=0.05, rtol=0.05)


def test_averaged_weights_are_what_is_merged(make, tmp_path):
    path, _ = make()
    checkpoint = load_checkpoint(path)
    adapters = {key: value * 1.5 for key, value in checkpoint["model"].items() if ".lora_" in key}
    checkpoint = {key: value for key, value in checkpoint.items() if key != "format"}
    save_checkpoint({**checkpoint, "ema": {"updates": 3, "weights": adapters}}, tmp_path / "ema.pth.tar")
    averaged = load_checkpoint(tmp_path / "ema.pth.tar")
    run("--checkpoint_path", tmp_path / "ema.pth.tar", "--output", tmp_path / "m.pth.tar")
    merged = load_checkpoint(tmp_path / "m.pth.tar")
    assert "ema" not in merged
    wanted = predict(VLAModel.from_checkpoint(averaged))
    torch.testing.assert_close(predict(VLAModel.from_checkpoint(merged)), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_trained_before_the_merge_is_not_guessed(make, tmp_path, capsys, dtype):
    path, _ = make()
    run("--checkpoint_path", path, "--output", tmp_path / "m.pth.tar", "--dtype", dtype)
    assert diagnose_weights.main(["--checkpoint_path", str(tmp_path / "m.pth.tar")]) == 0
    assert "0 findings\n  (adapters were merged in: the run's own checkpoints tell" in capsys.readouterr().out


def test_a_merged_checkpoint_cannot_be_resumed(make, tmp_path):
    path, _ = make()
    run("--checkpoint_path", path, "--output", tmp_path / "m.pth.tar")
    with pytest.raises(
        ConfigError, match="holds weights alone, no optimizer.* state to go on with; .* --init_checkpoint"
    ):
        require_train_state(load_checkpoint(tmp_path / "m.pth.tar"), "m.pth.tar")


def test_refusals(make, tmp_path, tiny_paligemma_dir):
    path, _ = make(adapters_only=True)
    make_tiny_paligemma(tmp_path / "other", **TINY, seed=3)
    arguments = ["--checkpoint_path", path, "--output", tmp_path / "m.pth.tar"]
    with pytest.raises(CheckpointError, match="name the right base"):
        run(*arguments, "--model_name_or_path", tmp_path / "other")

    config = policy_config(tiny_paligemma_dir, tmp_path)
    save_checkpoint(checkpoint_of(make_policy(config), config), tmp_path / "plain.pth.tar")
    with pytest.raises(CheckpointError, match="nothing to merge: .*; use it as it is"):
        run("--checkpoint_path", tmp_path / "plain.pth.tar", "--output", tmp_path / "m.pth.tar")

    (tmp_path / "m.pth.tar").touch()
    with pytest.raises(CheckpointError, match="exists; choose another --output"):
        run(*arguments)


@pytest.mark.slow
def test_as_a_script(make, tmp_path):
    path, _ = make()
    command = [sys.executable, "scripts/merge_lora.py", "--output", str(tmp_path / "m.pth.tar"), "--checkpoint_path"]
    assert subprocess.run([*command, str(path)], capture_output=True, check=False).returncode == 0
    result = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
