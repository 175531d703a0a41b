"""--sensitivity: what counts as a change, that only the change counts, and the files that come of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main_eval
from data.loader import open_dataset
from inference.occlusion import PATCHES, occlusion_map
from inference.predictor import VLAPredictor
from inference.sensitivity import SteadyPolicy, measure_sensitivity, spread_evenly
from model.action_head import ACTION_HEADS
from tests.helpers import episode_rows, write_episodes, write_rows
from tests.inference.checkpoints import train_tiny
from utils.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Three episodes with two cameras; the second is absent in the last one."""
    rows = [row for i in range(2) for row in episode_rows(6, seed=i, cameras=("image_1", "image_2"))]
    rows += [{**row, "image_2": None} for row in episode_rows(5, seed=2, cameras=("image_1", "image_2"))]
    return write_rows(tmp_path_factory.mktemp("demos") / "three.parquet", rows)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir, demos):
    """Two cameras, two frames of each, and weights that let everything through."""
    folder = tmp_path_factory.mktemp("run")
    vlm, data = {"use_aux_camera": True}, {"max_seq_len": 2}
    path = train_tiny(folder, tiny_paligemma_dir, [demos], vlm=vlm, data=data)
    content = load_checkpoint(path)
    del content["format"]
    generator = torch.Generator().manual_seed(0)
    for name, value in content["model"].items():
        if name.startswith("action_head."):
            value += 0.2 * torch.randn(value.shape, generator=generator)
    save_checkpoint(content, path)
    return path


def opened(path, demos, **settings):
    predictor = VLAPredictor.from_checkpoint(path, "cpu", **settings)
    processors = predictor.image_processor, predictor.prompt_tokenizer
    return predictor, {"demos": open_dataset(predictor.config, *processors, str(demos), "--eval_data_path")}


CAMERA_ROWS = {
    *(f"image_{i} {change}" for i in (1, 2) for change in ("blank", "frozen", "of another episode")),
    "image_1 and image_2 exchanged",
    "all cameras blank",
}


def test_every_part_has_its_row_and_only_where_it_is(checkpoint, demos):
    predictor, data = opened(checkpoint, demos)
    result = measure_sensitivity(predictor, data, 100, batch_size=4)
    rows = {row["change"]: row for row in result["rows"]}
    assert result["samples"] == 17
    assert {name for name, row in rows.items() if row["group"] == "camera"} == CAMERA_ROWS
    states = {f"state[{i}] at its mean" for i in range(4)} | {"whole state at its mean"}
    assert {name for name, row in rows.items() if row["group"] == "state"} == states
    words = {name for name, row in rows.items() if row["group"] == "instruction"}
    assert words == {"instruction exchanged", "instruction dropped"}
    # 12 samples have the second camera; an episode's first sample is as it was when frozen
    counts = {name: row["samples"] for name, row in rows.items()}
    assert counts["image_1 blank"] == 17 and counts["image_2 blank"] == 12 == counts["image_1 and image_2 exchanged"]
    assert counts["image_1 frozen"] == 14 and counts["image_2 frozen"] == 10
    for row in rows.values():
        assert len(row["per_step_in_spread"]) == len(row["per_step_in_variation"]) == 4
        # both units are those of the same change
        assert row["in_spread"] * result["spread"] == pytest.approx(row["in_variation"] * result["variation"])
    assert rows["image_1 blank"]["in_spread"] > 0


def test_the_batch_size_does_not_matter(checkpoint, demos):
    predictor, data = opened(checkpoint, demos)
    one, other = (measure_sensitivity(predictor, data, 7, batch_size=size) for size in (2, 7))
    for left, right in zip(one["rows"], other["rows"], strict=True):
        assert left["change"] == right["change"]
        assert left["in_spread"] == pytest.approx(right["in_spread"], rel=1e-3)


def test_no_change_moves_nothing(checkpoint, demos):
    """Blank images in place of blank images, a state that is at its mean already, but another instruction."""
    predictor, data = opened(checkpoint, demos)
    mean = predictor.model.statistics[0]["state"]["mean"]
    rows = [row for i in range(2) for row in episode_rows(4, seed=2 * i, cameras=("image_1", "image_2"))]
    grey = Image.new("RGB", (40, 40), (128,) * 3)
    path = demos.with_name("grey.parquet")
    grey.save(path.with_suffix(".png"))
    for row in rows:
        row |= {"image_1": path.with_suffix(".png").read_bytes(), "state": np.float32(mean).tolist()}
        row["image_2"] = row["image_1"]
    _, data = opened(checkpoint, write_rows(path, rows))
    result = measure_sensitivity(predictor, data, 8)
    moved = {row["change"]: row["in_spread"] for row in result["rows"]}
    words = {name for name in moved if name.startswith("instruction")}
    assert all(moved[name] == pytest.approx(0, abs=1e-4) for name in moved.keys() - words)
    assert min(moved[name] for name in words) > 1e-3


