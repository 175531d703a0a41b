"""The path from frames and prompt to the batch, shared by training and serving."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import AutoTokenizer

from data.processing import (
    ObservationError,
    PromptTokenizer,
    VLAImageProcessor,
    build_observation,
    processors_from_config,
)
from tests.helpers import png
from utils.config_utils import config_from_dict


@pytest.fixture(scope="module")
def tokenizer(tiny_paligemma_dir):
    return PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), 48)


@pytest.fixture
def processor():
    return VLAImageProcessor(16, 24, (0.5,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC)


def test_prompt_format_is_paligemmas(tiny_paligemma_dir, tokenizer):
    reference = AutoTokenizer.from_pretrained(tiny_paligemma_dir)
    expected = reference.encode("<bos>press the button\n", add_special_tokens=False)
    assert tokenizer("press the button") == expected
    assert tokenizer("  press  the\nbutton ") == expected, "white space is folded; the only newline is the last token"


def test_prompt_format_of_other_language_models(tiny_siglip_llm_dir, tiny_paligemma_dir):
    qwen2 = str(tiny_siglip_llm_dir / "qwen2")
    reference = AutoTokenizer.from_pretrained(qwen2)
    assert reference.bos_token_id is None
    plain = PromptTokenizer.from_pretrained(qwen2, 48, "siglip_llm")
    assert plain("press  the button") == reference("press the button\n").input_ids, "nothing in front"
    assert reference.decode(plain("press the button")) == "press the button\n"
    # A tokenizer that puts <bos> in front of a text by itself, as Llama's does, goes on doing so.
    gemma = PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), 48, "siglip_llm")
    expected = AutoTokenizer.from_pretrained(tiny_paligemma_dir)("press the button\n").input_ids
    assert gemma("press the button") == expected and expected[0] == 2
    with pytest.raises(ObservationError, match="has no <bos> token, which the prompt of a paligemma needs"):
        PromptTokenizer.from_pretrained(qwen2, 48)
    again = PromptTokenizer.from_files(plain.to_files(), 48, "siglip_llm")
    assert again("äöü 火") == plain("äöü 火")


def test_special_tokens_after_a_text_are_not_in_front_of_it(tiny_paligemma_dir):
    ending = AutoTokenizer.from_pretrained(tiny_paligemma_dir, add_eos_token=True)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    assert ending("press").input_ids[-1] == 1
    assert PromptTokenizer(ending, 48, "siglip_llm").prefix == []


def test_long_prompt_is_cut_with_one_warning(tiny_paligemma_dir, caplog):
    short = PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), 5)
    with caplog.at_level(logging.WARNING):
        first, second = short("press the button " * 9), short("open the window now please " * 3)
    assert len(first) == len(second) == 5
    whole = PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), 500)("press the button")
    assert first[0] == whole[0] and first[-1] == whole[-1], "<bos> and the newline stay"
    assert caplog.text.count("cut to data.prompt_max_len 5") == 1


def test_empty_prompt_is_refused(tokenizer):
    with pytest.raises(ObservationError, match="prompt is '  '; a policy needs an instruction"):
        tokenizer("  ")


def test_tokenizer_survives_the_checkpoint(tokenizer):
    again = PromptTokenizer.from_files(tokenizer.to_files(), 48)
    for prompt in ("press the button", "äöü 火 something new"):
        assert again(prompt) == tokenizer(prompt)


def test_missing_tokenizer_and_processor_name_the_key(tmp_path):
    with pytest.raises(ObservationError, match="data.tokenizer_name_or_path"):
        PromptTokenizer.from_pretrained(str(tmp_path), 48)
    with pytest.raises(ObservationError, match="data.image_processor_name_or_path"):
        VLAImageProcessor.from_pretrained(str(tmp_path))


def test_processors_come_from_the_backbone_unless_named(tiny_paligemma_dir, tiny_paligemma2_dir):
    backbone = {"vlm_config": {"model_name_or_path": str(tiny_paligemma_dir)}}
    image_processor, tokenizer = processors_from_config(config_from_dict({"model": backbone}))
    assert (image_processor.height, image_processor.width) == (32, 32) and image_processor.mean == (0.5, 0.5, 0.5)
    assert tokenizer.max_len == 48
    named = {"model": backbone, "data": {"siglip_model_name": str(tiny_paligemma2_dir), "prompt_max_len": 7}}
    assert processors_from_config(config_from_dict(named))[1].max_len == 7


def test_a_missing_backbone_folder_is_named_as_such(tmp_path):
    config = config_from_dict({"model": {"vlm_config": {"model_name_or_path": str(tmp_path / "none")}}})
    with pytest.raises(ObservationError, match="model_name_or_path: no folder .*make_tiny_paligemma.py --output_dir"):
        processors_from_config(config)


def test_processors_of_siglip_llm(tiny_siglip_llm_dir, tmp_path):
    vlm = {
        "type": "siglip_llm",
        "vision_model_name_or_path": str(tiny_siglip_llm_dir / "siglip"),
        "language_model_name_or_path": str(tiny_siglip_llm_dir / "qwen2"),
    }
    image_processor, tokenizer = processors_from_config(config_from_dict({"model": {"vlm_config": vlm}}))
    assert (image_processor.height, image_processor.width, image_processor.mean) == (32, 32, (0.5,) * 3)
    assert tokenizer.prefix == [] and len(tokenizer("press the button")) == 4
    for key, hub_id in (("vision", "google/siglip-base-patch16-224"), ("language", "Qwen/Qwen2.5-0.5B")):
        key = f"{key}_model_name_or_path"
        config = config_from_dict({"model": {"vlm_config": vlm | {key: str(tmp_path / "none")}}})
        with pytest.raises(ObservationError, match=f"{key}: no folder .*{hub_id}.*make_tiny_siglip_llm.py"):
            processors_from_config(config)


def test_image_inputs_agree(tmp_path, processor):
    encoded = png(np.random.default_rng(0), 40)
    path = tmp_path / "frame.png"
    path.write_bytes(encoded)
    image = Image.open(path)
    results = [processor(item) for item in (encoded, memoryview(encoded), path, str(path), image, np.array(image))]
    assert results[0].shape == (3, 16, 24) and results[0].dtype == torch.uint8
    assert all(torch.equal(result, results[0]) for result in results)


def jpeg(height, width):
    """A smooth image, so that scaling it in two ways should agree."""
    small = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_a_jpeg_of_the_wanted_size_equals_pils(processor):
    encoded = jpeg(16, 24)
    expected = np.array(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(processor(encoded).permute(1, 2, 0).numpy(), expected)


def test_a_larger_jpeg_is_scaled_while_decoding(processor):
    encoded = jpeg(128, 192)
    expected = np.array(Image.open(io.BytesIO(encoded)).resize((24, 16), Image.Resampling.BICUBIC))
    got = processor(encoded).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - expected).mean() < 2


def test_grey_jpeg_and_png_with_alpha_become_rgb(processor):
    for mode, kind in (("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG")):
        buffer = io.BytesIO()
        Image.new(mode, (24, 16)).save(buffer, kind)
        assert processor(buffer.getvalue()).shape == (3, 16, 24)


@pytest.mark.parametrize("keep", [2, 100, 0.5, 0.9])
def test_truncated_jpeg(processor, keep):
    encoded = jpeg(64, 64)
    with pytest.raises(ObservationError, match="no readable JPEG or PNG"):
        processor(encoded[: int(keep if keep >= 1 else keep * len(encoded))])


def test_settings_round_trip_and_unsupported_ones_are_refused(processor):
    again = VLAImageProcessor.from_settings(processor.to_settings(), "x")
    assert vars(again) == vars(processor)
    for spoiled, fault in (
        ({"size": {"shortest_edge": 3}}, "size is {'shortest_edge': 3}; wanted height and width"),
        ({"do_center_crop": True}, "do_center_crop and do_pad are not supported; wanted both false"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0; wanted 1/255"),
    ):
        with pytest.raises(ObservationError) as caught:
            VLAImageProcessor.from_settings(processor.to_settings() | spoiled, "x")
        assert f"image processor at 'x': {fault}; set data.image_processor_name_or_path" in str(caught.value)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.full((4, 4, 3), 2, np.float32), "float32 with values from 2 to 2; floats are taken from 0 to 1: divide by"),
        (np.full((4, 4, 3), -0.5), "float64 with values from -0.5 to -0.5; floats are taken from 0 to 1"),
        (np.full((4, 4, 3), np.nan), "float64 with values from nan to nan; floats are taken from 0 to 1"),
        (np.zeros((4, 4, 3), np.int64), r"array is int64 \(4, 4, 3\); wanted uint8 .* or floats from 0 to 1"),
        (np.zeros((4, 4, 4), np.uint8), r"array is uint8 \(4, 4, 4\); wanted uint8 \(H, W, 3\)"),
        (np.zeros((2, 3, 4, 3), np.uint8), r"array is uint8 \(2, 3, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"array is uint8 \(4, 4\)"),
        (np.zeros(3, np.uint8), "3 bytes is no readable"),
        ([[0, 0, 0]], "image is a list; wanted JPEG or PNG as bytes, a path"),
        (7, "image is a int; wanted JPEG or PNG as bytes, a path"),
        (b"", "0 bytes is no readable"),
        ("/nothing.png", "/nothing.png is no readable file"),
    ],
)
def test_bad_frames(processor, frame, message):
    with pytest.raises(ObservationError, match=message):
        processor(frame)


def test_observation_needs_a_camera_and_equal_frame_counts(processor, tokenizer):
    frame = np.zeros((16, 24, 3), np.uint8)
    options = dict(cameras=("image_1", "image_2"), max_seq_len=2, image_processor=processor, prompt_tokenizer=tokenizer)
    with pytest.raises(ObservationError, match="the policy reads image_1, image_2 and none was given"):
        build_observation({}, "go", np.zeros(4), **options)
    with pytest.raises(ObservationError, match="image_2: 1 frames but image_1 has 2"):
        build_observation({"image_1": [frame] * 2, "image_2": [frame]}, "go", np.zeros(4), **options)
    with pytest.raises(ObservationError, match="3 frames; wanted 1 to max_seq_len 2"):
        build_observation({"image_1": [frame] * 3}, "go", np.zeros(4), **options)


def test_what_is_cut_off_and_what_is_no_text(tiny_paligemma_dir):
    tokenizer = PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), 6)
    assert "does not read its end" in tokenizer.cut("put the red cube into the left drawer")
    assert tokenizer.cut("go") is None
    for prompt, found in ((None, "missing"), (["a"], "a list"), (b"a", "a bytes"), (3, "a int")):
        with pytest.raises(ObservationError, match=f"prompt is {found}; wanted the instruction as text"):
            tokenizer(prompt)
