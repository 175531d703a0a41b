"""Folders of published pi0 and pi0.5 policies: LeRobot's (config.json, processors, statistics) and openpi's PyTorch
layout (config.json, assets/*/norm_stats.json). What they say, read into one form; `model.pi_weights` reads the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils.foreign_files import parse_json

WEIGHTS = "model.safetensors"
OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
IMAGES, STATE, ACTION = "observation.images.", "observation.state", "action"
MODES = {
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantile",
    "QUANTILE10": "quantile10",
    "IDENTITY": "identity",
}
# Steps of LeRobot's processors whose effect is known here; any other one is refused by name.
PREPROCESSOR_STEPS = (
    "rename_observations_processor",
    "to_batch_processor",
    "pi0_new_line_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "tokenizer_processor",
    "device_processor",
    "relative_actions_processor",
    "normalizer_processor",
)
POSTPROCESSOR_STEPS = ("unnormalizer_processor", "absolute_actions_processor", "device_processor")
# What older versions of LeRobot leave unsaid in config.json.
PUBLISHED = {"chunk_size": 50, "n_action_steps": 50, "num_inference_steps": 10, "image_resolution": None}
Statistics = dict[str, dict[str, list[float]]]


class PolicyFolderError(ValueError):
    """A folder holds no policy that can be used; the message says what was found and what was wanted."""


@dataclass(frozen=True)
class PublishedPolicy:
    """What a folder says beside its tensors.

    Attributes:
        folder: where it was read.
        layout: whose.
        declared: `pi0` or `pi05` where the folder says so; openpi's never does.
        config: config.json as it stands.
        cameras: names of the image features in slot order, without their prefix; those of `empty_cameras` are left
            out, because no data has them.
        renamed: a robot's name of a feature -> the policy's, where the pre-processor renames.
        state_dim, action_dim: of the robot, before padding.
        horizon, n_action_steps, num_inference_steps, prompt_max_len: as published.
        normalization: mode of `state` and of `action`, in `utils.normalization`'s words.
        arithmetic, eps: of the normalization.
        statistics: of `state` and `action`, every one that the folder has; empty where it has none.
        statistics_files: the tensors of LeRobot's statistics files as they are, those of images included: the
            pre-processor's and the post-processor's.
        relative_action_dims: dimensions that are relative to the state.
        image_size: height and width, or None: as the tensors say.
    """

    folder: Path
    layout: Literal["lerobot", "openpi"]
    declared: str | None
    config: dict[str, Any]
    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    horizon: int
    n_action_steps: int
    num_inference_steps: int
    prompt_max_len: int | None
    normalization: dict[str, str | None]
    arithmetic: Literal["lerobot", "openpi"]
    eps: float
    statistics: Statistics
    statistics_files: tuple[dict[str, Tensor], ...] = ({}, {})
    relative_action_dims: tuple[int, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None


def is_policy_folder(folder: str | Path) -> bool:
    """Whether a folder says that it holds a pi0 or pi0.5 policy as LeRobot or openpi write it."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return False
    try:
        config = parse_json((folder / "config.json").read_bytes())
    except ValueError:
        return False
    return isinstance(config, dict) and (config.get("type") in ("pi0", "pi05") or "action_horizon" in config)


