"""What a policy's actions are relative to, and how its head sees them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from model.context import ActionPrefix
from model.vla_model import VLAModel
from utils.config_utils import Config


class ActionUnits:
    """Between physical units and those of the head, for the dataset whose robot a policy drives.

    Attributes:
        statistics: of that dataset's training actions, physical units; in delta mode, of deltas.
    """

    def __init__(self, model: VLAModel, config: Config, dataset_index: int, per_action_dim: int) -> None:
        """
        Args:
            model: on the device where it acts.
            config: that it was trained with.
            dataset_index: of the dataset, among those that it was trained on.
            per_action_dim: width of that dataset's actions.
        """
        self.statistics: dict[str, list[float]] = model.statistics[dataset_index]["action"]
        self._normalizer, self._index, self._width = model.normalizer, dataset_index, per_action_dim
        self._model_widths = model.action_head.per_action_dim, config.data.state_dim
        self._model_horizon = model.action_head.horizon

    def mean(self, state_NS: np.ndarray) -> np.ndarray:
        """The training data's mean action for each state, float32 (N, A), physical units.

        In delta mode the mean is of deltas, so the state is added to the dimensions that are relative.
        """
        return np.array(self.statistics["mean"], np.float32) + self.origin(state_NS)

    def origin(self, state_NS: np.ndarray) -> np.ndarray:
        """What actions are relative to, float32 (N, A): in delta mode the state, 0 in dimensions that are absolute."""
        delta_A = self._normalizer.action_is_delta_A[: self._width].cpu().numpy()
        state_NA = np.pad(state_NS, ((0, 0), (0, max(0, self._width - state_NS.shape[1]))))[:, : self._width]
        return np.where(delta_A, state_NA, 0.0).astype(np.float32)

    @torch.no_grad()
    def normalize(self, action_NTA: np.ndarray, state_NS: np.ndarray) -> np.ndarray:
        """Actions (N, T, A) in physical units as the head sees them, float32, for errors in normalized units.

        `state_NS` is the physical state at each chunk's start, in the dataset's width or the model's.
        """
        model_action, model_state = self._model_widths
        action = np.pad(action_NTA, ((0, 0), (0, 0), (0, model_action - action_NTA.shape[-1])))
        state = np.pad(state_NS, ((0, 0), (0, model_state - state_NS.shape[-1])))
        device = self._normalizer.action_is_delta_A.device
        index = torch.full((len(action),), self._index, dtype=torch.int64, device=device)
        tensors = (torch.as_tensor(np.asarray(x, np.float32), device=device) for x in (action, state))
        return self._normalizer.normalize_action(*tensors, index)[..., : self._width].cpu().numpy()

    def widened(self, prefix: ActionPrefix) -> ActionPrefix:
        """A prefix of the dataset's widths in the model's, on its device: what it lacks is free."""
        device, (model_action, _) = self._normalizer.action_is_delta_A.device, self._model_widths
        missing = self._model_horizon - prefix.action_BTA.shape[1]
        action_BTA = F.pad(prefix.action_BTA, (0, model_action - prefix.action_BTA.shape[2], 0, missing))
        weight_BT = F.pad(prefix.weight_BT, (0, missing))
        return replace(prefix, action_BTA=action_BTA.to(device), weight_BT=weight_BT.to(device))
