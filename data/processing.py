"""From camera frames, an instruction and a state to the model's inputs, for training and serving alike.

`VLADataset` and `VLAPredictor` decode with the same `VLAImageProcessor` and tokenize with the same `PromptTokenizer`,
so a frame that was trained on and the same frame seen by the robot give the same tensors (tested).
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decoding import decode_frame, upright_rgb
from utils.backbones import BACKBONE_SPECS
from utils.batch import Batch
from utils.config_utils import Config

logger = logging.getLogger(__name__)

MAX_KNOWN_PROMPTS = 4096  # tokenized instructions that are kept; a server may be sent any number of them
Frame = bytes | memoryview | str | Path | Image.Image | np.ndarray
Sample = dict[str, Any]


class ObservationError(ValueError):
    """A frame, state or prompt can't be used; the message says what was found and what was wanted."""


class VLAImageProcessor:
    """Decodes a frame and resizes it to the backbone's input size.

    The aspect ratio is not kept (PaliGemma's own preprocessing). The result stays uint8: rescaling and
    normalization happen on the device, with `mean` and `std` that the model keeps as buffers.
    """

    def __init__(self, height: int, width: int, mean: Sequence[float], std: Sequence[float], resample: int) -> None:
        self.height, self.width = height, width
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.resample = Image.Resampling(resample)

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> VLAImageProcessor:
        """Read `preprocessor_config.json` of a Hugging Face directory or hub id.

        Raises:
            ObservationError: no such file, or preprocessing that this class does not do.
        """
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ObservationError(
                f"image processor: no preprocessor_config.json at {name_or_path!r} ({reason}); set "
                "data.image_processor_name_or_path to a directory or hub id that has one"
            ) from None
        return cls.from_settings(settings, name_or_path)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], place: str) -> VLAImageProcessor:
        """Build from the content of a `preprocessor_config.json`; `place` names it in errors."""
        size = settings.get("size", {})
        if isinstance(size, int):
            size = {"height": size, "width": size}
        fault = None
        if "height" not in size or "width" not in size:
            fault = f"size is {size}; wanted height and width"
        elif settings.get("do_center_crop") or settings.get("do_pad"):
            fault = "do_center_crop and do_pad are not supported; wanted both false"
        elif abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
            fault = f"rescale_factor is {settings['rescale_factor']}; wanted 1/255"
        if fault is not None:
            remedy = "set data.image_processor_name_or_path to a directory or hub id whose preprocessing is such"
            raise ObservationError(f"image processor at {place!r}: {fault}; {remedy}")
        mean, std = settings.get("image_mean", (0.5,) * 3), settings.get("image_std", (0.5,) * 3)
        return cls(size["height"], size["width"], mean, std, settings.get("resample", Image.Resampling.BICUBIC))

    def to_settings(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` that gives this processor again."""
        return {
            "size": {"height": self.height, "width": self.width},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": int(self.resample),
            "rescale_factor": 1 / 255,
        }

    def __call__(self, frame: Frame) -> Tensor:
        """Decode and resize one frame; see `decode_into`.

        Returns:
            uint8 (3, height, width), RGB, a view of memory laid out as (height, width, 3).
        """
        out = np.empty((self.height, self.width, 3), dtype=np.uint8)
        self.decode_into(frame, out)
        return torch.from_numpy(out).permute(2, 0, 1)

    def decode_into(self, frame: Frame, out: np.ndarray) -> None:
        """Decode one frame and resize it to fill `out`.

        A JPEG larger than needed is scaled down while it is decoded (by eighths of its size, never below what is
        needed) and resampled from there: training and serving do the same to the same bytes (`data/decoding.py`).

        Args:
            frame: encoded JPEG or PNG bytes, a path, a PIL image, or a uint8 RGB array (H, W, 3).
            out: uint8 (height, width, 3), contiguous.

        Raises:
            ObservationError: bytes or a file that can't be decoded, more than 8 bits a value, or an array of another
                type or shape.
        """
        place = "image"
        if isinstance(frame, (str, Path)):
            place, frame = str(frame), _read(Path(frame))
        if isinstance(frame, np.ndarray):
            if (fault := array_fault(frame)) is not None:
                raise ObservationError(f"image: array is {fault}")
            pixels = np.ascontiguousarray(frame)
        elif isinstance(frame, Image.Image):
            try:
                pixels = np.array(upright_rgb(frame))
            except ValueError as error:
                raise ObservationError(f"image: {error}") from None
        else:
            try:
                pixels = decode_frame(frame, self.height, self.width, out)
            except (OSError, SyntaxError, ValueError) as error:
                found = f"{len(frame)} bytes is no readable JPEG or PNG ({error})"
                raise ObservationError(f"{place}: {found}") from None
        if pixels is out:
            return
        if pixels.shape[:2] != (self.height, self.width):
            pixels = Image.fromarray(pixels).resize((self.width, self.height), self.resample)
        out[:] = pixels


def array_fault(frame: np.ndarray) -> str | None:
    """Why an array can't be a frame: what it is and what is wanted; None for one that can."""
    if frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 and frame.size:
        return None
    return f"{frame.dtype} {frame.shape}; wanted uint8 (H, W, 3), RGB"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ObservationError(f"image: {path} is no readable file ({error})") from None


class PromptTokenizer:
    """Turns an instruction into text tokens: a prefix, the instruction, a closing newline.

    The prefix is what the backbone was pretrained with: `<bos>` for PaliGemma; for other language models whatever
    their tokenizer itself puts in front of a text (`<s>` for Llama, nothing for Qwen). No padding token is needed,
    for padding is masked. Image tokens are not part of it: they are the backbone's affair.
    """

    def __init__(self, tokenizer: Any, max_len: int, backbone: str = "paligemma") -> None:
        """
        Args:
            tokenizer: of transformers.
            max_len: tokens, the prefix and the newline included.
            backbone: `model.vlm_config.type`.
        """
        self.tokenizer, self.max_len = tokenizer, max_len
        starts_with_bos = BACKBONE_SPECS[backbone].prompt_start == "bos"
        self.prefix = [tokenizer.bos_token_id] if starts_with_bos else _own_prefix(tokenizer)
        self._known: dict[str, Tensor] = {}
        self._warned = False

    @classmethod
    def from_pretrained(cls, name_or_path: str, max_len: int, backbone: str = "paligemma") -> PromptTokenizer:
        """Load the tokenizer of a Hugging Face directory or hub id.

        Raises:
            ObservationError: no tokenizer there, or for PaliGemma one without a `<bos>` token.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ObservationError(
                f"tokenizer: none at {name_or_path!r} ({reason}); set data.tokenizer_name_or_path to a directory or "
                "hub id that has one"
            ) from None
        if BACKBONE_SPECS[backbone].prompt_start == "bos" and tokenizer.bos_token_id is None:
            raise ObservationError(
                f"tokenizer at {name_or_path!r} has no <bos> token, which the prompt of a {backbone} needs"
            )
        return cls(tokenizer, max_len, backbone)

    @classmethod
    def from_files(cls, files: dict[str, Tensor], max_len: int, backbone: str = "paligemma") -> PromptTokenizer:
        """Load from the tokenizer files that a checkpoint carries (name -> uint8 content)."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
            return cls.from_pretrained(folder, max_len, backbone)

    def reads_like(self, other: PromptTokenizer) -> bool:
        """Whether every instruction becomes the same tokens as with another one, lengths aside."""
        return self.prefix == other.prefix and _rules(self.tokenizer) == _rules(other.tokenizer)

    def to_files(self) -> dict[str, Tensor]:
        """The tokenizer's files as a checkpoint carries them (name -> uint8 content)."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return {
                path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
                for path in sorted(Path(folder).iterdir())
                if path.is_file()
            }

    def __call__(self, prompt: str) -> list[int]:
        """Token ids of one instruction, at most `max_len`; a longer one is cut before the newline, with one warning.

        Raises:
            ObservationError: the prompt is empty.
        """
        return self.tensor(prompt).tolist()

    def tensor(self, prompt: str) -> Tensor:
        """The same as int64 (L,), made once per instruction and not to be changed; errors as above."""
        ids_L = self._known.get(prompt)
        if ids_L is None:
            ids_L = torch.tensor(self._encode(prompt), dtype=torch.int64)
            while len(self._known) >= MAX_KNOWN_PROMPTS:
                # The oldest, from a copy: another thread of a server may change the dict meanwhile.
                self._known.pop(next(iter(list(self._known)), None), None)
            self._known[prompt] = ids_L
        return ids_L

    def _encode(self, prompt: str) -> list[int]:
        text = " ".join(prompt.split())
        if not text:
            raise ObservationError(f"prompt is {prompt!r}; a policy needs an instruction")
        ids = [*self.prefix, *self.tokenizer.encode(text + "\n", add_special_tokens=False)]
        if len(ids) <= self.max_len:
            return ids
        if not self._warned:
            self._warned = True
            logger.warning(
                "prompt of %d tokens cut to data.prompt_max_len %d: %r; raise prompt_max_len to keep it whole",
                len(ids),
                self.max_len,
                text,
            )
        return [*ids[: self.max_len - 1], ids[-1]]


def _own_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def _rules(tokenizer: Any) -> Any:
    """What decides which tokens a text becomes: comparable by value."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}


def build_observation(
    images: dict[str, Sequence[Frame] | None],
    prompt: str,
    state: np.ndarray,
    *,
    cameras: Sequence[str],
    max_seq_len: int,
    image_processor: VLAImageProcessor,
    prompt_tokenizer: PromptTokenizer,
) -> Sample:
    """One sample of the batch contract, without actions.

    Args:
        images: per camera its frames, oldest first and the current one last, at most `max_seq_len` of them;
            None where the camera is absent.
        prompt: the instruction as written.
        state: float32 (state_dim,), physical units.
        cameras: the cameras that the model reads, in slot order.
        max_seq_len: frames per sample; earlier ones that do not exist are zeros and masked.
        image_processor, prompt_tokenizer: as the checkpoint or the config gives them.

    Returns:
        `image_*` uint8 (max_seq_len, 3, H, W), `image_mask` bool (V,),
        `vlm_attention_mask` bool (max_seq_len,), `raw_prompt_text`, `input_ids` int64 (L,), `state` float32
        (state_dim,).

    Raises:
        ObservationError: unreadable frame, empty prompt, no camera at all, more frames than `max_seq_len`.
    """
    present = [camera for camera in cameras if images.get(camera) is not None]
    if not present:
        raise ObservationError(f"no image: the policy reads {', '.join(cameras)} and none was given")
    num_frames = len(images[present[0]])
    if not 1 <= num_frames <= max_seq_len:
        raise ObservationError(f"{present[0]}: {num_frames} frames; wanted 1 to max_seq_len {max_seq_len}")
    sample: Sample = {}
    first = max_seq_len - num_frames
    shape = (max_seq_len, image_processor.height, image_processor.width, 3)
    for camera in cameras:
        frames = np.zeros(shape, dtype=np.uint8)
        if camera in present:
            if len(images[camera]) != num_frames:
                raise ObservationError(
                    f"{camera}: {len(images[camera])} frames but {present[0]} has {num_frames}; give as many of each"
                )
            for slot, frame in enumerate(images[camera], start=first):
                try:
                    image_processor.decode_into(frame, frames[slot])
                except ObservationError as error:
                    raise ObservationError(f"{camera}: {error}") from None
        sample[camera] = torch.from_numpy(frames).permute(0, 3, 1, 2)
    sample["image_mask"] = torch.tensor([camera in present for camera in cameras])
    sample["vlm_attention_mask"] = torch.arange(max_seq_len) >= first
    sample["raw_prompt_text"] = prompt
    sample["input_ids"] = prompt_tokenizer.tensor(prompt)
    sample["state"] = torch.from_numpy(np.array(state, dtype=np.float32))
    return sample


def collate_fn(samples: Sequence[Sample]) -> Batch:
    """Stack samples into the batch of the data contract.

    Prompts are right-padded to the longest of the batch; `prompt_mask` is False on padding, and samples without padding
    may leave it out. Every other tensor is stacked along a new first dimension, and text is collected into a list.
    Images keep the memory layout that decoders produce (channels last), so that no pixel is moved twice.
    """
    batch: Batch = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if key == "input_ids":
            masks = [sample.get("prompt_mask", torch.ones_like(sample[key], dtype=torch.bool)) for sample in samples]
            batch["input_ids"], batch["prompt_mask"] = (
                torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True) for tensors in (values, masks)
            )
        elif key == "prompt_mask":
            continue  # padded together with its ids
        elif isinstance(first, Tensor) and first.ndim == 4:
            batch[key] = torch.stack([value.permute(0, 2, 3, 1) for value in values]).permute(0, 1, 4, 2, 3)
        elif isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, str):
            batch[key] = values
        else:
            batch[key] = torch.tensor(values, dtype=torch.int64)
    return batch


def processors_from_checkpoint(
    checkpoint: dict[str, Any], config: Config | None = None
) -> tuple[VLAImageProcessor, PromptTokenizer]:
    """The image processor and the tokenizer that a checkpoint was trained with, from the checkpoint alone.

    Args:
        checkpoint: as loaded.
        config: of a run that trains on from it: its `prompt_max_len` counts, and a tokenizer or image processor that
            it names must be the checkpoint's.

    Raises:
        ObservationError: the config names another one, or one that is not there.
    """
    image_processor = VLAImageProcessor.from_settings(checkpoint["image_processor"], "checkpoint")
    saved, backbone = checkpoint["config"]["data"], checkpoint["config"]["model"]["vlm_config"]["type"]
    max_len = saved["prompt_max_len"] if config is None else config.data.prompt_max_len
    tokenizer = PromptTokenizer.from_files(checkpoint["tokenizer_files"], max_len, backbone)
    for key in (
        () if config is None else ("tokenizer_name_or_path", "image_processor_name_or_path", "siglip_model_name")
    ):
        named = getattr(config.data, key)
        if named is None:
            continue
        try:
            if key == "tokenizer_name_or_path":
                same = PromptTokenizer.from_pretrained(named, max_len, backbone).reads_like(tokenizer)
            else:
                same = VLAImageProcessor.from_pretrained(named).to_settings() == image_processor.to_settings()
        except ObservationError:
            if named == saved.get(key):
                continue  # a checkpoint needs nothing beside itself
            raise
        if not same:
            raise ObservationError(
                f"data.{key}: {named!r} is another one than the checkpoint's, which its weights were trained with; "
                f"remove data.{key} to keep the checkpoint's, or begin from the pretrained backbone"
            )
    return image_processor, tokenizer


def processors_from_config(config: Config) -> tuple[VLAImageProcessor, PromptTokenizer]:
    """The image processor and the tokenizer that a config names; the backbone's own where it names none.

    Raises:
        ObservationError: one of them is not there; a missing backbone folder is named as such.
    """
    vlm = config.model.vlm_config
    image_source, tokenizer_source = processor_sources(config)
    spec = BACKBONE_SPECS[vlm.type]
    for part, folder in zip(spec.parts, vlm.pretrained_paths, strict=True):
        if folder.startswith(("/", "./", "../", "~")) and not Path(folder).is_dir():
            raise ObservationError(
                f"model.vlm_config.{part.key}: no folder {folder!r}; {spec.remedy(part.key, folder)}"
            )
    return (
        VLAImageProcessor.from_pretrained(image_source),
        PromptTokenizer.from_pretrained(tokenizer_source, config.data.prompt_max_len, vlm.type),
    )


def processor_sources(config: Config) -> tuple[str, str]:
    """Directories or hub ids of the image processor and of the tokenizer."""
    data, paths = config.data, config.model.vlm_config.pretrained_paths
    image_source = data.image_processor_name_or_path or data.siglip_model_name or paths[0]
    return image_source, data.tokenizer_name_or_path or paths[-1]
