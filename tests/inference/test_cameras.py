"""A policy of three cameras and a joined state: what it is given, what it costs, and how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vla_client import PolicyClient

import main_eval
from data.processing import ObservationError
from inference.predictor import VLAPredictor
from tests.data.test_columns import CAMERAS, rows_of
from tests.helpers import write_rows
from tests.inference.checkpoints import train_tiny
from tests.inference.serving.servers import running
from utils.config_utils import ConfigError, ServingConfig

STATE = {"state": [0.1, -0.2, 0.3, 0.4], "force": [1.0, -1.0], "load": 2.0}
VECTOR = np.float32([0.1, -0.2, 0.3, 0.4, 1.0, -1.0, 2.0])
GIVEN: dict[str, Any] = {"prompt": "press the button", "seed": 0}


def frame(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("demos") / "demos.parquet", rows_of(6) + rows_of(5, seed=1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_paligemma_dir: Path, demos: Path) -> Path:
    data = {"cameras": list(CAMERAS), "state_columns": ["state", "force", "load"], "state_dim": 7}
    # 20 steps, after which the pictures move what the tables print
    return train_tiny(tmp_path_factory.mktemp("run"), tiny_paligemma_dir, [demos], steps=20, data=data)


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> VLAPredictor:
    return VLAPredictor.from_checkpoint(checkpoint, device="cpu")


def images_encoded(predictor: VLAPredictor, **observation: Any) -> int:
    """How many images one prediction takes through the vision tower."""
    counts: list[int] = []
    tower = predictor.model.backbone.backbone.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    predictor.predict(state=VECTOR, **GIVEN, **observation)
    hook.remove()
    return sum(counts)


def test_an_absent_camera_costs_no_vision_pass(predictor: VLAPredictor) -> None:
    assert predictor.cameras == CAMERAS
    everything = {camera: frame(i) for i, camera in enumerate(CAMERAS)}
    assert images_encoded(predictor, images=everything) == 3
    assert images_encoded(predictor, images={"side": frame()}) == 1
    assert images_encoded(predictor, images_1=frame(), images={"side": frame()}) == 2


def test_images_by_name_beside_the_first_two(predictor: VLAPredictor) -> None:
    one, two, three = (frame(i) for i in range(3))
    named = predictor.predict(images=dict(zip(CAMERAS, (one, two, three), strict=True)), state=VECTOR, **GIVEN)
    beside = predictor.predict(one, two, images={"side": three}, state=VECTOR, **GIVEN)
    without = predictor.predict(one, two, state=VECTOR, **GIVEN)
    np.testing.assert_array_equal(named, beside)
    assert not np.array_equal(named, without)
    for images, message in (
        ({"front": one}, "both give front; give it once"),
        ({"top": one}, "no camera 'top'; it reads front, wrist.left, side"),
    ):
        with pytest.raises(ObservationError, match=message):
            predictor.predict(one, images=images, state=VECTOR, **GIVEN)
    with pytest.raises(ObservationError, match="no image: the policy reads front, wrist.left, side"):
        predictor.predict(images={}, state=VECTOR, **GIVEN)


def test_the_state_by_its_columns(predictor: VLAPredictor) -> None:
    assert predictor.state_widths == {"state": 4, "force": 2, "load": 1}
    joined = predictor.predict(frame(), state=VECTOR, **GIVEN)
    np.testing.assert_array_equal(predictor.predict(frame(), state=STATE, **GIVEN), joined)
    for state, message in (
        (
            {**STATE, "torque": [1.0]},
            r"state: 'torque' is no part of it; this policy takes 4 state \+ 2 force",
        ),
        ({"state": STATE["state"], "load": 1.0}, "state: 'force' is missing"),
        ({**STATE, "force": [1.0]}, r"force has shape \(1,\), 1 values; this policy takes 2"),
        ({**STATE, "force": [1.0, float("nan")]}, r"force\[1\] is nan; every value must be a finite number"),
        (VECTOR[:4], r"state has shape \(4,\), 4 values; this policy takes 7"),
        (None, r"state is missing; this policy takes 4 state \+ 2 force \+ 1 load"),
    ):
        with pytest.raises(ObservationError, match=message):
            predictor.predict(frame(), state=state, **GIVEN)
    warnings: dict[str, str] = {}
    predictor.observation(frame(), prompt="go", state={**STATE, "force": [1e4, 0.0]}, warnings=warnings)
    assert warnings["state"].startswith("force[0] is 10000, in training it was 0 to 5")


def test_the_server_takes_any_camera_and_states_by_column(predictor: VLAPredictor) -> None:
    one, two, three = (frame(i) for i in range(3))
    wanted = predictor.predict(one, two, images={"side": three}, state=VECTOR, **GIVEN)
    without = predictor.predict(images={"side": three}, state=VECTOR, **GIVEN)
    with running(predictor, image_keys={"side": "observation/exterior_image_2_left"}) as server:
        client = PolicyClient(port=server.port)
        keys = ("observation/image", "observation/wrist_image", "observation/exterior_image_2_left")
        assert client.policy["cameras"] == dict(zip(CAMERAS, keys, strict=True))
        assert client.policy["state_columns"] == {"state": 4, "force": 2, "load": 1}
        frames = (one, two, three)
        openpi = {**dict(zip(keys, frames, strict=True)), "observation/state": VECTOR}
        own = {**dict(zip(CAMERAS, frames, strict=True)), "state": STATE}
        nested = {"images": dict(zip(CAMERAS, frames, strict=True)), "state": VECTOR}
        for request in (openpi, own, nested):
            np.testing.assert_allclose(client.predict({**request, **GIVEN}), wanted, atol=1e-6)
        only = client.predict({"side": three, "state": VECTOR, **GIVEN})
        np.testing.assert_allclose(only, without, atol=1e-6)
        with pytest.raises(RuntimeError, match="'observation/image' is missing; wanted 'observation/image', 'obs"):
            client.predict({"state": VECTOR, **GIVEN})
        with pytest.raises(RuntimeError, match="state"):
            client.predict({"side": three, "state": {"force": [1.0, 2.0]}, **GIVEN})
        client.close()


def test_keys_of_the_server_that_can_not_be(predictor: VLAPredictor) -> None:
    assert ServingConfig().keys(CAMERAS)["side"] == "observation/side"
    with pytest.raises(ConfigError, match="serving.image_keys: the policy has no camera 'top'; it reads front, wrist"):
        with running(predictor, image_keys={"top": "top"}):
            pass
    with pytest.raises(ConfigError, match="are not distinct"):
        ServingConfig(image_keys={"side": "observation/state"})


def test_the_command_line_takes_frames_of_any_camera(checkpoint: Path, tmp_path: Path, capsys) -> None:
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(frame(i)).save(paths[-1])
    common = ["--checkpoint_path", str(checkpoint), "--device", "cpu", "--prompt", GIVEN["prompt"]]
    common += ["--state_vector", " ".join(map(str, VECTOR.tolist())), "--output_dir", str(tmp_path)]
    tables = []
    for flags in (
        ["--image1_paths", paths[0], "--image2_paths", paths[1], "--image_paths", f"side={paths[2]}"],
        ["--image_paths", *(f"{camera}={path}" for camera, path in zip(CAMERAS, paths, strict=True))],
        ["--image1_paths", paths[0]],
    ):
        main_eval.main([*common, *flags])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
    for flags, message in (
        (["--image_paths", "side"], "wanted <camera>=<image>,<image>"),
        (["--image_paths", "side=a.png", "side=b.png"], "side is given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            main_eval.main([*common, *flags])


def test_recorded_data_is_evaluated(checkpoint: Path, demos: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint_path", str(checkpoint), "--device", "cpu", "--output_dir", str(tmp_path), "--num_plots", "1"]
    main_eval.main([*flags, "--eval_data_path", str(demos)])
    assert (tmp_path / "metrics.json").is_file()