def test_a_kept_context_is_the_context_computed_again(checkpoint, demos):
    predictor, data = opened(checkpoint, demos)
    policy, batch = SteadyPolicy(predictor, 0), data["demos"].batch([1, 8])
    state = torch.randn(2, 4)
    noise = policy.noise([(0, 1), (0, 8)], 1)
    kept = policy.actions(policy.with_state(policy.context(batch), batch, state), noise)
    np.testing.assert_allclose(kept, policy.actions(policy.context({**batch, "state": state}), noise), atol=1e-6)


@pytest.mark.parametrize("head", [name for name in ACTION_HEADS if name != "flow_matching"])
def test_every_head(head, tmp_path, tiny_paligemma_dir):
    demos = write_episodes(tmp_path / "two.parquet", [4, 4])
    expert = {"expert": {"width": 32, "mlp_dim": 64, "num_heads": 4, "max_state_dim": 4, "max_action_dim": 4}}
    options = {"type": head, **(expert if head == "action_expert" else {})}
    predictor, data = opened(train_tiny(tmp_path, tiny_paligemma_dir, [demos], head=options), demos)
    result = measure_sensitivity(predictor, data, 4)
    assert (result["spread"] is None) == (not predictor.model.action_head.is_stochastic)
    for row in result["rows"]:
        assert row["in_variation"] is not None and (row["in_spread"] is None) == (result["spread"] is None)
    assert len(predictor.cameras) == 1 and {"image_1 blank", "image_1 of another episode"} <= {
        row["change"] for row in result["rows"]
    }


def test_the_other_backbone_and_a_policy_without_state(tmp_path, tiny_siglip_llm_dir):
    demos = write_episodes(tmp_path / "one.parquet", [5])
    vlm = {"type": "siglip_llm"}
    vlm |= {
        "vision_model_name_or_path": str(tiny_siglip_llm_dir / "siglip"),
        "language_model_name_or_path": str(tiny_siglip_llm_dir / "qwen2"),
    }
    head = {"use_state_input": False}
    predictor, data = opened(train_tiny(tmp_path, tiny_siglip_llm_dir, [demos], vlm=vlm, head=head), demos)
    result = measure_sensitivity(predictor, data, 5)
    changes = {row["change"] for row in result["rows"]}  # one episode, one instruction, no state
    assert changes == {"image_1 blank", "image_1 frozen", "instruction dropped"}


def test_samples_are_spread_over_all_data():
    assert [part.tolist() for part in spread_evenly([4, 6], 4)] == [[0, 3], [2, 5]]
    assert [part.tolist() for part in spread_evenly([2, 1], 9)] == [[0, 1], [0]]


def test_an_occlusion_map_covers_each_patch_once(checkpoint, demos):
    predictor, data = opened(checkpoint, demos)
    policy, batch = SteadyPolicy(predictor, 0), data["demos"].batch([2])
    found = occlusion_map(policy, batch, "image_2", (0, 2), 16)
    assert found.shape == (PATCHES, PATCHES) and found.min() >= 0 and found.max() > 0
    side = batch["image_2"].shape[-1] // PATCHES
    row, column = divmod(int(found.argmax()), PATCHES)
    images = batch["image_2"].clone()
    images[..., row * side : (row + 1) * side, column * side : (column + 1) * side] = 128
    noise = policy.noise([(0, 2)], 1)
    before, after = (
        policy.actions(policy.context(seen), noise)[0, 0] for seen in (batch, {**batch, "image_2": images})
    )
    assert found.max() == pytest.approx(np.sqrt(np.square(after - before).mean()), rel=1e-3)


def test_main_eval_writes_table_json_and_pictures(checkpoint, demos, tmp_path, capsys):
    flags = ["--checkpoint_path", str(checkpoint), "--eval_data_path", str(demos), "--output_dir", str(tmp_path)]
    flags += ["--device", "cpu", "--num_workers", "0", "--num_plots", "0"]
    main_eval.main([*flags, "--sensitivity", "5", "--num_maps", "2"])
    printed = capsys.readouterr().out
    assert "5 observations" in printed and "whole state at its mean" in printed
    found = json.loads((tmp_path / "sensitivity.json").read_text())
    assert found["samples"] == 5 and len(found["maps"]) == 3  # the last frame's second camera is absent
    for entry in found["maps"]:
        assert entry["camera"] in ("image_1", "image_2") and {"episode", "row", "largest"} <= entry.keys()
        with Image.open(tmp_path / entry["image"]) as picture:
            assert picture.width > 600
    main_eval.main([*flags, "--sensitivity", "4", "--num_maps", "0"])
    assert (tmp_path / "sensitivity_1.json").is_file()  # of other observations: kept
    for words, message in (
        (["--num_maps", "2"], "--num_maps draws the maps of --sensitivity; give that as well"),
        (["--sensitivity", "0"], "--sensitivity is 0; give 1 or more"),
    ):
        with pytest.raises(SystemExit):
            main_eval.main([*flags, *words])
        assert message in capsys.readouterr().err