def read_policy_folder(folder: str | Path, norm_stats: str | Path | None = None) -> PublishedPolicy:
    """Everything beside the tensors.

    Args:
        folder: a local folder.
        norm_stats: a `norm_stats.json` to take instead of the folder's own statistics; openpi's folders may hold
            several (one an asset), and then need it.

    Raises:
        PolicyFolderError: a file is missing or unreadable, a policy of another kind, a processor step or a setting
            that is not known here, statistics missing or of another width.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json", "give the folder of a pi0 or pi0.5 policy of LeRobot or openpi")
    if "type" in config:
        return _read_lerobot(folder, config, norm_stats)
    if "action_horizon" in config:
        return _read_openpi(folder, config, norm_stats)
    raise PolicyFolderError(
        f"{folder / 'config.json'}: neither a LeRobot policy (no 'type') nor one of openpi (no 'action_horizon'); give "
        "the folder of a pi0 or pi0.5 policy"
    )


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, mapped from the file.

    Raises:
        PolicyFolderError: no such file, or a truncated or damaged one.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise PolicyFolderError(
                f"{path.parent}: adapters of PEFT alone, without the policy that they adapt; merge them first "
                "(merge_and_unload of the peft library) and save the whole policy"
            )
        raise PolicyFolderError(f"{path}: no such file; download the policy again, whole")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise PolicyFolderError(
            f"{path}: not a whole file of tensors ({path.stat().st_size} bytes; {error}); download it again"
        ) from None


def read_relative_dims(folder: str | Path, action_dim: int) -> tuple[int, ...]:
    """Action dimensions that the pre-processor of a LeRobot folder takes relative to the state."""
    steps = _steps(Path(folder), "policy_preprocessor.json", PREPROCESSOR_STEPS)
    return _relative_dims(steps.get("relative_actions_processor"), action_dim)


def _read_lerobot(folder: Path, config: dict[str, Any], norm_stats: str | Path | None) -> PublishedPolicy:
    place = folder / "config.json"
    if config["type"] not in ("pi0", "pi05"):
        raise PolicyFolderError(f"{place}: type is {config['type']!r}; only pi0 and pi05 are read here")
    for key in ("use_visual_memory", "use_proprioceptive_memory", "adapt_to_pi_aloha"):
        if config.get(key):
            raise PolicyFolderError(f"{place}: {key} is on, which is not built here; give a policy without it")
    said = {**PUBLISHED, "tokenizer_max_length": {"pi0": 48, "pi05": 200}[config["type"]], **config}
    features, outputs = _features(config, "input_features", place), _features(config, "output_features", place)
    cameras = tuple(name.removeprefix(IMAGES) for name, one in features.items() if one["type"] == "VISUAL")
    cameras = tuple(name for name in cameras if not name.startswith("empty_camera_"))
    if not cameras:
        raise PolicyFolderError(f"{place}: input_features has no camera (type VISUAL); the policy must see something")
    if ACTION not in outputs:
        raise PolicyFolderError(f"{place}: output_features has no {ACTION!r}; a policy must act")
    state_dim = features[STATE]["shape"][0] if STATE in features else 0
    action_dim = outputs[ACTION]["shape"][0]
    steps = _steps(folder, "policy_preprocessor.json", PREPROCESSOR_STEPS)
    after = _steps(folder, "policy_postprocessor.json", POSTPROCESSOR_STEPS)
    _check_kind_of_steps(folder, config["type"], steps)
    normalizer, unnormalizer = steps.get("normalizer_processor"), after.get("unnormalizer_processor")
    modes = normalizer["config"]["norm_map"] if normalizer else config.get("normalization_mapping", {})
    if unnormalizer and unnormalizer["config"]["norm_map"].get("ACTION") != modes.get("ACTION"):
        raise PolicyFolderError(
            f"{folder}: actions are normalized by {modes.get('ACTION')} but unnormalized by "
            f"{unnormalizer['config']['norm_map'].get('ACTION')}; the two processors belong to different policies"
        )
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise PolicyFolderError(f"{folder}: images are normalized by {modes['VISUAL']}; only IDENTITY is read here")
    files = _statistics_file(folder, normalizer), _statistics_file(folder, unnormalizer)
    statistics = _lerobot_statistics(files[0]) if norm_stats is None else read_norm_stats(norm_stats)
    policy = PublishedPolicy(
        folder=folder,
        layout="lerobot",
        declared=config["type"],
        config=config,
        cameras=cameras,
        state_dim=state_dim,
        action_dim=action_dim,
        horizon=said["chunk_size"],
        n_action_steps=said["n_action_steps"],
        num_inference_steps=said["num_inference_steps"],
        prompt_max_len=said["tokenizer_max_length"],
        normalization={"state": _mode(modes, "STATE", place), "action": _mode(modes, "ACTION", place)},
        arithmetic="lerobot",
        eps=normalizer["config"].get("eps", 1e-8) if normalizer else 1e-8,
        statistics=statistics,
        statistics_files=files,
        relative_action_dims=_relative_dims(steps.get("relative_actions_processor"), action_dim),
        renamed=steps.get("rename_observations_processor", {}).get("config", {}).get("rename_map", {}),
        image_size=None if said["image_resolution"] is None else tuple(said["image_resolution"]),
    )
    _check_widths(policy)
    return policy


def _read_openpi(folder: Path, config: dict[str, Any], norm_stats: str | Path | None) -> PublishedPolicy:
    if norm_stats is None:
        found = sorted(folder.glob("assets/**/norm_stats.json"))
        if len(found) != 1:
            what = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
            raise PolicyFolderError(
                f"{folder}/assets: wanted one norm_stats.json, found {what}; give --norm_stats the file of your robot"
            )
        norm_stats = found[0]
    statistics = read_norm_stats(norm_stats)
    return PublishedPolicy(
        folder=folder,
        layout="openpi",
        declared=None,
        config=config,
        cameras=OPENPI_CAMERAS,
        state_dim=len(statistics["state"]["mean"]),
        action_dim=len(statistics["action"]["mean"]),
        horizon=config["action_horizon"],
        n_action_steps=config["action_horizon"],
        num_inference_steps=10,
        prompt_max_len=None,
        normalization={"state": None, "action": None},
        arithmetic="openpi",
        eps=1e-6,
        statistics=statistics,
    )


def read_norm_stats(path: str | Path) -> Statistics:
    """openpi's `norm_stats.json`, as `state` and `action`.

    Raises:
        PolicyFolderError: unreadable, or without the two.
    """
    path = Path(path)
    content = _read_json(path, "give a norm_stats.json of openpi")
    content = content.get("norm_stats", content)
    for name in ("state", "actions"):
        if not isinstance(content.get(name), dict) or "mean" not in content[name]:
            raise PolicyFolderError(f"{path}: no statistics of {name!r}; give a norm_stats.json of openpi")
    return {
        ours: {name: [float(x) for x in values] for name, values in content[theirs].items() if values is not None}
        for ours, theirs in (("state", "state"), ("action", "actions"))
    }


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise PolicyFolderError(f"{path}: {error.strerror or error}; {remedy}") from None
    except ValueError as error:
        raise PolicyFolderError(f"{path}: no JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise PolicyFolderError(f"{path}: no JSON object; {remedy}")
    return content


def _features(config: dict[str, Any], key: str, place: Path) -> dict[str, Any]:
    features = config.get(key)
    if not isinstance(features, dict) or not all({"type", "shape"} <= set(one) for one in features.values()):
        raise PolicyFolderError(f"{place}: no {key} with types and shapes; download or save the policy again")
    return features


def _steps(folder: Path, name: str, known: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The steps of a processor by their registry names, none of which may be unknown."""
    path = folder / name
    content = _read_json(path, "download the policy again with its processors, or migrate it with LeRobot's own script")
    steps: dict[str, dict[str, Any]] = {}
    for index, step in enumerate(content.get("steps", [])):
        kind = step.get("registry_name") or step.get("class")
        if kind not in known:
            raise PolicyFolderError(
                f"{path}: step {index} is {kind!r}, whose effect is not known here, so that the policy would act "
                f"differently without it; known are {', '.join(known)}"
            )
        steps[kind] = {"config": {}, **step}
    return steps


