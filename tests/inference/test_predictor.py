"""VLAPredictor on real small checkpoints: the same tensors as training, determinism, and its errors."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.loader import VLADataset, collate_fn
from data.processing import ObservationError
from inference.predictor import VLAPredictor
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from utils.checkpoint import CheckpointError

STATE = [0.1, -0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_episodes(tmp_path_factory.mktemp("demos") / "two.parquet", [6, 5], cameras=("image_1", "image_2"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir, demos):
    return train_tiny(tmp_path_factory.mktemp("run"), tiny_paligemma_dir, [demos])


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return VLAPredictor.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory, tiny_paligemma_dir, demos):
    """A checkpoint that reads two cameras and two frames of each."""
    folder = tmp_path_factory.mktemp("run2")
    return train_tiny(folder, tiny_paligemma_dir, [demos], vlm={"use_aux_camera": True}, data={"max_seq_len": 2})


def dataset_of(predictor, files):
    return VLADataset(
        files,
        predictor.config.data,
        horizon=predictor.horizon,
        per_action_dim=predictor.per_action_dim,
        cameras=predictor.cameras,
        image_processor=predictor.image_processor,
        prompt_tokenizer=predictor.prompt_tokenizer,
    )


@torch.no_grad()
def context(predictor, batch):
    """What the action head sees of a batch, in the precision of a prediction."""
    with predictor.model.autocast():
        return predictor.model.encode(predictor.engine.prepared(batch))


def frame(seed=0, size=40):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_serving_equals_training(predictor, demos):
    dataset = dataset_of(predictor, [demos])
    batch = collate_fn([dataset[i] for i in range(len(dataset))])  # prompts of two lengths: padding is in play
    trained = context(predictor, batch)
    for i in range(len(dataset)):
        prompt, state = dataset.store.prompt(i), np.array(dataset.store.state[i])
        served = context(predictor, predictor.observe(dataset.store.image("image_1", i), prompt=prompt, state=state))
        length = served.mask_BL.shape[1]
        assert torch.equal(served.mask_BL[0], trained.mask_BL[i, :length]) and not trained.mask_BL[i, length:].any()
        valid = served.mask_BL[0]
        torch.testing.assert_close(served.tokens_BLE[0, valid], trained.tokens_BLE[i, :length][valid])
        assert torch.equal(served.state_BS[0], trained.state_BS[i])


def test_serving_equals_training_with_two_cameras_and_history(two_cameras, demos):
    predictor = VLAPredictor.from_checkpoint(two_cameras, device="cpu")
    dataset = dataset_of(predictor, [demos])
    for row, rows in ((0, [0]), (3, [2, 3]), (6, [6]), (7, [6, 7])):  # 6 is the first step of the second episode
        trained = context(predictor, collate_fn([dataset[row]]))
        images = [[dataset.store.image(camera, i) for i in rows] for camera in predictor.cameras]
        prompt, state = dataset.store.prompt(row), np.array(dataset.store.state[row])
        served = context(predictor, predictor.observe(*images, prompt=prompt, state=state))
        assert torch.equal(served.mask_BL, trained.mask_BL)
        torch.testing.assert_close(served.tokens_BLE[served.mask_BL], trained.tokens_BLE[trained.mask_BL])


def test_the_file_alone_is_enough(checkpoint, predictor, tmp_path, monkeypatch):
    alone = shutil.copy(checkpoint, tmp_path / "policy.pth.tar")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    moved = VLAPredictor.from_checkpoint(alone, device="cpu")
    args = {"prompt": "press the button", "state": STATE, "seed": 3}
    np.testing.assert_array_equal(moved.predict(frame(), **args), predictor.predict(frame(), **args))


def test_prediction_is_float32_and_repeatable(predictor):
    first = predictor.predict(frame(), prompt="press the button", state=STATE, seed=3)
    assert first.shape == (4, 4) and first.dtype == np.float32 and np.isfinite(first).all()
    again = predictor.predict(frame(), prompt="press the button", state=STATE, seed=3)
    other = predictor.predict(frame(), prompt="press the button", state=STATE, seed=4)
    np.testing.assert_array_equal(again, first)
    assert not np.allclose(other, first)


def test_noise_does_not_depend_on_the_batch(predictor, demos):
    dataset = dataset_of(predictor, [demos])
    together = predictor.predict_batch(collate_fn([dataset[i] for i in range(8)]), seeds=range(8))
    for i in (0, 7):
        alone = predictor.predict_batch(collate_fn([dataset[i]]), seeds=[i])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_image_forms_agree(predictor, tmp_path):
    pixels = frame()
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    forms = [pixels, pixels[None], [pixels], Image.fromarray(pixels), tmp_path / "frame.png"]
    forms += [str(tmp_path / "frame.png"), (tmp_path / "frame.png").read_bytes()]
    forms += [bytearray(forms[-1]), io.BytesIO(forms[-1]), np.frombuffer(forms[-1], np.uint8)]
    tensor = torch.from_numpy(pixels)
    forms += [tensor, tensor[None], tensor.permute(2, 0, 1), tensor.permute(2, 0, 1)[None], pixels.transpose(2, 0, 1)]
    forms += [tensor.permute(2, 0, 1) / 255, tensor.double() / 255, (pixels / 255).astype(np.float32)]
    actions = [predictor.predict(form, prompt="press the button", state=STATE, seed=0) for form in forms]
    assert all(np.array_equal(action, actions[0]) for action in actions)


def test_steps_and_precision_can_be_chosen(checkpoint, predictor):
    assert (predictor.num_inference_steps, predictor.n_action_steps) == (3, 2)  # the checkpoint's
    args = {"prompt": "press the button", "state": STATE, "seed": 0}
    other = VLAPredictor.from_checkpoint(checkpoint, "cpu", use_amp=True, num_inference_steps=5, n_action_steps=4)
    assert (other.num_inference_steps, other.n_action_steps) == (5, 4)
    batch = predictor.observe(frame(), prompt="press the button", state=STATE)
    rounded, exact = context(other, batch).tokens_BLE, context(predictor, batch).tokens_BLE
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded.float(), exact, atol=0.2, rtol=0)
    five_steps = predictor.predict(frame(), **args, num_inference_steps=5)
    assert not np.allclose(five_steps, predictor.predict(frame(), **args))
    np.testing.assert_allclose(other.predict(frame(), **args), five_steps, atol=0.2)  # bfloat16 against float32
    with pytest.raises(ValueError, match="n_action_steps is 5, but the policy predicts a horizon of 4"):
        VLAPredictor.from_checkpoint(checkpoint, "cpu", n_action_steps=5)
    with pytest.raises(ValueError, match="num_inference_steps is 0; it must be positive"):
        VLAPredictor.from_checkpoint(checkpoint, "cpu", num_inference_steps=0)


def test_every_setting_of_inference_can_be_given_by_name(checkpoint, predictor):
    given = {"execution": "rtc", "latency_steps": 1, "guidance_steps": 2, "accuracy_threshold": 0.5}
    other = VLAPredictor.from_checkpoint(checkpoint, "cpu", **given, n_action_steps=None)
    assert other.settings == dataclasses.replace(predictor.settings, **given)  # None: as the checkpoint says
    assert other.config == predictor.config
    for wrong, message in (
        (
            {"num_inference_step": 3},
            "unknown key inference.num_inference_step; did you mean inference.num_inference_steps",
        ),
        ({"compile": "fast"}, "inference.compile is 'fast'; choose from none, default, max-autotune, cuda_graph"),
        ({"latency_steps": 1.5}, "inference.latency_steps is 1.5 .float.; wanted a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            VLAPredictor.from_checkpoint(checkpoint, "cpu", **wrong)


def test_without_a_seed_torch_s_global_generator_decides(predictor):
    args = {"prompt": "press the button", "state": STATE}
    torch.manual_seed(1)
    first, second = (predictor.predict(frame(), **args) for _ in range(2))
    torch.manual_seed(1)
    np.testing.assert_array_equal(predictor.predict(frame(), **args), first)
    assert not np.allclose(first, second)


def test_more_steps_than_noise_levels_are_refused_when_the_policy_loads(tmp_path, tiny_paligemma_dir, demos):
    head = {"type": "diffusion", "denoiser": "transformer", "num_train_timesteps": 20}
    path = train_tiny(tmp_path, tiny_paligemma_dir, [demos], head=head)
    with pytest.raises(ValueError, match="num_inference_steps is 21; this diffusion head was trained on 20"):
        VLAPredictor.from_checkpoint(path, "cpu", num_inference_steps=21)


def test_missing_second_camera_is_masked_with_one_warning(two_cameras, caplog):
    predictor = VLAPredictor.from_checkpoint(two_cameras, device="cpu")
    args = {"prompt": "press the button", "state": STATE}
    with caplog.at_level(logging.WARNING, "inference.predictor"):
        batch = predictor.observe(frame(), **args)
        predictor.observe(frame(), **args)
    assert batch["image_mask"].tolist() == [[True, False]]
    assert [record.message for record in caplog.records] == [
        "this policy was trained with image_2, which is missing: its slot is masked"
    ]
    with pytest.raises(ObservationError, match="image_2: 1 frames but image_1 has 2"):
        predictor.observe([frame(), frame()], [frame()], **args)


def test_of_more_frames_the_newest_are_used_with_one_warning(two_cameras, caplog):
    predictor = VLAPredictor.from_checkpoint(two_cameras, device="cpu")
    args = {"prompt": "press the button", "state": STATE, "seed": 0}
    frames, wrist = [frame(i) for i in range(4)], [frame(i) for i in range(4, 8)]
    wanted = predictor.predict(frames[-2:], wrist[-2:], **args)
    for _ in range(2):
        np.testing.assert_array_equal(
            predictor.predict(np.stack(frames), torch.tensor(np.stack(wrist)), **args), wanted
        )
    assert caplog.text.count("4 frames, of which the policy takes max_seq_len 2: the newest (last) are used") == 1
    with pytest.raises(ObservationError, match="image_1: 0 frames; wanted 1 to max_seq_len 2"):
        predictor.predict([], [], **args)


def test_a_state_far_from_the_training_data_is_warned_about_once(checkpoint, caplog):
    predictor = VLAPredictor.from_checkpoint(checkpoint, device="cpu")
    statistics = predictor.model.statistics[0]["state"]
    low, high = np.array(statistics["min"]), np.array(statistics["max"])
    for state in (low, high, high + 0.2 * (high - low)):
        predictor.observe(frame(), prompt="press the button", state=state)
    assert not caplog.text
    for factor in (1000, 57.3):
        predictor.observe(frame(), prompt="press the button", state=factor * high)
    assert caplog.text.count("check the units") == 1
    assert re.search(r"state\[\d\] is \S+, in training it was \S+ to \S+ \(3 more dimensions", caplog.text)
    warnings = {}
    state = np.where(np.arange(4) == 2, -9, low)
    predictor.observation(frame(), prompt="press the button", state=state, warnings=warnings)
    assert warnings["state"].startswith(
        f"state[2] is -9, in training it was {low[2]:g} to {high[2]:g}: check the units"
    )


def test_a_wrong_number_of_seeds_or_samples(predictor):
    sample = predictor.observation(frame(), prompt="press the button", state=STATE)
    batch = collate_fn([sample] * 3)
    with pytest.raises(ObservationError, match="2 seeds for a batch of 3 samples; give one for each"):
        predictor.predict_batch(batch, [0, 1])
    for seed in (-1, 2**63, 0.5, "0", True):
        with pytest.raises(ObservationError, match="seed is .*; wanted a whole number, 0 or more and below 2"):
            predictor.predict_batch(batch, [0, 1, seed])
    with pytest.raises(ObservationError, match="an empty batch: collate_fn was given no sample"):
        predictor.predict_batch(collate_fn([]), [])
    empty = {key: value[:0] for key, value in batch.items()}
    with pytest.raises(ObservationError, match="an empty batch: there is no sample to predict for"):
        predictor.predict_batch(empty, [])
    with pytest.raises(ObservationError, match="num_inference_steps is 0; give 1 or more"):
        predictor.predict(frame(), prompt="press the button", state=STATE, num_inference_steps=0)


def test_surplus_second_camera_is_ignored_with_one_warning(predictor, caplog):
    with caplog.at_level(logging.WARNING, "inference.predictor"):
        with_it = predictor.predict(frame(), frame(1), prompt="press the button", state=STATE, seed=0)
    assert "trained on image_1 alone: image_2 is ignored" in caplog.text
    without = predictor.predict(frame(), prompt="press the button", state=STATE, seed=0)
    np.testing.assert_array_equal(with_it, without)


def test_bad_observations(predictor):
    good = {"prompt": "press the button", "state": STATE}
    for changed, message in (
        ({"state": STATE[:3]}, r"state has shape \(3,\), 3 values; this policy takes 4"),
        ({"state": None}, "state is missing; this policy takes 4 values"),
        ({"state": [0, 0, float("nan"), 0]}, r"state\[2\] is nan; every value must be a finite number"),
        ({"state": ["a"] * 4}, "state is a list of <U1; wanted 4 numbers"),
        ({"state": [[1], [1, 2]]}, "state is a list of object; wanted 4 numbers"),
        ({"prompt": " "}, "prompt is ' '; a policy needs an instruction"),
    ):
        with pytest.raises(ObservationError, match=message):
            predictor.predict(frame(), **{**good, **changed})
    with pytest.raises(ObservationError, match="image_1 is missing; give it, or another camera of image_1"):
        predictor.predict(None, **good)
    with pytest.raises(ObservationError, match="image_1: image: 5 bytes is no readable JPEG or PNG"):
        predictor.predict(b"12345", **good)
    with pytest.raises(ObservationError, match=r"array is uint8 \(0, 40, 3\); wanted uint8 \(H, W, 3\)"):
        predictor.predict(frame()[:0], **good)
    with pytest.raises(ObservationError, match="array is float64 with values from 0 to 255; floats are taken from 0"):
        predictor.predict(frame().astype(float), **good)
    with pytest.raises(ObservationError, match="prompt is a list; wanted the instruction as text"):
        predictor.predict(frame(), prompt=["press the button"], state=STATE)


def test_a_policy_without_state_input_needs_none(tmp_path, tiny_paligemma_dir, demos):
    path = train_tiny(tmp_path, tiny_paligemma_dir, [demos], head={"use_state_input": False})
    predictor = VLAPredictor.from_checkpoint(path, "cpu")
    without = predictor.predict(frame(), prompt="press the button", seed=0)
    with_one = predictor.predict(frame(), prompt="press the button", state=STATE, seed=0)
    np.testing.assert_array_equal(without, with_one)
    data = dataclasses.replace(predictor.config.data, action_mode="delta")
    predictor.config = dataclasses.replace(predictor.config, data=data)
    with pytest.raises(ObservationError, match="state is missing; this policy takes 4 values"):
        predictor.predict(frame(), prompt="press the button", seed=0)  # deltas of what?


def test_missing_and_truncated_checkpoints(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        VLAPredictor.from_checkpoint(tmp_path / "nothing.pth.tar")
    (tmp_path / "half.pth.tar").write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a whole checkpoint.*truncated"):
        VLAPredictor.from_checkpoint(tmp_path / "half.pth.tar")


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_a_folder_of_checkpoints_is_none_of_them(tmp_path, inside):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    for name in ("checkpoint_epoch_1", "model_best"):
        (folder / f"{name}.pth.tar").touch()
    first = f"{inside}/model_best" if inside else "model_best"
    with pytest.raises(CheckpointError, match=f"holds checkpoints; give one of them: {first}.pth.tar, .*epoch_1"):
        VLAPredictor.from_checkpoint(tmp_path)
