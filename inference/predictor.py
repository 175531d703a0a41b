"""VLAPredictor: a checkpoint file in, actions in physical units out.

Observations go through `build_observation` and `collate_fn`, the same functions that made the training
batches, and through the model that the checkpoint describes: there is no second preprocessing to drift.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.processing import (
    Frame,
    ObservationError,
    PromptTokenizer,
    Sample,
    VLAImageProcessor,
    build_observation,
    collate_fn,
    processors_from_checkpoint,
)
from inference.action_units import ActionUnits
from inference.alarm import Alarm, Calibration
from inference.engine import Engine
from inference.monitor import Monitor
from inference.observations import (
    State,
    checked_noise,
    checked_seeds,
    checked_state,
    frames_by_camera,
    outside_training,
)
from inference.policy_files import fingerprint, read_policy
from inference.settings import changed_settings, choose_dataset
from inference.uncertainty import Measured, alarm_settings, best_of_draws, check_best_of, draw_seeds, matching
from model.context import ActionPrefix
from model.vla_model import VLAModel
from utils.batch import Batch, example_batch
from utils.comparison.facts import Profile, is_profile
from utils.config_utils import Config, config_from_dict
from utils.misc import pick_device
from utils.statistics import state_widths

logger = logging.getLogger(__name__)


class VLAPredictor:
    """A policy ready to act.

    Attributes:
        config: the configuration that it was trained with.
        settings: how it predicts: the `inference` section of `config`, with what was given instead.
        cameras: names of the cameras that it reads, in slot order.
        max_seq_len: observation frames that it takes, the current one included.
        state_dim, horizon, per_action_dim: widths of the state and of the predicted action chunk.
        state_widths: values of each column that the state is joined from, in order.
        num_inference_steps, n_action_steps, compile, quantization: those of `settings`.
        action_units: what its actions are relative to, and how its head sees them.
        weight_dtype: that its matrices are stored in.
        fingerprint: tells its weights from others'; "" where the model did not come from a file.
        training_data: what its training data look like, for `Monitor`; None where its checkpoint does not say.
        uncertainty: of the last `predict`, NaN where there is no such number; see `inference.uncertainty`.
        alarm: whether it stands after the last `predict` (`alarm.on`): that the policy will fail. None where nobody
            calibrated these weights for these settings; `no_alarm` says so in words.
    """

    def __init__(
        self,
        model: VLAModel,
        config: Config,
        image_processor: VLAImageProcessor,
        prompt_tokenizer: PromptTokenizer,
        *,
        device: str | torch.device = "auto",
        dataset: str | None = None,
        use_amp: bool | None = None,
        **inference: Any,
    ) -> None:
        """Use `from_checkpoint`, unless the model is already in memory; it is changed in place.

        Raises:
            ValueError: a setting that does not exist, is out of range, or asks for what device, precision or head can't
                do; an unknown dataset.
        """
        self.config, self.device = config, pick_device(str(device))
        self.image_processor, self.prompt_tokenizer = image_processor, prompt_tokenizer
        self.cameras, self.max_seq_len = config.cameras, config.data.max_seq_len
        self.dataset_index, self.dataset = choose_dataset(config, dataset)
        self.state_dim, self.horizon = self.dataset.state_dim, self.dataset.horizon
        self.per_action_dim = self.dataset.per_action_dim
        self.state_widths = state_widths(
            model.statistics[self.dataset_index], config.data.state_columns, self.state_dim
        )
        self.settings = changed_settings(config.inference, self.horizon, inference)
        self.num_inference_steps, self.n_action_steps = self.settings.num_inference_steps, self.settings.n_action_steps
        self.compile, self.quantization = self.settings.compile, self.settings.quantization
        if self.settings.expert_quantization != "none":
            self.quantization += f", expert {self.settings.expert_quantization}"
        if use_amp is not None:
            model.compute_dtype = torch.bfloat16 if use_amp else torch.float32
            for parameter in model.parameters():  # frozen ones may be stored in the other half precision
                if use_amp and parameter.dtype == torch.float16:
                    parameter.data = parameter.data.float()
        self.engine = Engine(
            model,
            self.settings,
            self.device,
            prompt_max_len=config.data.prompt_max_len,
            trained_quantization=(
                config.model.vlm_config.quantization,
                config.model.action_head_config.expert.quantization,
            ),
        )
        self.model, self.weight_dtype = self.engine.model, self.engine.weight_dtype
        self.action_units = ActionUnits(self.model, config, self.dataset_index, self.per_action_dim)
        check_best_of(model.action_head, self.settings.best_of)
        self.uncertainty, self.calibrations = math.nan, list[Calibration]()
        self.alarm, self.no_alarm = self.new_alarm()
        self.fingerprint = ""
        self.training_data: Profile | None = None
        self._monitor: Monitor | None = None
        self._warned: set[str] = set()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        dataset: str | None = None,
        *,
        use_amp: bool | None = None,
        **inference: Any,
    ) -> VLAPredictor:
        """Load a policy from a checkpoint alone: no data, no pretrained directory, no config file.

        Args:
            path: `*.pth.tar` written by training, a folder that scripts/export_policy.py wrote, or the hub id of one.
            device: `auto` (GPU when there is one), `cpu`, `cuda:1`, ...
            dataset: for a policy trained on a mixture, the name of the dataset whose robot it drives: it decides
                statistics and widths. None: the only one.
            use_amp: True: bfloat16 autocast, also on a CPU. False: float32. None: the precision that the policy
                was trained in (`model.vlm_config.dtype`).
            inference: settings instead of the checkpoint's, by the names of `inference` in utils/config_utils.py, such
                as num_inference_steps=5 or compile="default"; None: the checkpoint's. The first prediction of a
                compiled policy, or of one on a GPU, is made here.

        Raises:
            CheckpointError: missing, truncated, unsafe or foreign file.
            ValueError: a setting that does not exist (the error names the nearest one that does), is out of range, or
                asks for what device, precision or head can't do; an unknown dataset.
            ImportError: the library of that quantization is missing.
        """
        device = pick_device(str(device))  # what is not there is said before anything is loaded
        return cls._from_dict(read_policy(path), str(path), device, dataset, use_amp, inference)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device = "auto",
        dataset: str | None = None,
        *,
        tokenizer_name_or_path: str | None = None,
        vision_num_attention_heads: int | None = None,
        norm_stats: str | Path | None = None,
        use_amp: bool | None = None,
        **inference: Any,
    ) -> VLAPredictor:
        """Load a shared policy: an exported folder, or a pi0 or pi0.5 as LeRobot or openpi write it.

        Args:
            name_or_path: a folder or its hub id, or anything that `from_checkpoint` takes.
            device, dataset, use_amp, inference: as for `from_checkpoint`.
            tokenizer_name_or_path, vision_num_attention_heads, norm_stats: of a pi0 or pi0.5 alone, whose folder does
                not say them; see `inference.published.published_checkpoint`. None: as the published ones have it.

        Raises:
            PolicyFolderError: such a folder can't be read or understood; the message names the file or the tensor.
            ValueError, CheckpointError, ImportError: as for `from_checkpoint`.
        """
        unsaid = {
            "tokenizer_name_or_path": tokenizer_name_or_path,
            "vision_num_attention_heads": vision_num_attention_heads,
            "norm_stats": norm_stats,
        }
        checkpoint = read_policy(name_or_path, **{key: value for key, value in unsaid.items() if value is not None})
        return cls._from_dict(checkpoint, str(name_or_path), device, dataset, use_amp, inference)

    @classmethod
    def _from_dict(
        cls,
        checkpoint: dict[str, Any],
        source: str,
        device: str | torch.device,
        dataset: str | None,
        use_amp: bool | None,
        inference: dict[str, Any],
    ) -> VLAPredictor:
        config = config_from_dict(checkpoint["config"], source=source)
        model, processors = VLAModel.from_checkpoint(checkpoint), processors_from_checkpoint(checkpoint)
        weights = fingerprint(model.state_dict())  # before they are quantized
        predictor = cls(model, config, *processors, device=device, dataset=dataset, use_amp=use_amp, **inference)
        predictor.calibrations = checkpoint.get("alarm") or []
        predictor.alarm, predictor.no_alarm = predictor.new_alarm()
        predictor.fingerprint = weights
        profiles = checkpoint.get("training_data") or []
        if len(profiles) > predictor.dataset_index and is_profile(profiles[predictor.dataset_index]):
            predictor.training_data = profiles[predictor.dataset_index]
            predictor._monitor = Monitor(predictor.training_data, predictor.horizon)
        if predictor.compile != "none" or predictor.device.type == "cuda":
            predictor.warm_up()
        return predictor

    def warm_up(self, batch_size: int = 1) -> None:
        """Predict once on blank images, so that compilation, graph capture and the GPU's own start are over.

        Args:
            batch_size: observations predicted together; compiled code and graphs serve one size each.
        """
        batch = example_batch(self.config, image_size=self.image_processor.height, batch_size=batch_size)
        started = time.perf_counter()
        self.predict_batch(batch, [0] * batch_size)
        seconds = time.perf_counter() - started
        logger.info("first prediction of %d, compile %s: %.1f s", batch_size, self.compile, seconds)

    def predict(
        self,
        images_1: Frame | Sequence[Frame] | None = None,
        images_2: Frame | Sequence[Frame] | None = None,
        *,
        prompt: str,
        state: State | None = None,
        images: Mapping[str, Frame | Sequence[Frame] | None] | None = None,
        seed: int | None = None,
        noise: np.ndarray | None = None,
        num_inference_steps: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> np.ndarray:
        """The next actions.

        Args:
            images_1: the first camera, one frame or several (oldest first, the current one last, at most max_seq_len).
                Of more frames than that the newest are used, with one warning. A frame is an encoded JPEG or PNG
                (bytes, BytesIO, a path), a PIL image, or an RGB array or torch tensor (H, W, 3) or (3, H, W) of any
                size: uint8, or floats from 0 to 1.
            images_2: its second camera, as many frames. A policy trained with two cameras masks it when None, as it
                does with data that lack it, and warns once; a policy trained with one camera ignores it.
            images: frames by the names in `cameras`, instead of the two or beside them; what neither gives is masked.
            prompt: the instruction.
            state: (state_dim,), physical units, or the values of each column by name (`state_widths`); may be None only
                for a policy that takes no state.
            seed: of the sampling noise; the same seed gives the same actions. None: one from torch's global generator.
            noise: instead of a seed the noise itself, float32, shaped as the head takes it: (T, A) for flow matching,
                (T, max_action_dim) for the action expert, whose padding is noise too.
            num_inference_steps: sampling steps; None: the predictor's default.
            prefix: what the actions have to continue (physical units, B = 1); see `inference.closed_loop.execution`.

        Returns:
            float32 (horizon, per_action_dim), physical units.

        Raises:
            ObservationError: missing camera, unreadable frame, empty prompt, state of another width or not
                finite, a seed that is no whole number from 0 to 2**63 - 1, fewer than one sampling step.
        """
        batch = self.observe(images_1, images_2, prompt=prompt, state=state, images=images)
        if noise is not None and self.settings.best_of > 1:
            raise ValueError("noise is that of one draw, and best_of takes several; give a seed instead, or best_of=1")
        if noise is not None:
            batch["noise"] = checked_noise(noise, seed, self.model.draw_noise([[0]], self.num_inference_steps))
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        started = time.perf_counter()
        actions, uncertainty = self.predict_measured(batch, [[seed]], num_inference_steps, prefix)
        if self._monitor is not None:
            self._monitor.predicted(time.perf_counter() - started)
        self.uncertainty = float(uncertainty[0, 0])
        if self.alarm is not None and num_inference_steps in (None, self.num_inference_steps):
            self.alarm.add(self.uncertainty)
        return actions[0, 0]

    def new_alarm(self) -> tuple[Alarm | None, str]:
        """The alarm of one stream of predictions, or None and why there is none; see `inference.alarm`.

        Call `alarm.restart()` where an episode begins.
        """
        settings = alarm_settings(self.model.action_head, self.settings, self.dataset.name)
        calibration, reason = matching(self.calibrations, settings)
        return (None if calibration is None else Alarm(calibration)), reason

    def predict_batch(
        self,
        batch: Batch,
        seeds: Sequence[int],
        num_inference_steps: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> np.ndarray:
        """The next actions of a collated batch (`observe`, or dataset samples through `collate_fn`).

        Args:
            batch: the data contract; actions are not needed.
            seeds: one per sample, so that a sample's noise does not depend on what else is in the batch.
            num_inference_steps: sampling steps; None: the predictor's default.
            prefix: what the actions have to continue, physical units; weights 0 for a sample that continues nothing.

        Returns:
            float32 (B, horizon, per_action_dim), physical units.

        Raises:
            ObservationError: an empty batch, or not one valid seed per sample.
        """
        return self.predict_draws(batch, [seeds], num_inference_steps, prefix)[0]

    def predict_draws(
        self,
        batch: Batch,
        seeds: Sequence[Sequence[int]],
        num_inference_steps: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> np.ndarray:
        """Several draws for each observation of a batch, which is encoded once.

        Args:
            batch, num_inference_steps, prefix: as `predict_batch` takes them; `noise` in a batch is taken as it is.
            seeds: per draw one seed for every sample.

        Returns:
            float32 (draws, B, horizon, per_action_dim), physical units.

        Raises:
            ObservationError: as `predict_batch` does.
        """
        return self.predict_measured(batch, seeds, num_inference_steps, prefix).action_KBTA

    def predict_measured(
        self,
        batch: Batch,
        seeds: Sequence[Sequence[int]],
        num_inference_steps: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> Measured:
        """`predict_draws`, and how unsure each is. With `inference.best_of` N each is the best of N draws."""
        best_of = self.settings.best_of
        seeds = [checked_seeds(seeds_B, len(batch["state"])) for seeds_B in seeds]
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ObservationError(f"num_inference_steps is {steps}; give 1 or more")
        seeds = draw_seeds(seeds, best_of)
        if "noise" not in batch:
            noise = self.model.draw_noise(seeds, steps)
            batch = batch if noise is None else {**batch, "noise": noise}
        prefix = None if prefix is None else self.action_units.widened(prefix)
        action_KBTA, unsure_KBT = self.engine(batch, steps, num_draws=len(seeds), prefix=prefix)
        actions = action_KBTA[..., : self.horizon, : self.per_action_dim].cpu().numpy()
        if best_of == 1:
            return Measured(actions, unsure_KBT[..., : self.horizon].mean(dim=-1).cpu().numpy())
        state = np.tile(batch["state"].cpu().numpy(), (len(seeds), 1))
        normalized = self.action_units.normalize(actions.reshape(-1, *actions.shape[2:]), state).reshape(actions.shape)
        return best_of_draws(actions, normalized, best_of)

    def observe(
        self,
        images_1: Frame | Sequence[Frame] | None = None,
        images_2: Frame | Sequence[Frame] | None = None,
        *,
        prompt: str,
        state: State | None = None,
        images: Mapping[str, Frame | Sequence[Frame] | None] | None = None,
    ) -> Batch:
        """The batch of one that `predict` gives the model; arguments and errors as there."""
        given = {"prompt": prompt, "state": state, "images": images, "monitor": self._monitor}
        return collate_fn([self.observation(images_1, images_2, **given)])

    def observation(
        self,
        images_1: Frame | Sequence[Frame] | None = None,
        images_2: Frame | Sequence[Frame] | None = None,
        *,
        prompt: str,
        state: State | None = None,
        images: Mapping[str, Frame | Sequence[Frame] | None] | None = None,
        warnings: dict[str, str] | None = None,
        monitor: Monitor | None = None,
    ) -> Sample:
        """The sample that `observe` makes a batch of; `collate_fn` joins several for `predict_batch`.

        Args:
            images_1, images_2, prompt, state, images: as `predict` takes them.
            warnings: takes what speaks against the observation (kind -> text). None: it is logged, once a kind.
            monitor: of the stream that it belongs to: compares it with the training data.
        """
        told = {} if warnings is None else warnings
        frames = frames_by_camera(self.cameras, self.max_seq_len, images_1, images_2, images, told)
        takes_state = self.config.reads_state
        values = checked_state(state, self.state_widths, takes_state)
        statistics = self.model.statistics[self.dataset_index]["state"]
        if takes_state and (outside := outside_training(values, statistics, self.state_widths)) is not None:
            told["state"] = outside
        padded = np.pad(values, (0, self.config.data.state_dim - self.state_dim))
        if (cut := self.prompt_tokenizer.cut(prompt, padded, self.dataset_index)) is not None:
            told["prompt"] = cut
        sample = build_observation(
            frames,
            prompt,
            padded,
            cameras=self.cameras,
            max_seq_len=self.max_seq_len,
            image_processor=self.image_processor,
            prompt_tokenizer=self.prompt_tokenizer,
            dataset_index=self.dataset_index,
        )
        if monitor is not None:
            present = zip(self.cameras, sample["image_mask"].tolist(), strict=True)
            newest = {camera: sample[camera][-1] for camera, is_there in present if is_there}
            told.update(monitor.look(newest, values if takes_state else None, prompt))
        if warnings is None:
            self._log_once(told)
        return sample

    def _log_once(self, warnings: dict[str, str]) -> None:
        for kind, text in warnings.items():
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("%s", text)