def _check_kind_of_steps(folder: Path, kind: str, steps: Mapping[str, Any]) -> None:
    own = {"pi0": "pi0_new_line_processor", "pi05": "pi05_prepare_state_tokenizer_processor_step"}
    for other, step in own.items():
        if (step in steps) != (other == kind):
            there = "is there" if step in steps else "is missing"
            raise PolicyFolderError(
                f"{folder}/policy_preprocessor.json: step {step} {there}, but config.json says type {kind}; the two "
                "belong to different policies"
            )
    settings = steps.get("tokenizer_processor", {}).get("config", {})
    if settings.get("padding_side", "right") != "right":
        raise PolicyFolderError(f"{folder}/policy_preprocessor.json: prompts padded on the left are not read here")


def _mode(modes: Mapping[str, str], key: str, place: Path) -> str:
    name = modes.get(key, "IDENTITY")
    if name not in MODES:
        raise PolicyFolderError(f"{place}: {key} is normalized by {name!r}; known are {', '.join(MODES)}")
    return MODES[name]


def _statistics_file(folder: Path, normalizer: dict[str, Any] | None) -> dict[str, Tensor]:
    """`feature.statistic` -> values, as the normalizer's file has them; nothing where it names none."""
    if normalizer is None or "state_file" not in normalizer:
        return {}
    path = folder / normalizer["state_file"]
    if not path.is_file():
        raise PolicyFolderError(f"{path}: no such file, though the pre-processor names it; download the policy again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise PolicyFolderError(f"{path}: no readable statistics ({error}); download it again") from None


def _lerobot_statistics(tensors: Mapping[str, Tensor]) -> Statistics:
    """Of state and action."""
    result: Statistics = {"state": {}, "action": {}}
    for key, tensor in tensors.items():
        feature, _, statistic = key.rpartition(".")
        name = {STATE: "state", ACTION: "action"}.get(feature)
        if name is not None and statistic != "count":
            result[name][statistic] = tensor.float().flatten().tolist()
    return result


def _relative_dims(step: dict[str, Any] | None, action_dim: int) -> tuple[int, ...]:
    """Dimensions that are relative to the state: all whose names contain no excluded word."""
    settings = {} if step is None else step["config"]
    if not settings.get("enabled"):
        return ()
    excluded = [str(word).lower() for word in settings.get("exclude_joints") or () if word]
    names = [str(name).lower() for name in settings.get("action_names") or ()]
    names += [""] * (action_dim - len(names))
    return tuple(dim for dim in range(action_dim) if not any(word in names[dim] for word in excluded))


def _check_widths(policy: PublishedPolicy) -> None:
    for name, width in (("state", policy.state_dim), ("action", policy.action_dim)):
        for statistic, values in policy.statistics[name].items():
            if len(values) != width:
                raise PolicyFolderError(
                    f"{policy.folder}: statistics of another width: {name}.{statistic} has {len(values)} values, but "
                    f"config.json says that the {name} has {width}; give the statistics that belong to the policy"
                )
