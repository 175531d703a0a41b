"""The batch contract: what a loader gives is what the type names, and an example of it runs."""

from __future__ import annotations

import pytest
import torch

from data.loader import VLADataset, make_loader
from data.processing import processors_from_config
from tests.helpers import write_episodes
from tests.policies import IMAGE_SIZE, make_policy, policy_config
from utils.batch import Batch, example_batch

ENGINE_KEYS = {"prompt_embeds", "image_slots", "noise"}


@pytest.mark.parametrize("cameras", [("image_1",), ("image_1", "image_2")])
def test_an_example_is_what_a_loader_gives(tmp_path, tiny_paligemma_dir, cameras):
    vlm = {"use_aux_camera": len(cameras) == 2}
    data = {"max_seq_len": 2, "cache_dir": str(tmp_path / "cache")}
    config = policy_config(tiny_paligemma_dir, tmp_path, model={"vlm_config": vlm}, data=data)
    head = config.model.action_head_config
    images, tokenizer = processors_from_config(config)
    dataset = VLADataset(
        [write_episodes(tmp_path / "a.parquet", [5], cameras=cameras)],
        config.data,
        horizon=head.horizon,
        per_action_dim=head.per_action_dim,
        cameras=config.cameras,
        image_processor=images,
        prompt_tokenizer=tokenizer,
    )
    loaded = next(iter(make_loader(dataset, num_workers=0, batch_size=3)))
    length = loaded["input_ids"].shape[1]
    example = example_batch(config, image_size=IMAGE_SIZE, batch_size=3, text_len=length)
    assert example.keys() == loaded.keys()
    assert example.keys() == Batch.__annotations__.keys() - ENGINE_KEYS - ({"image_2"} - set(cameras))
    for key, value in example.items():
        if key == "raw_prompt_text":
            assert len(value) == len(loaded[key]) == 3 and all(type(text) is str for text in value + loaded[key])
        else:
            assert (value.shape, value.dtype) == (loaded[key].shape, loaded[key].dtype), key


def test_an_example_reaches_the_whole_model(tmp_path, tiny_paligemma_dir):
    config = policy_config(tiny_paligemma_dir, tmp_path)
    policy = make_policy(config)
    loss = policy(example_batch(config, image_size=policy.backbone.image_size))
    assert loss.shape == (1, 4) and torch.isfinite(loss).all() and (loss > 0).all()
