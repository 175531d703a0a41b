"""From a collated batch to actions, with everything that repeats kept: embedded prompts, schedules, compiled code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from data.processing import Batch
from inference.acceleration import TensorFunction, Tensors, accelerate
from model.context import ActionPrefix
from model.vla_model import VLAModel

OBSERVATION = ("image_mask", "vlm_attention_mask", "state", "dataset_index")  # read beside the images and the prompt
MAX_EMBEDDED_PROMPTS = 256  # instructions whose embeddings stay on the device
MAX_FUNCTIONS = 8  # numbers of draws and of integration steps whose schedules, compiled code and graphs are kept


class Sampler:
    """Runs a model that no longer changes: what it keeps was computed from the weights as they are.

    The host does what a GPU would have to be waited for: it draws the noise and finds the images that exist. Where
    code is compiled or captured, prompts are padded to one length, so that instructions don't multiply shapes.

    Args:
        model: in evaluation mode, on `device`.
        compile: `inference.compile`.
        prompt_max_len: text tokens of the longest prompt.
        num_inference_steps: that predictions take unless told otherwise.
        device: of the model.

    Raises:
        ValueError: the device can't do what `compile` asks for, or the head not so many steps.
    """

    def __init__(
        self, model: VLAModel, compile: str, prompt_max_len: int, num_inference_steps: int, device: torch.device
    ) -> None:
        self.model, self.compile, self.device = model, compile, device
        self._prompt_length = prompt_max_len if compile != "none" else None
        self._embedded = functools.lru_cache(maxsize=MAX_EMBEDDED_PROMPTS)(self._embed)
        self._schedule = functools.lru_cache(maxsize=MAX_FUNCTIONS)(self._make_schedule)
        self._function = functools.lru_cache(maxsize=MAX_FUNCTIONS)(self._make_function)
        self._function(1, num_inference_steps)  # so that what device or head can't do is refused here

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        generators: Sequence[torch.Generator | Sequence[torch.Generator] | None],
        num_inference_steps: int,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """Actions, float32 (K, B, T, A), physical units; arguments one entry of `generators` per draw.

        With a prefix the model runs as it is, whatever `compile` says: guidance differentiates the network.
        """
        tensors = self.prepared(batch)
        rows = [_per_sample(draw, len(batch["state"])) for draw in generators]
        noise = [self.model.action_head.draw_noise(row, self.device, num_inference_steps) for row in rows]
        if noise[0] is not None:
            tensors["noise"] = torch.stack(noise)
        if prefix is not None:
            schedule = self._schedule(num_inference_steps)
            steps = {"num_draws": len(generators), "num_inference_steps": num_inference_steps}
            return self.model.act(tensors, **steps, schedule=schedule, prefix=prefix)
        return self._function(len(generators), num_inference_steps)(tensors)

    @torch.no_grad()
    def prepared(self, batch: Batch) -> Tensors:
        """The tensors that the model reads, on its device, with what `VLAModel.encode` may be told beforehand."""
        ids_BL, mask_BL = batch["input_ids"], batch["prompt_mask"]
        if self._prompt_length is not None:
            missing = self._prompt_length - ids_BL.shape[1]
            ids_BL, mask_BL = F.pad(ids_BL, (0, missing)), F.pad(mask_BL, (0, missing))
        slot_mask_BSV = batch["vlm_attention_mask"][:, :, None] & batch["image_mask"][:, None, :]
        tensors = {name: batch[name] for name in (*self.model.cameras, *OBSERVATION)}
        tensors |= {"prompt_mask": mask_BL, "image_slots": slot_mask_BSV.flatten().nonzero().squeeze(1)}
        tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        rows = [self._embedded(tuple(ids)) for ids in ids_BL.tolist()]
        return {**tensors, "prompt_embeds": torch.stack(rows) if len(rows) > 1 else rows[0][None]}

    @torch.no_grad()
    def _embed(self, input_ids: tuple[int, ...]) -> Tensor:
        """The tokens of one instruction as the backbone fuses them, (L, E)."""
        with self.model.autocast():
            return self.model.backbone.embed_prompt(torch.tensor([input_ids], device=self.device))[0]

    @torch.no_grad()
    def _make_schedule(self, num_inference_steps: int) -> Any:
        with self.model.autocast():
            return self.model.action_head.schedule(num_inference_steps, self.device)

    def _make_function(self, num_draws: int, num_inference_steps: int) -> TensorFunction:
        """Prepared tensors and noise to actions: `VLAModel.act`, run as `inference.compile` says."""
        steps = {"num_draws": num_draws, "num_inference_steps": num_inference_steps}
        schedule = self._schedule(num_inference_steps)
        if self.compile in ("default", "max-autotune"):
            for tensor in filter(torch.is_tensor, tree_leaves(schedule)):
                torch._dynamo.mark_static_address(tensor)  # as weights are: else inductor's graphs copy it every time
        function = functools.partial(self.model.act, **steps, schedule=schedule)
        return accelerate(function, self.compile, self.device)


def _per_sample(
    generators: torch.Generator | Sequence[torch.Generator] | None, batch_size: int
) -> Sequence[torch.Generator]:
    """One generator per sample; None: seeded by torch's global one."""
    if generators is None:
        return [torch.Generator().manual_seed(seed) for seed in torch.randint(2**62, (batch_size,)).tolist()]
    return [generators] if isinstance(generators, torch.Generator) else generators
