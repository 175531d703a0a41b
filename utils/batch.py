"""The batch: all that passes from data to the model, in training, evaluation and serving alike.

Shape letters: B batch, S observation frames (max_seq_len), V cameras, L text tokens, T horizon, A per_action_dim,
E embedding width, K draws.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from utils.config_utils import Config


class Batch(TypedDict, total=False):
    """Tensors of one batch by name; a dict at run time.

    The images are one key per camera, with the names that `Config.cameras` gives, in slot order; the two names of
    the standard schema stand for them here. With `data.image_fit` pad they are float32 from 0 to 1 instead of uint8.
    A sample is a batch of one without its first axis. Actions are absent where none are known (serving), and the last
    three keys are there only when an inference engine has added them.
    """

    image_1: Tensor  # uint8 (B, S, 3, H, W): frames up to and including now, oldest first; resized, not rescaled
    image_2: Tensor  # the same of a second camera; zeros where it is absent
    image_mask: Tensor  # bool (B, V): False where that camera is absent; its slot stays and costs no vision pass
    vlm_attention_mask: Tensor  # bool (B, S): False for frames before the episode's start
    raw_prompt_text: list[str]  # B instructions as written
    input_ids: Tensor  # int64 (B, L): the backbone's prompt format, padded on the right to the longest
    prompt_mask: Tensor  # bool (B, L): False on that padding
    state: Tensor  # float32 (B, state_dim), physical units
    action: Tensor  # float32 (B, T, A): the next T actions from now, physical units
    action_is_pad: Tensor  # bool (B, T): True past the episode's end; no metric there, see `steps_with_loss`
    dataset_index: Tensor  # int64 (B,): which dataset's statistics apply
    episode_index: Tensor  # int64 (B,): with frame_index where the sample came from, so that errors can name it
    frame_index: Tensor  # int64 (B,): step within the episode
    prompt_embeds: Tensor  # (B, L, E): `backbone.embed_prompt` of input_ids, which is then not read
    image_slots: Tensor  # int64 (N,): which of the flattened B * S * V slots hold an image, ascending
    noise: Tensor  # (K, B, ...): what `VLAModel.draw_noise` drew


def steps_with_loss(batch: Batch, config: Config) -> Tensor:
    """Which action steps have a loss, bool (B, T): those that are not padded.

    With `loss_over_padding` all do, except in samples of nothing but padding, which only fill a batch.
    """
    is_pad_BT = batch["action_is_pad"]
    if not config.model.action_head_config.trains_over_padding:
        return ~is_pad_BT
    return (~is_pad_BT.all(dim=1, keepdim=True)).expand_as(is_pad_BT)


def example_batch(
    config: Config, *, image_size: int, batch_size: int = 1, text_len: int = 2, device: torch.device | str = "cpu"
) -> Batch:
    """A batch of the right names, shapes and types that holds nothing: black images of every camera, zeros elsewhere.

    Args:
        config: of the policy; decides cameras, frames, and the sizes of states and actions.
        image_size: height and width of the images, in pixels.
        batch_size: B.
        text_len: L, tokens of every prompt.
        device: where the tensors are made.

    Returns:
        All keys but those that an engine adds; every camera, frame, token and action step exists, so that all parts
        of a model are reached.
    """
    head, cameras, frames = config.model.action_head_config, config.cameras, config.data.max_seq_len

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

    pixel_type = torch.float32 if config.data.image_fit == "pad" else torch.uint8

    def images() -> Tensor:  # laid out in memory as decoders write them, for compiled code is made for one layout
        return zeros(frames, image_size, image_size, 3, dtype=pixel_type).permute(0, 1, 4, 2, 3)

    batch: Batch = {camera: images() for camera in cameras}
    batch |= {
        "image_mask": ~zeros(len(cameras), dtype=torch.bool),
        "vlm_attention_mask": ~zeros(frames, dtype=torch.bool),
        "raw_prompt_text": [""] * batch_size,
        "input_ids": zeros(text_len, dtype=torch.int64),
        "prompt_mask": ~zeros(text_len, dtype=torch.bool),
        "state": zeros(config.data.state_dim),
        "action": zeros(head.horizon, head.per_action_dim),
        "action_is_pad": zeros(head.horizon, dtype=torch.bool),
        "dataset_index": zeros(dtype=torch.int64),
        "episode_index": zeros(dtype=torch.int64),
        "frame_index": zeros(dtype=torch.int64),
    }
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; what is no tensor stays as it is."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }
