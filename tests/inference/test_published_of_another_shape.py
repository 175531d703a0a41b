"""A pi0 of other sizes, cameras, widths and modes than the rest of the fixtures: in, acting, and out again.

Two cameras and a slot that no data has, states by their extremes, actions by the 10 % and 90 % quantiles, 12 and 14
padded dimensions, images of 28 px in patches of 7.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from inference.predictor import VLAPredictor
from inference.published import published_checkpoint
from inference.serving.export_published import export_published
from tests.pi_fixtures import FOLDER

HERE = FOLDER / "pi0_odd"
SETTINGS: dict[str, Any] = {"tokenizer_name_or_path": str(HERE / "tokenizer"), "vision_num_attention_heads": 3}


def test_actions_are_lerobots() -> None:
    predictor = VLAPredictor.from_pretrained(HERE / "policy", device="cpu", **SETTINGS)
    assert predictor.cameras == ("front", "wrist") and predictor.num_inference_steps == 8
    raw, found = (dict(np.load(HERE / f"{name}.npz")) for name in ("processors", "policy"))
    tasks = json.loads((HERE / "prompts.json").read_text())["tasks"]
    for row, task in enumerate(tasks):
        frames = {name: raw[f"raw_image_{i}"][row].transpose(1, 2, 0) for i, name in enumerate(predictor.cameras)}
        seen = {"prompt": task, "state": raw["raw_state"][row], "noise": found["noise"][row]}
        action = predictor.predict(images=frames, **seen)
        np.testing.assert_allclose(action, found["chunk_physical"][row], atol=2e-5, rtol=0)
        alone = predictor.predict(images={"wrist": frames["wrist"]}, **seen)
        state, index = torch.from_numpy(raw["raw_state"][row])[None], torch.zeros(1, dtype=torch.int64)
        normalized = predictor.model.normalizer.normalize_action(torch.from_numpy(alone)[None], state, index)[0]
        moving = [dim for dim in range(8) if dim != 1]  # the constant one has no width to be normalized by
        wanted = found["chunk_only_last_camera"][row][:, moving]
        np.testing.assert_allclose(normalized[:, moving].numpy(), wanted, atol=5e-5, rtol=0)


def test_the_folder_comes_back(tmp_path: Path) -> None:
    out = export_published(published_checkpoint(HERE / "policy", **SETTINGS), tmp_path / "out", "lerobot")
    for path in (HERE / "policy").iterdir():
        if path.suffix == ".json":
            assert json.loads((out / path.name).read_text()) == json.loads(path.read_text()), path.name
        else:
            wanted, found = load_file(path), load_file(out / path.name)
            assert wanted.keys() == found.keys()
            unread = {name for name in wanted if "gemma_expert.lm_head" in name}
            assert all(torch.equal(value, found[name]) for name, value in wanted.items() if name not in unread)
