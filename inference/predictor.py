"""VLAPredictor: a checkpoint file in, actions in physical units out.

Observations go through `build_observation` and `collate_fn`, the same functions that made the training
batches, and through the model that the checkpoint describes: there is no second preprocessing to drift.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data.processing import (
    Batch,
    Frame,
    ObservationError,
    PromptTokenizer,
    Sample,
    VLAImageProcessor,
    build_observation,
    collate_fn,
    processors_from_checkpoint,
)
from inference.acceleration import choose_weight_dtype, store_weights
from inference.closed_loop.execution import ExecutionSettings
from inference.quantization import quantize
from inference.sampler import Sampler
from inference.serving.export import read_policy
from model.action_head.guidance import ActionPrefix
from model.context import Context
from model.vla_model import VLAModel
from utils.config_utils import Config, MixtureEntry, config_from_dict
from utils.misc import pick_device

logger = logging.getLogger(__name__)


class VLAPredictor:
    """A policy ready to act.

    Attributes:
        config: the configuration that it was trained with.
        cameras: names of the cameras that it reads, in slot order.
        max_seq_len: observation frames that it takes, the current one included.
        state_dim, horizon, per_action_dim: widths of the state and of the predicted action chunk.
        num_inference_steps, n_action_steps: defaults of sampling and of execution.
        compile, quantization, weight_dtype: how it computes; see `inference` in utils/config_utils.py.
    """

    def __init__(
        self,
        model: VLAModel,
        config: Config,
        image_processor: VLAImageProcessor,
        prompt_tokenizer: PromptTokenizer,
        *,
        device: str | torch.device = "auto",
        use_amp: bool | None = None,
        num_inference_steps: int | None = None,
        n_action_steps: int | None = None,
        dataset: str | None = None,
        compile: str | None = None,
        quantization: str | None = None,
        weight_dtype: str | None = None,
    ) -> None:
        """Use `from_checkpoint`, unless the model is already in memory; it is changed in place.

        Raises:
            ValueError: num_inference_steps below 1 or above a diffusion head's noise levels, n_action_steps outside 1
                to horizon, an unknown dataset, a CUDA graph on another device, or weights rounded below the compute
                precision.
        """
        self.device = pick_device(str(device))
        if use_amp is not None:
            model.compute_dtype = torch.bfloat16 if use_amp else torch.float32
        self.compile = _given(compile, config.inference.compile)
        self.quantization = _given(quantization, config.inference.quantization)
        wanted = _given(weight_dtype, config.inference.weight_dtype)
        self.weight_dtype = choose_weight_dtype(wanted, model.compute_dtype, self.device)
        store_weights(model, self.weight_dtype)
        quantize(model.backbone, self.quantization, config.model.vlm_config.quantization)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.config = config
        self.image_processor, self.prompt_tokenizer = image_processor, prompt_tokenizer
        self.cameras, self.max_seq_len = config.cameras, config.data.max_seq_len
        self.dataset_index, self.dataset = _choose_dataset(config, dataset)
        self.state_dim, self.horizon = self.dataset.state_dim, self.dataset.horizon
        self.per_action_dim = self.dataset.per_action_dim
        self.num_inference_steps = _given(num_inference_steps, config.inference.num_inference_steps)
        self.n_action_steps = _given(n_action_steps, min(config.inference.n_action_steps or self.horizon, self.horizon))
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; give 1 or more")
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, but the policy predicts a horizon of {self.horizon} "
                f"actions; give 1 to {self.horizon}"
            )
        self._warned: set[str] = set()
        self.sampler = Sampler(model, self.compile, config.data.prompt_max_len, self.num_inference_steps, self.device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        use_amp: bool | None = None,
        *,
        num_inference_steps: int | None = None,
        n_action_steps: int | None = None,
        dataset: str | None = None,
        compile: str | None = None,
        quantization: str | None = None,
        weight_dtype: str | None = None,
    ) -> VLAPredictor:
        """Load a policy from a checkpoint alone: no data, no pretrained directory, no config file.

        Args:
            path: `*.pth.tar` written by training, a folder that scripts/export_policy.py wrote, or the hub id of one.
            device: `auto` (GPU when there is one), `cpu`, `cuda:1`, ...
            use_amp: True: bfloat16 autocast, also on a CPU. False: float32. None: the precision that the policy
                was trained in (`model.vlm_config.dtype`).
            num_inference_steps: sampling steps per prediction; None: the checkpoint's `inference` section.
            n_action_steps: actions of each prediction that a rollout executes; None: the checkpoint's.
            dataset: for a policy trained on a mixture, the name of the dataset whose robot it drives: it decides
                statistics and widths. None: the only one.
            compile, quantization, weight_dtype: see `inference` in utils/config_utils.py; None: the checkpoint's.
                The first prediction of a compiled policy, or of one on a GPU, is made here.

        Raises:
            CheckpointError: missing, truncated, unsafe or foreign file.
            ValueError: steps out of range, or a setting that the device or the precision does not allow.
            ImportError: the library of that quantization is missing.
        """
        checkpoint = read_policy(path)
        config = config_from_dict(checkpoint["config"], source=str(path))
        predictor = cls(
            VLAModel.from_checkpoint(checkpoint),
            config,
            *processors_from_checkpoint(checkpoint),
            device=device,
            use_amp=use_amp,
            num_inference_steps=num_inference_steps,
            n_action_steps=n_action_steps,
            dataset=dataset,
            compile=compile,
            quantization=quantization,
            weight_dtype=weight_dtype,
        )
        if predictor.compile != "none" or predictor.device.type == "cuda":
            predictor.warm_up()
        return predictor

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> VLAPredictor:
        """Load a shared policy: an exported folder or its hub id; the same as `from_checkpoint`, options included."""
        return cls.from_checkpoint(name_or_path, **options)

    def warm_up(self, batch_size: int = 1) -> None:
        """Predict once on blank images, so that compilation, graph capture and the GPU's own start are over.

        Args:
            batch_size: observations predicted together; compiled code and graphs serve one size each.
        """
        shape = (self.max_seq_len, self.image_processor.height, self.image_processor.width, 3)
        images = {camera: np.zeros(shape, np.uint8) for camera in self.cameras}
        state = np.zeros(self.state_dim)
        blank = self.observation(images["image_1"], images.get("image_2"), prompt="wait", state=state)
        started = time.perf_counter()
        self.predict_batch(collate_fn([blank] * batch_size), [0] * batch_size)
        seconds = time.perf_counter() - started
        logger.info("first prediction of %d, compile %s: %.1f s", batch_size, self.compile, seconds)

    def predict(
        self,
        images_1: Frame | Sequence[Frame],
        images_2: Frame | Sequence[Frame] | None = None,
        *,
        prompt: str,
        state: Sequence[float] | np.ndarray | None = None,
        seed: int | torch.Generator | None = None,
        num_inference_steps: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> np.ndarray:
        """The next actions.

        Args:
            images_1: camera 1, one frame or several (oldest first, the current one last, at most max_seq_len).
                A frame is encoded JPEG or PNG bytes, a path, a PIL image, or a uint8 RGB array (H, W, 3) of
                any size.
            images_2: camera 2, as many frames. A policy trained with two cameras masks it when None, as it
                does with data that lack it, and warns once; a policy trained with one camera ignores it.
            prompt: the instruction.
            state: (state_dim,), physical units; may be None only for a policy that takes no state.
            seed: of the sampling noise; the same seed gives the same actions. None: torch's global generator.
            num_inference_steps: sampling steps; None: the predictor's default.
            prefix: what the actions have to continue (physical units, B = 1); see `inference.closed_loop.execution`.

        Returns:
            float32 (horizon, per_action_dim), physical units.

        Raises:
            ObservationError: missing camera, unreadable frame, empty prompt, state of another width or not
                finite, too many frames.
        """
        batch = self.observe(images_1, images_2, prompt=prompt, state=state)
        generator = seed
        if seed is not None and not isinstance(seed, torch.Generator):
            generator = torch.Generator().manual_seed(int(seed))
        return self._sample(batch, [generator], num_inference_steps, prefix)[0, 0]

    def predict_batch(
        self,
        batch: Batch,
        seeds: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> np.ndarray:
        """The next actions of a collated batch (`observe`, or dataset samples through `collate_fn`).

        Args:
            batch: the data contract; actions are not needed.
            seeds: one per sample, so that a sample's noise does not depend on what else is in the batch; None:
                torch's global generator.
            num_inference_steps: sampling steps; None: the predictor's default.
            prefix: what the actions have to continue, physical units; weights 0 for a sample that continues nothing.

        Returns:
            float32 (B, horizon, per_action_dim), physical units.
        """
        return self.predict_draws(batch, [seeds], num_inference_steps, prefix)[0]

    def predict_draws(
        self,
        batch: Batch,
        seeds: Sequence[Sequence[int] | None],
        num_inference_steps: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> np.ndarray:
        """Several draws for each observation of a batch, which is encoded once.

        Args:
            batch, num_inference_steps, prefix: as `predict_batch` takes them.
            seeds: one entry per draw, each as `predict_batch` takes it.

        Returns:
            float32 (draws, B, horizon, per_action_dim), physical units.
        """
        generators = [
            None if draw is None else [torch.Generator().manual_seed(seed) for seed in draw] for draw in seeds
        ]
        return self._sample(batch, generators, num_inference_steps, prefix)

    def observe(
        self,
        images_1: Frame | Sequence[Frame],
        images_2: Frame | Sequence[Frame] | None = None,
        *,
        prompt: str,
        state: Sequence[float] | np.ndarray | None = None,
    ) -> Batch:
        """The batch of one that `predict` gives the model; arguments and errors as there."""
        return collate_fn([self.observation(images_1, images_2, prompt=prompt, state=state)])

    def observation(
        self,
        images_1: Frame | Sequence[Frame],
        images_2: Frame | Sequence[Frame] | None = None,
        *,
        prompt: str,
        state: Sequence[float] | np.ndarray | None = None,
    ) -> Sample:
        """The sample that `observe` makes a batch of; `collate_fn` joins several for `predict_batch`."""
        if images_1 is None:
            raise ObservationError("image_1 is missing; every policy needs it")
        if images_2 is not None and "image_2" not in self.cameras:
            self._warn_once("this policy was trained on image_1 alone: image_2 is ignored")
        if images_2 is None and "image_2" in self.cameras:
            self._warn_once("this policy was trained with image_2, which is missing: its slot is masked")
        sample = build_observation(
            {"image_1": _frames(images_1), "image_2": _frames(images_2)},
            prompt,
            np.pad(self._checked_state(state), (0, self.config.data.state_dim - self.state_dim)),
            cameras=self.cameras,
            max_seq_len=self.max_seq_len,
            image_processor=self.image_processor,
            prompt_tokenizer=self.prompt_tokenizer,
        )
        sample["dataset_index"] = self.dataset_index
        return sample

    def execution_settings(
        self,
        strategy: str | None = None,
        latency_steps: int | None = None,
        n_action_steps: int | None = None,
        max_guidance_weight: float | None = None,
        guidance_steps: int | None = None,
    ) -> ExecutionSettings:
        """How a rollout or a robot executes this policy's chunks; None: as the checkpoint's `inference` section says.

        Raises:
            ValueError: numbers out of range, a horizon too short for the latency, or a strategy that the policy
                was not trained for.
        """
        config = self.config.inference
        settings = ExecutionSettings(
            self.horizon,
            _given(n_action_steps, self.n_action_steps),
            _given(strategy, config.execution),
            _given(latency_steps, config.latency_steps),
            config.ensemble_decay,
            _given(max_guidance_weight, config.max_guidance_weight),
            _given(guidance_steps, config.guidance_steps),
        )
        trained = self.config.model.action_head_config.max_clean_prefix
        if settings.strategy == "clean_prefix" and settings.latency_steps > trained:
            raise ValueError(
                f"clean_prefix execution commits latency_steps {settings.latency_steps} actions, but the policy was "
                f"trained with max_clean_prefix {trained}; train with a longer one, or use rtc"
            )
        return settings

    @torch.no_grad()
    def context(self, batch: Batch) -> Context:
        """What the action head sees of a batch, in the precision of `predict`."""
        with self.model.autocast():
            return self.model.encode(self.sampler.prepared(batch))

    def mean_action(self, state_NS: np.ndarray) -> np.ndarray:
        """The training data's mean action for each state, float32 (N, A), physical units.

        In delta mode the mean is of deltas, so the state is added to the dimensions that are relative.
        """
        return np.array(self.action_statistics["mean"], np.float32) + self.action_origin(state_NS)

    @property
    def action_statistics(self) -> dict[str, list[float]]:
        """Of the training actions of the dataset that this policy drives; in delta mode, of deltas."""
        return self.model.statistics[self.dataset_index]["action"]

    def action_origin(self, state_NS: np.ndarray) -> np.ndarray:
        """What actions are relative to, float32 (N, A): in delta mode the state, 0 in dimensions that are absolute."""
        width = self.per_action_dim
        delta_A = self.model.normalizer.action_is_delta_A[:width].cpu().numpy()
        state_NA = np.pad(state_NS, ((0, 0), (0, max(0, width - state_NS.shape[1]))))[:, :width]
        return np.where(delta_A, state_NA, 0.0).astype(np.float32)

    @torch.no_grad()
    def normalize_action(self, action_NTA: np.ndarray, state_NS: np.ndarray) -> np.ndarray:
        """Actions (N, T, A) in physical units as the head sees them, float32, for errors in normalized units.

        `state_NS` is the physical state at each chunk's start, in the dataset's width or the model's.
        """
        model_action, model_state = self.model.action_head.per_action_dim, self.config.data.state_dim
        action = np.pad(action_NTA, ((0, 0), (0, 0), (0, model_action - action_NTA.shape[-1])))
        state = np.pad(state_NS, ((0, 0), (0, model_state - state_NS.shape[-1])))
        index = torch.full((len(action),), self.dataset_index, dtype=torch.int64, device=self.device)
        tensors = (torch.as_tensor(np.asarray(x, np.float32), device=self.device) for x in (action, state))
        return self.model.normalizer.normalize_action(*tensors, index)[..., : self.per_action_dim].cpu().numpy()

    def _sample(
        self,
        batch: Batch,
        generators: Sequence[Any],
        num_inference_steps: int | None,
        prefix: ActionPrefix | None,
    ) -> np.ndarray:
        steps = _given(num_inference_steps, self.num_inference_steps)
        prefix = None if prefix is None else self._widened(prefix)
        action_KBTA = self.sampler(batch, generators, steps, prefix)
        return action_KBTA[..., : self.horizon, : self.per_action_dim].cpu().numpy()

    def _widened(self, prefix: ActionPrefix) -> ActionPrefix:
        """A prefix of the dataset's widths in the model's, on its device: what it lacks is free."""
        head = self.config.model.action_head_config
        missing = head.horizon - prefix.action_BTA.shape[1]
        action_BTA = F.pad(prefix.action_BTA, (0, head.per_action_dim - prefix.action_BTA.shape[2], 0, missing))
        weight_BT = F.pad(prefix.weight_BT, (0, missing))
        return replace(prefix, action_BTA=action_BTA.to(self.device), weight_BT=weight_BT.to(self.device))

    def _checked_state(self, state: Sequence[float] | np.ndarray | None) -> np.ndarray:
        if state is None:
            if self.config.model.action_head_config.use_state_input:
                raise ObservationError(f"state is missing; this policy takes {self.state_dim} values")
            return np.zeros(self.state_dim, np.float32)
        values = np.asarray(state, np.float32)
        if values.shape != (self.state_dim,):
            raise ObservationError(
                f"state has shape {values.shape}, {values.size} values; this policy takes {self.state_dim}"
            )
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ObservationError(f"state[{index}] is {values[index]}; every value must be a finite number")
        return values

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _frames(images: Frame | Sequence[Frame] | None) -> list[Frame] | None:
    """One frame or several as a list of frames."""
    if images is None:
        return None
    several = isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4)
    return list(images) if several else [images]


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _choose_dataset(config: Config, name: str | None) -> tuple[int, MixtureEntry]:
    """The dataset of that name, or the only one, and its `dataset_index`."""
    names = [entry.name for entry in config.datasets]
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        found = "no dataset was named" if name is None else f"there is no dataset {name!r}"
        raise ValueError(
            f"this policy was trained on {', '.join(names)}; {found}: give one of them as dataset (--dataset)"
        )
    return names.index(name), config.datasets[names.index(name)]
