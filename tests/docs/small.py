"""What stands in, at small size, for the weights, data and machines of which the pages speak."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image

from model.tiny.paligemma import make_tiny_paligemma
from tests.docs.pages import ROOT, Page
from tests.docs.terminal import Terminal
from tests.envs.test_adding_a_simulator import add_simulator
from tests.helpers import PROMPTS, write_episodes
from tests.model.test_adding_a_backbone import add_backbone
from tests.model.test_adding_a_head import add_head

# Differences from the configs that the pages name: fewer steps, smaller heads. Everything else is as it is published.
SMALLER = {
    "quickstart": {
        "training": {"max_steps": 3, "log_interval": 1},
        "model": {"action_head_config": {"hidden_dim": 32, "num_layers": 1}},
    },
    "compare_heads": {"training": {"max_steps": 2}},
    "vla_config": {
        "data": {"num_workers": 1, "max_episodes": 1},
        "model": {
            "vlm_config": {"dtype": "float32"},  # bfloat16 takes ten times as long on a CPU
            "action_head_config": {"hidden_dim": 32, "num_layers": 1, "num_heads": 2},
        },
        "training": {"epochs": 2, "log_interval": 1},
    },
    "vla_config_ddp": {"data": {"batch_size": 32}},
    "vla_lora": {"data": {"num_workers": 1, "batch_size": 16}},
}
PALIGEMMA = {  # the layout of paligemma-3b-pt-224: 256 tokens of 14 px for an image of 224 px
    "prompts": PROMPTS,
    "image_size": 224,
    "patch_size": 14,
    "vision_width": 16,
    "vision_layers": 1,
    "vision_heads": 2,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
}


def shrink_configs(folder: Path) -> None:
    """Merge SMALLER into the configs of a copy of the repository."""
    for name, differences in SMALLER.items():
        path = folder / "configs" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), differences)))


def merged(tree: dict[str, Any], differences: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, the second over the first."""
    both = {key: merged(tree[key], value) for key, value in differences.items() if isinstance(tree.get(key), dict)}
    return {**tree, **differences, **both}


def pretrained_weights(folder: Path) -> None:
    """In place of google/paligemma-3b-pt-224, where `hf download` puts it."""
    make_tiny_paligemma(folder / "weight/paligemma-3b-pt-224", **PALIGEMMA)


def own_demonstrations(folder: Path) -> None:
    """Demonstrations as configs/vla_config.yaml expects them."""
    options = {"state_dim": 7, "action_dim": 7, "cameras": ("image_1", "image_2"), "image_size": 48}
    write_episodes(folder / "demos/train/own.parquet", [9, 9, 8], **options)
    write_episodes(folder / "demos/val/own.parquet", [6], seed=7, **options)


def own_statistics(folder: Path) -> None:
    """What utils/calculate_normalization_stats.py makes of them."""
    command = ["utils/calculate_normalization_stats.py", "--config_path", "configs/vla_config.yaml"]
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)


def lerobot_dataset(folder: Path) -> None:
    """A LeRobot dataset, written by lerobot itself."""
    shutil.copytree(ROOT / "tests/fixtures/lerobot_v30_video", folder / "lerobot_dataset")


def foreign_recordings(folder: Path) -> None:
    """A folder of LIBERO's files, and an RLDS dataset."""
    for name, source in (("libero_hdf5", "libero_hdf5"), ("rlds_dataset", "rlds/tiny_pick/1.0.0")):
        shutil.copytree(ROOT / "tests/fixtures/formats" / source, folder / name)


def hdf5_episodes(folder: Path) -> None:
    """A recording in ALOHA's layout."""
    rng = np.random.default_rng(0)
    (folder / "hdf5_episodes").mkdir()
    with h5py.File(folder / "hdf5_episodes/episode_0.hdf5", "w") as file:
        file["action"] = file["observations/qpos"] = rng.normal(size=(6, 14)).astype(np.float32)
        for camera in ("cam_high", "cam_left_wrist"):
            file[f"observations/images/{camera}"] = rng.integers(0, 256, (6, 24, 32, 3), dtype=np.uint8)


def camera_frame(folder: Path) -> None:
    """A picture of a camera."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "frame.png")


def recorded_tasks(folder: Path) -> None:
    """The sample demonstrations to train on, and one episode of them in place of held-out ones."""
    shutil.copytree(ROOT / "data/samples", folder / "train")
    (folder / "val").mkdir()
    with pq.ParquetFile(folder / "train/window-open-v3.parquet") as file:
        pq.write_table(file.read_row_group(0), folder / "val/window-open-v3.parquet")  # a row group is an episode


def latency_demonstrations(folder: Path) -> None:
    """What benchmarks/latency.py --quick would record."""
    recorded_tasks(folder / "demos/quickstart_short")


def own_configuration(folder: Path) -> None:
    """The file that docs/finetune_paligemma.md tells its reader to write."""
    (text,) = [text for language, text in Page(ROOT / "docs/finetune_paligemma.md").blocks if language == "yaml"]
    (folder / "configs/my_robot.yaml").write_text(text)


def run_quickstart(terminal: Terminal) -> None:
    """What scripts/quickstart.sh leaves behind, from the sample demonstrations and without its rollouts."""
    recorded_tasks(terminal.folder / "demos/quickstart")
    terminal.run("python scripts/make_tiny_paligemma.py --output_dir weight/tiny-paligemma")
    terminal.run("python utils/calculate_normalization_stats.py --config_path configs/quickstart.yaml")
    terminal.run("python main_train.py --config_path configs/quickstart.yaml")
    policy, folder = "experiments/quickstart/checkpoints/model_best.pth.tar", "experiments/quickstart/offline"
    evaluate = "python main_eval.py --eval_data_path demos/quickstart/val --num_plots 0"
    terminal.run(f"{evaluate} --checkpoint_path {policy} --output_dir {folder}")


def trained_policy(folder: Path) -> None:
    """A checkpoint and its offline metrics, as a page on deployment begins with them."""
    shutil.copy(folder / "experiments/quickstart/checkpoints/model_best.pth.tar", folder)
    shutil.copytree(folder / "experiments/quickstart/offline", folder / "results")


# Page -> what its reader has before the first command, beside the quickstart's results.
READERS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "README.md": (pretrained_weights, own_demonstrations),
    "CONTRIBUTING.md": (),
    "SECURITY.md": (trained_policy,),
    "docs/adding_a_backbone.md": (add_backbone,),
    "docs/adding_a_head.md": (add_head,),
    "docs/adding_a_simulator.md": (add_simulator,),
    "docs/convert.md": (foreign_recordings,),
    "docs/data_and_robot.md": (trained_policy,),
    "docs/data_format.md": (own_demonstrations,),
    "docs/deployment.md": (trained_policy,),
    "docs/editing.md": (),
    "docs/evaluation.md": (camera_frame,),
    "docs/execution.md": (latency_demonstrations,),
    "docs/finetune_paligemma.md": (pretrained_weights, lerobot_dataset, own_configuration),
    "docs/heads.md": (),
    "docs/lerobot.md": (lerobot_dataset, hdf5_episodes),
    "docs/multi_gpu.md": (pretrained_weights, own_demonstrations, own_statistics),
    "docs/simulators.md": (),
    "docs/training.md": (pretrained_weights, own_demonstrations, own_statistics),
    "docs/training_pipeline.md": (),
}
