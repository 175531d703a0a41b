"""Folders of published policies: what they say, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pi_fixtures import CAMERAS, KINDS, folder
from utils.policy_folder import (
    PolicyFolderError,
    is_policy_folder,
    read_norm_stats,
    read_policy_folder,
    read_weights,
)


@pytest.mark.parametrize("kind", KINDS)
def test_lerobots_folder(kind: str) -> None:
    policy = read_policy_folder(folder(kind) / "policy")
    mode = {"pi0": "mean_std", "pi05": "quantile"}[kind]
    assert (policy.layout, policy.declared, policy.cameras) == ("lerobot", kind, CAMERAS)
    assert (policy.state_dim, policy.action_dim, policy.horizon, policy.n_action_steps) == (8, 7, 10, 5)
    assert (policy.num_inference_steps, policy.prompt_max_len) == (10, {"pi0": 48, "pi05": 200}[kind])
    assert (policy.normalization, policy.arithmetic, policy.eps) == ({"state": mode, "action": mode}, "lerobot", 1e-8)
    assert set(policy.statistics["action"]) == {"min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99"}
    assert (policy.relative_action_dims, policy.image_size) == ((), (56, 56))
    assert is_policy_folder(folder(kind) / "policy")


@pytest.mark.parametrize("kind", KINDS)
def test_openpis_folder(kind: str) -> None:
    policy = read_policy_folder(folder(kind) / "openpi")
    assert (policy.layout, policy.declared, policy.cameras) == ("openpi", None, CAMERAS)
    assert (policy.state_dim, policy.action_dim, policy.horizon, policy.eps) == (8, 7, 10, 1e-6)
    assert set(policy.statistics["state"]) == {"mean", "std", "q01", "q99"}
    assert is_policy_folder(folder(kind) / "openpi") and not is_policy_folder(folder(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_what_older_versions_leave_unsaid_has_the_published_value(kind: str, tmp_path: Path) -> None:
    shutil.copytree(folder(kind) / "policy", tmp_path, dirs_exist_ok=True)
    unsaid = ("n_action_steps", "num_inference_steps", "image_resolution", "tokenizer_max_length", "chunk_size")
    _changed("config.json", lambda c: [c.pop(name) for name in unsaid])(tmp_path)
    policy = read_policy_folder(tmp_path)
    assert (policy.horizon, policy.n_action_steps, policy.num_inference_steps) == (50, 50, 10)
    assert (policy.prompt_max_len, policy.image_size) == ({"pi0": 48, "pi05": 200}[kind], None)


def test_relative_actions_by_name_of_joint(tmp_path: Path) -> None:
    shutil.copytree(folder("pi0") / "policy", tmp_path, dirs_exist_ok=True)
    shutil.copytree(folder("pi0") / "relative", tmp_path, dirs_exist_ok=True)
    assert read_policy_folder(tmp_path).relative_action_dims == (0, 1, 2, 3, 4, 5)


def test_another_robots_statistics(tmp_path: Path) -> None:
    path = tmp_path / "norm_stats.json"
    one = {"mean": [0.0] * 8, "std": [1.0] * 8}
    path.write_text(json.dumps({"norm_stats": {"state": one, "actions": {**one, "q01": None}}}))
    assert read_norm_stats(path) == {"state": one, "action": one}
    with pytest.raises(PolicyFolderError, match="statistics of another width: action.mean has 8 values, but .* has 7"):
        read_policy_folder(folder("pi0") / "policy", path)
    path.write_text('{"state": {"mean": [0]}}')
    with pytest.raises(PolicyFolderError, match="no statistics of 'actions'"):
        read_norm_stats(path)


def _changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(copy: Path) -> None:
        content = json.loads((copy / name).read_text())
        change(content)
        (copy / name).write_text(json.dumps(content))

    return apply


def _step(kind: str) -> dict[str, Any]:
    return {"registry_name": kind, "config": {}}


STATISTICS = "policy_preprocessor_step_6_normalizer_processor.safetensors"


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda copy: (copy / "config.json").unlink(), "config.json: No such file or directory; give the folder of"),
        (lambda copy: (copy / "config.json").write_text("{"), "config.json: no JSON"),
        (_changed("config.json", lambda c: c.update(type="act")), "type is 'act'; only pi0 and pi05 are read here"),
        (_changed("config.json", lambda c: c.pop("type")), "neither a LeRobot policy .* nor one of openpi"),
        (_changed("config.json", lambda c: c.pop("input_features")), "no input_features with types and shapes"),
        (_changed("config.json", lambda c: c.update(type="pi05")), "step pi05_prepare_state.* is missing|new_line"),
        (_changed("config.json", lambda c: c.update(use_visual_memory=True)), "use_visual_memory is on"),
        (_changed("config.json", lambda c: c.update(adapt_to_pi_aloha=True)), "adapt_to_pi_aloha is on"),
        (
            _changed("policy_preprocessor.json", lambda c: c["steps"].insert(2, _step("my_crop_processor"))),
            "policy_preprocessor.json: step 2 is 'my_crop_processor', whose effect is not known here",
        ),
        (
            _changed("policy_postprocessor.json", lambda c: c["steps"].append(_step("my_filter"))),
            "policy_postprocessor.json: step 3 is 'my_filter'",
        ),
        (lambda copy: (copy / "policy_preprocessor.json").unlink(), "policy_preprocessor.json: No such file"),
        (lambda copy: (copy / STATISTICS).unlink(), f"{STATISTICS}: no such file, though the pre-processor names it"),
        (lambda copy: (copy / STATISTICS).write_bytes(b"x" * 40), "no readable statistics"),
        (
            _changed(
                "policy_postprocessor.json", lambda c: c["steps"][0]["config"]["norm_map"].update(ACTION="MIN_MAX")
            ),
            "actions are normalized by MEAN_STD but unnormalized by MIN_MAX",
        ),
        (
            _changed("config.json", lambda c: c["output_features"]["action"].update(shape=[9])),
            "statistics of another width: action.* has 7 values, but config.json says that the action has 9",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, spoil: Callable[[Path], None], fault: str) -> None:
    copy = tmp_path / "policy"
    shutil.copytree(folder("pi0") / "policy", copy)
    spoil(copy)
    with pytest.raises(PolicyFolderError, match=fault):
        read_policy_folder(copy)


def test_a_truncated_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(PolicyFolderError, match="model.safetensors: no such file; download the policy again, whole"):
        read_weights(tmp_path)
    whole = (folder("pi0") / "policy" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PolicyFolderError, match=r"not a whole file of tensors \(\d+ bytes; .*\); download it again"):
        read_weights(tmp_path)


def test_openpi_needs_one_robots_statistics(tmp_path: Path) -> None:
    shutil.copytree(folder("pi0") / "openpi", tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "assets" / "tiny", tmp_path / "assets" / "other")
    with pytest.raises(PolicyFolderError, match="wanted one norm_stats.json, found assets/other.*; give --norm_stats"):
        read_policy_folder(tmp_path)
    assert read_policy_folder(tmp_path, tmp_path / "assets" / "tiny" / "norm_stats.json").action_dim == 7
    shutil.rmtree(tmp_path / "assets")
    with pytest.raises(PolicyFolderError, match="found none"):
        read_policy_folder(tmp_path)


def test_adapters_alone_are_no_policy(tmp_path: Path) -> None:
    shutil.copytree(folder("pi0") / "policy", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    assert is_policy_folder(tmp_path)
    with pytest.raises(PolicyFolderError, match="model.safetensors: no such file; download the policy again, whole"):
        read_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PolicyFolderError, match="adapters of PEFT alone.*merge them first"):
        read_weights(tmp_path)
