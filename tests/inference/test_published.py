"""Published pi0 and pi0.5 policies through VLAPredictor, against LeRobot's actions, and what is wrong with a folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.processing import ObservationError
from inference.predictor import VLAPredictor
from inference.published import published_checkpoint
from inference.serving.export_published import export_published
from tests.pi_fixtures import CAMERAS, KINDS, arrays, folder, plain
from utils.checkpoint import CheckpointError
from utils.config_utils import ConfigError, config_from_dict
from utils.policy_folder import PolicyFolderError

both = pytest.mark.parametrize("kind", KINDS)


def load(kind: str, place: Path | None = None, **options: Any) -> VLAPredictor:
    settings = {"tokenizer_name_or_path": str(folder(kind) / "tokenizer"), "vision_num_attention_heads": 2}
    return VLAPredictor.from_pretrained(place or folder(kind) / "policy", device="cpu", **(settings | options))


def observation(kind: str, row: int, cameras: tuple[str, ...] = CAMERAS) -> dict[str, Any]:
    raw = arrays(kind, "processors")
    frames = {name: raw[f"raw_image_{i}"][row].permute(1, 2, 0).numpy() for i, name in enumerate(CAMERAS)}
    return {
        "images": {camera: frames[camera] for camera in cameras},
        "prompt": plain(kind, "prompts.json")["tasks"][row],
        "state": raw["raw_state"][row].numpy(),
    }


@both
def test_actions_are_lerobots(kind: str) -> None:
    predictor, found = load(kind), arrays(kind, "policy")
    for row in range(3):
        noise = found["noise"][row].numpy()
        action = predictor.predict(**observation(kind, row), noise=noise)
        np.testing.assert_allclose(action, found["chunk_physical"][row].numpy(), atol=2e-5, rtol=0)
    assert (predictor.horizon, predictor.per_action_dim, predictor.n_action_steps) == (10, 7, 5)
    assert predictor.cameras == CAMERAS


@both
def test_one_camera_of_three(kind: str) -> None:
    predictor, found = load(kind), arrays(kind, "policy")
    normalizer = predictor.model.normalizer
    index = torch.zeros(1, dtype=torch.int64)
    for row in range(3):
        seen = observation(kind, row, CAMERAS[-1:])
        action = torch.from_numpy(predictor.predict(**seen, noise=found["noise"][row].numpy()))[None]
        normalized = normalizer.normalize_action(action, torch.from_numpy(seen["state"])[None], index)
        wanted = found["chunk_only_last_camera"][row].clone()
        normalized[..., 1], wanted[..., 1] = 0, 0  # a constant dimension, whose width is 0
        torch.testing.assert_close(normalized[0], wanted, atol=5e-5, rtol=0)


@both
def test_tokens_states_and_images_are_lerobots(kind: str) -> None:
    predictor, found = load(kind), arrays(kind, "processors")
    for row in range(3):
        sample = predictor.observation(**observation(kind, row))
        length = int(found["token_mask"][row].sum())
        assert sample["input_ids"].tolist() == found["tokens"][row][:length].tolist()
        for i, camera in enumerate(CAMERAS):
            assert torch.equal((sample[camera][0] - 0.5) / 0.5, found[f"image_{i}"][row])
        index = torch.zeros(1, dtype=torch.int64)
        state = predictor.model.normalizer.normalize_state(sample["state"][None], index)[0]
        assert torch.equal(state, found["state_normalized"][row])


@both
def test_relative_actions_are_lerobots(kind: str, tmp_path: Path) -> None:
    shutil.copytree(folder(kind) / "policy", tmp_path, dirs_exist_ok=True)
    shutil.copytree(folder(kind) / "relative", tmp_path, dirs_exist_ok=True)
    normalizer = load(kind, tmp_path).model.normalizer
    raw, found, index = arrays(kind, "processors"), arrays(kind, "relative"), torch.zeros(3, dtype=torch.int64)
    normalized = normalizer.normalize_action(raw["raw_action"], raw["raw_state"], index)
    assert torch.equal(normalized, found["action_normalized"])
    physical = normalizer.denormalize_action(found["post_in"], raw["raw_state"], index)
    torch.testing.assert_close(physical, found["post_out"], atol=1e-6, rtol=0)


@both
def test_openpis_layout(kind: str) -> None:
    predictor = load(kind, folder(kind) / "openpi", use_amp=False)
    data = predictor.config.data
    assert (data.image_fit, data.normalization_arithmetic, data.normalization_eps) == ("pad_bytes", "openpi", 1e-6)
    assert data.prompt_format == {"pi0": "openpi_pi0", "pi05": "pi05"}[kind]
    assert data.normalization_type == {"pi0": "mean_std", "pi05": "quantile"}[kind]
    action = predictor.predict(**observation(kind, 0), seed=0)
    assert action.shape == (10, 7) and np.isfinite(action).all()
    # The model itself is compared with LeRobot's reading of these weights in tests/model/test_action_expert.py.


def test_seed_and_noise() -> None:
    predictor = load("pi0")
    seen = observation("pi0", 0)
    noise = predictor.model.draw_noise([[7]], 10)[0, 0].numpy()
    assert noise.shape == (10, 32)
    np.testing.assert_array_equal(predictor.predict(**seen, seed=7), predictor.predict(**seen, noise=noise))
    with pytest.raises(ValueError, match="seed and noise both say where sampling starts"):
        predictor.predict(**seen, seed=7, noise=noise)
    with pytest.raises(ValueError, match=r"noise has shape \(10, 7\); this policy takes \(10, 32\)"):
        predictor.predict(**seen, noise=noise[:, :7])


def test_cameras_by_name() -> None:
    predictor = load("pi0")
    seen = observation("pi0", 0)
    with pytest.raises(
        ObservationError, match="has no camera 'wrist'; it reads base_0_rgb, left_wrist_0_rgb, right_wri"
    ):
        predictor.predict(**{**seen, "images": {"wrist": seen["images"]["base_0_rgb"]}})
    with pytest.raises(ObservationError, match="no image: the policy reads base_0_rgb"):
        predictor.predict(**{**seen, "images": {}})
    first, second, _ = seen.pop("images").values()
    with pytest.raises(ObservationError, match="images and images_1 or images_2 both give base_0_rgb; give it once"):
        predictor.predict(first, images={"base_0_rgb": first}, **seen)
    by_place = predictor.predict(first, second, seed=1, **seen)
    by_name = predictor.predict(images={"base_0_rgb": first, "left_wrist_0_rgb": second}, seed=1, **seen)
    np.testing.assert_array_equal(by_place, by_name)


@both
def test_compiled_prediction_is_the_same(kind: str) -> None:
    seen = observation(kind, 1, CAMERAS[:2])
    wanted = load(kind).predict(**seen, seed=3)
    torch.compiler.reset()
    predictor = load(kind)
    function = torch.compile(predictor.model.act, backend="eager", dynamic=False)
    noise = predictor.model.draw_noise([[3]], 10)
    batch = predictor.engine.prepared({**predictor.observe(**seen), "noise": noise})
    np.testing.assert_allclose(function(batch, 10)[0, 0].numpy(), wanted, atol=1e-5, rtol=1e-5)


# --- folders that can't be used


def copied(kind: str, place: Path) -> Path:
    return Path(shutil.copytree(folder(kind) / "policy", place / "policy"))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = copied("pi0", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(PolicyFolderError, match="model.safetensors: not a whole file of tensors"):
        load("pi0", path.parent)


def test_a_pi05_declared_pi0(tmp_path: Path) -> None:
    place = copied("pi0", tmp_path)
    shutil.copy(folder("pi05") / "policy" / "model.safetensors", place)
    with pytest.raises(PolicyFolderError, match="declared as pi0, but its tensors are those of pi05"):
        load("pi0", place)
    with pytest.raises(PolicyFolderError, match="config.json says type pi0, asked for pi05"):
        published_checkpoint(folder("pi0") / "policy", variant="pi05")
    with pytest.raises(PolicyFolderError, match="declared as pi05, but its tensors are those of pi0 "):
        published_checkpoint(folder("pi0") / "openpi", variant="pi05")


def test_statistics_of_another_width(tmp_path: Path) -> None:
    place = copied("pi0", tmp_path)
    path = place / "policy_preprocessor_step_6_normalizer_processor.safetensors"
    save_file({**load_file(path), "action.mean": torch.zeros(6)}, path)
    with pytest.raises(PolicyFolderError, match="statistics of another width: action.mean has 6 values, but .* has 7"):
        load("pi0", place)


def test_missing_statistics(tmp_path: Path) -> None:
    place = copied("pi05", tmp_path)
    path = place / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "q01" not in key}, path)
    with pytest.raises(PolicyFolderError, match="states are normalized by quantile, but the folder has no q01 of them"):
        load("pi05", place)
    numbers = {"mean": [0.0] * 8, "std": [1.0] * 8, "q01": [-1.0] * 8, "q99": [1.0] * 8}
    actions = {key: values[:7] for key, values in numbers.items()}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": numbers, "actions": actions}}))
    assert load("pi05", place, norm_stats=tmp_path / "norm_stats.json").model.statistics[0]["state"]["q99"] == [1.0] * 8


def test_another_resolution_and_other_heads(tmp_path: Path) -> None:
    place = copied("pi0", tmp_path)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "image_resolution": [224, 224]}))
    with pytest.raises(
        PolicyFolderError, match=re.escape("image_resolution [224, 224], but the tensors are those of 56")
    ):
        load("pi0", place)
    with pytest.raises(PolicyFolderError, match="vision_num_attention_heads is 5, which does not divide .* width 32"):
        load("pi0", vision_num_attention_heads=5)


def test_no_policy_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no policy.json in it"):
        VLAPredictor.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="norm_stats is for folders of LeRobot's and openpi's pi0 and pi0.5 policies"):
        VLAPredictor.from_pretrained(tmp_path, device="cpu", norm_stats="x")


def test_renamed_cameras_and_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    place = copied("pi0", tmp_path)
    path = place / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    content["steps"][0]["config"]["rename_map"] = {"observation.images.front": "observation.images.base_0_rgb"}
    path.write_text(json.dumps(content))
    shutil.copytree(folder("pi0") / "tokenizer", place / "tokenizer")
    predictor = load("pi0", place, tokenizer_name_or_path=None)
    assert predictor.cameras == ("front", *CAMERAS[1:])
    found, seen = arrays("pi0", "policy"), observation("pi0", 0)
    seen["images"]["front"] = seen["images"].pop("base_0_rgb")
    action = predictor.predict(**seen, noise=found["noise"][0].numpy())
    np.testing.assert_allclose(action, found["chunk_physical"][0].numpy(), atol=2e-5, rtol=0)


def test_a_state_that_nothing_reads_is_refused() -> None:
    expert = {"type": "action_expert", "expert": {"state_token": False}}
    with pytest.raises(
        ConfigError, match="state_token is false and data.prompt_format paligemma does not say the state"
    ):
        config_from_dict({"model": {"action_head_config": expert}})
    with pytest.raises(ConfigError, match="prompt_format is pi05, .*use_state_input is false"):
        config_from_dict(
            {"data": {"prompt_format": "pi05"}, "model": {"action_head_config": {"use_state_input": False}}}
        )


def test_a_camera_without_the_usual_prefix_comes_back(tmp_path: Path) -> None:
    place = copied("pi0", tmp_path)
    for name in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        path = place / name
        path.write_text(path.read_text().replace("observation.images.base_0_rgb", "observation.image"))
    predictor = load("pi0", place)
    assert predictor.cameras == ("observation.image", *CAMERAS[1:])
    settings = {"tokenizer_name_or_path": str(folder("pi0") / "tokenizer"), "vision_num_attention_heads": 2}
    out = export_published(published_checkpoint(place, **settings), tmp_path / "out", "lerobot")
    assert json.loads((out / "config.json").read_text()) == json.loads((place / "config.json").read_text())
