"""From camera frames, an instruction and a state to the model's inputs, for training and serving alike.

`VLADataset` and `VLAPredictor` decode with the same `VLAImageProcessor` and tokenize with the same `PromptTokenizer`,
so a frame that was trained on and the same frame seen by the robot give the same tensors (tested).
"""

from __future__ import annotations

import io
import logging
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decoding import ObservationError, array_pixels, check_range, decode_frame, upright_rgb
from data.decoding import array_fault as array_fault  # for the server
from data.image_fit import letterbox_bytes, letterbox_float
from data.prompts import PromptTokenizer
from utils.backbones import BACKBONE_SPECS
from utils.batch import Batch
from utils.config_utils import Config, config_from_dict
from utils.foreign_files import ForeignFileError, check_processor_folder
from utils.hub import hub_options
from utils.text import printable

logger = logging.getLogger(__name__)

MAX_SIDE = 4096  # pixels of the images that a model takes
# What PIL and simplejpeg run into on bytes that are no image, or a crafted one.
DECODING_FAULTS = (
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)
Frame = bytes | bytearray | memoryview | io.BytesIO | str | Path | Image.Image | np.ndarray | Tensor
Sample = dict[str, Any]


class VLAImageProcessor:
    """Decodes a frame and fits it to the backbone's input size.

    `stretch` gives up the aspect ratio (PaliGemma's own preprocessing); `pad` and `pad_bytes` keep it, between black
    bars (`data/image_fit.py`). The result stays uint8: rescaling and normalization happen on the device, with `mean`
    and `std` that the model keeps as buffers. `pad` alone, which interpolates in float32, gives values from 0 to 1.

    Attributes:
        pixel_type: numpy's, of the values that it makes.
    """

    def __init__(
        self,
        height: int,
        width: int,
        mean: Sequence[float],
        std: Sequence[float],
        resample: int,
        fit: str = "stretch",
    ) -> None:
        """
        Args:
            height, width: of the result.
            mean, std: per channel, on the scale of pixels in [0, 1].
            resample: Pillow's filter, of `stretch`.
            fit: `data.image_fit`.
        """
        self.height, self.width, self.fit = height, width, fit
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.resample = Image.Resampling(resample)
        self.pixel_type = np.dtype(np.float32 if fit == "pad" else np.uint8)

    @classmethod
    def from_pretrained(cls, name_or_path: str, fit: str = "stretch") -> VLAImageProcessor:
        """Read `preprocessor_config.json` of a Hugging Face directory or hub id, which says nothing of `fit`.

        Raises:
            ObservationError: no such file, or preprocessing that this class does not do.
        """
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            check_processor_folder(Path(name_or_path))
            settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **hub_options(name_or_path))
        except (OSError, ForeignFileError) as error:
            reason = str(error).splitlines()[0]
            raise ObservationError(
                f"image processor: no preprocessor_config.json at {name_or_path!r} ({reason}); set "
                "data.image_processor_name_or_path to a directory or hub id that has one"
            ) from None
        return cls.from_settings({**settings, "fit": fit}, name_or_path)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], place: str) -> VLAImageProcessor:
        """Build from the content of a `preprocessor_config.json`; `place` names it in errors."""
        size = settings.get("size", {})
        if isinstance(size, int):
            size = {"height": size, "width": size}
        mean, std = settings.get("image_mean", (0.5,) * 3), settings.get("image_std", (0.5,) * 3)
        resample = settings.get("resample", Image.Resampling.BICUBIC)
        fault = None
        if not isinstance(size, dict) or "height" not in size or "width" not in size:
            fault = f"size is {printable(size)}; wanted height and width"
        elif not all(type(size[side]) is int and 1 <= size[side] <= MAX_SIDE for side in ("height", "width")):
            fault = f"size is {printable(size)}; wanted whole numbers from 1 to {MAX_SIDE}"
        elif not all(_is_three_numbers(values) for values in (mean, std)) or 0 in std:
            fault = f"image_mean is {printable(mean)} and image_std {printable(std)}; wanted three finite numbers each"
        elif resample not in list(Image.Resampling):
            fault = f"resample is {printable(resample)}; wanted one of PIL's filters, 0 to 5"
        elif type(settings.get("rescale_factor", 1 / 255)) not in (int, float):
            fault = f"rescale_factor is {printable(settings['rescale_factor'])}; wanted 1/255"
        elif settings.get("do_center_crop") or settings.get("do_pad"):
            fault = "do_center_crop and do_pad are not supported; wanted both false"
        elif abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
            fault = f"rescale_factor is {settings['rescale_factor']}; wanted 1/255"
        if fault is not None:
            remedy = "set data.image_processor_name_or_path to a directory or hub id whose preprocessing is such"
            raise ObservationError(f"image processor at {place!r}: {fault}; {remedy}")
        return cls(size["height"], size["width"], mean, std, resample, settings.get("fit", "stretch"))

    def to_settings(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` that gives this processor again."""
        return {
            "size": {"height": self.height, "width": self.width},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": int(self.resample),
            "rescale_factor": 1 / 255,
            **({} if self.fit == "stretch" else {"fit": self.fit}),
        }

    def __call__(self, frame: Frame) -> Tensor:
        """Decode and resize one frame; see `decode_into`.

        Returns:
            (3, height, width) of `pixel_type`, RGB, a view of memory laid out as (height, width, 3).
        """
        out = np.empty((self.height, self.width, 3), dtype=self.pixel_type)
        self.decode_into(frame, out)
        return torch.from_numpy(out).permute(2, 0, 1)

    def decode_into(self, frame: Frame, out: np.ndarray) -> None:
        """Decode one frame and resize it to fill `out`.

        A JPEG larger than needed that is to be stretched is scaled down while it is decoded (by eighths of its size,
        never below what is needed) and resampled from there: training and serving do the same to the same bytes
        (`data/decoding.py`).

        Args:
            frame: an encoded JPEG or PNG (bytes, a BytesIO, a path, or uint8 (N,) as OpenCV encodes), a PIL image, or
                RGB pixels as `array_pixels` takes them. What this processor made is taken as it is.
            out: (height, width, 3) of `pixel_type`, contiguous.

        Raises:
            ObservationError: bytes or a file that can't be decoded, more than 8 bits a value, an array of another type,
                shape or range, or something else than a frame.
        """
        place = "image"
        if isinstance(frame, (str, Path)):
            place, frame = str(frame), _read(Path(frame))
        elif isinstance(frame, io.BytesIO):
            frame = frame.getvalue()
        elif isinstance(frame, Tensor):
            frame = (frame.float() if frame.is_floating_point() else frame).detach().cpu().numpy()
        if isinstance(frame, np.ndarray) and frame.ndim == 1 and frame.dtype == np.uint8:
            frame = frame.tobytes()
        if isinstance(frame, np.ndarray):
            if self.fit == "pad" and frame.dtype == self.pixel_type and frame.shape == out.shape:
                check_range(frame)
                out[:] = frame
                return
            pixels = array_pixels(frame)
        elif isinstance(frame, Image.Image):
            try:
                pixels = np.array(upright_rgb(frame))
            except ValueError as error:
                raise ObservationError(f"image: {error}") from None
        elif not isinstance(frame, (bytes, bytearray, memoryview)):
            found = f"image is a {type(frame).__name__}"
            raise ObservationError(
                f"{found}; wanted JPEG or PNG as bytes, a path, a PIL image, or an array or tensor of RGB pixels"
            )
        else:
            try:
                pixels = self._decode(frame, out)
            except DECODING_FAULTS as error:
                found = f"{len(frame)} bytes is no readable JPEG or PNG ({error})"
                raise ObservationError(f"{place}: {found}") from None
        if pixels is out:
            return
        if self.fit != "stretch":
            pixels = (letterbox_float if self.fit == "pad" else letterbox_bytes)(pixels, self.height, self.width)
        elif pixels.shape[:2] != (self.height, self.width):
            pixels = Image.fromarray(pixels).resize((self.width, self.height), self.resample)
        out[:] = pixels

    def _decode(self, encoded: bytes | memoryview, out: np.ndarray) -> np.ndarray:
        """`out`, filled, where a JPEG has that size; else uint8 (H, W, 3), the frame whole or reduced."""
        if self.fit == "stretch":
            return decode_frame(encoded, self.height, self.width, out)
        return decode_frame(encoded, 0, 0)


def _is_three_numbers(values: Any) -> bool:
    numbers = values if isinstance(values, list | tuple) else ()
    return len(numbers) == 3 and all(type(value) in (int, float) and math.isfinite(value) for value in numbers)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ObservationError(f"image: {path} is no readable file ({error})") from None


def build_observation(
    images: dict[str, Sequence[Frame] | None],
    prompt: str,
    state: np.ndarray,
    *,
    cameras: Sequence[str],
    max_seq_len: int,
    image_processor: VLAImageProcessor,
    prompt_tokenizer: PromptTokenizer,
    dataset_index: int = 0,
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
        dataset_index: whose statistics apply.

    Returns:
        Each camera's frames (max_seq_len, 3, H, W) of the image processor's `pixel_type`, `image_mask` bool (V,),
        `vlm_attention_mask` bool (max_seq_len,), `raw_prompt_text`, `input_ids` int64 (L,), `state` float32
        (state_dim,), `dataset_index`.

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
        frames = np.zeros(shape, dtype=image_processor.pixel_type)
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
    state = np.array(state, dtype=np.float32)
    sample["input_ids"] = prompt_tokenizer.tensor(prompt, state, dataset_index)
    sample["state"] = torch.from_numpy(state)
    sample["dataset_index"] = dataset_index
    return sample


def collate_fn(samples: Sequence[Sample]) -> Batch:
    """Stack samples into the batch of the data contract.

    Prompts are right-padded to the longest of the batch; `prompt_mask` is False on padding, and samples without padding
    may leave it out. Every other tensor is stacked along a new first dimension, and text is collected into a list.
    Images keep the memory layout that decoders produce (channels last), so that no pixel is moved twice.

    Raises:
        ObservationError: there is no sample.
    """
    if not samples:
        raise ObservationError("an empty batch: collate_fn was given no sample; give one or more")
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


def processors_from_checkpoint(checkpoint: dict[str, Any]) -> tuple[VLAImageProcessor, PromptTokenizer]:
    """The image processor and the tokenizer that a checkpoint was trained with, from the checkpoint alone."""
    image_processor = VLAImageProcessor.from_settings(checkpoint["image_processor"], "checkpoint")
    config = config_from_dict(checkpoint["config"], source="checkpoint")
    data, backbone = config.data, config.model.vlm_config.type
    files = checkpoint["tokenizer_files"]
    tokenizer = PromptTokenizer.from_files(files, data.prompt_max_len, backbone, data.prompt_format)
    tokenizer.read_states(config, checkpoint["statistics"])
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
        VLAImageProcessor.from_pretrained(image_source, config.data.image_fit),
        PromptTokenizer.from_pretrained(
            tokenizer_source, config.data.prompt_max_len, vlm.type, config.data.prompt_format
        ),
    )


def processor_sources(config: Config) -> tuple[str, str]:
    """Directories or hub ids of the image processor and of the tokenizer."""
    data, paths = config.data, config.model.vlm_config.pretrained_paths
    image_source = data.image_processor_name_or_path or data.siglip_model_name or paths[0]
    return image_source, data.tokenizer_name_or_path or paths[-1]
