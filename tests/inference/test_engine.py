"""The fast ways to predict against the plain one, for the same noise. Differences are of normalized actions.

| path | allowed difference |
| --- | --- |
| cached, batched, padded prompts, float32 | 1e-5 |
| compiled, float32 | 1e-4 |
| bfloat16 | 0.05 |
| int8, int4 | 0.02, 0.3 |
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data import prompts
from data.processing import PromptTokenizer, collate_fn, processors_from_checkpoint
from data.prompts import MAX_KNOWN_PROMPTS
from inference import engine
from inference.predictor import VLAPredictor
from model.vla_model import VLAModel
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from utils.batch import example_batch
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config_utils import config_from_dict

STATE = [0.1, -0.2, 0.3, 0.4]
PROMPTS = ("press the button", "open the window", "press the window", "open")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir):
    """Two cameras and weights without any zero that could hide a difference; widths fit for int4's blocks."""
    folder = tmp_path_factory.mktemp("run")
    demos = write_episodes(folder / "two.parquet", [6, 5], cameras=("image_1", "image_2"))
    head = {"hidden_dim": 64, "num_layers": 2}
    path = train_tiny(folder, tiny_paligemma_dir, [demos], vlm={"use_aux_camera": True}, head=head)
    content = load_checkpoint(path)
    del content["format"]
    generator = torch.Generator().manual_seed(0)
    for name, value in content["model"].items():
        if name.startswith("action_head."):
            value += 0.05 * torch.randn(value.shape, generator=generator)
    save_checkpoint(content, path)
    return path


@pytest.fixture(scope="module")
def plain(checkpoint):
    return VLAPredictor.from_checkpoint(checkpoint, "cpu", num_inference_steps=10)


def frame(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def observations(predictor, prompts=PROMPTS):
    """A batch of different prompts, one of them without the second camera."""
    batches = [
        predictor.observe(frame(i), frame(i + 9) if i else None, prompt=prompt, state=STATE)
        for i, prompt in enumerate(prompts)
    ]
    samples = []
    for batch in batches:
        sample = {key: value[0] for key, value in batch.items()}
        sample["input_ids"] = sample["input_ids"][sample.pop("prompt_mask")]
        samples.append(sample)
    return collate_fn(samples)


def normalized(predictor, action_BTA):
    return predictor.action_units.normalize(action_BTA, np.tile(np.float32(STATE), (len(action_BTA), 1)))


def difference(predictor, other, steps=10):
    """Largest difference between two predictors, after checking that noise and prompts make a larger one."""
    batch, seeds = observations(predictor), range(len(PROMPTS))
    here = normalized(predictor, predictor.predict_batch(batch, seeds, steps))
    there = normalized(other, other.predict_batch(batch, seeds, steps))
    assert np.abs(here[1:] - here[:-1]).max() > 0.5
    return np.abs(here - there).max()


@torch.no_grad()
def naive(predictor, batch, seeds, steps):
    """Everything anew at every integration step: images, prompt, context keys and values, time."""
    model, head = predictor.model, predictor.model.action_head
    x_BTA = torch.cat([torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    for step in range(steps):
        context = model.encode(batch)
        time_B = torch.full((len(x_BTA),), step / steps)
        x_BTA = x_BTA + head.velocity(x_BTA, time_B, head.encode_context(context)) / steps
    return model.normalizer.denormalize_action(x_BTA, batch["state"], batch["dataset_index"]).numpy()


# --- the same actions


def test_cached_equals_naive(plain):
    batch = observations(plain)
    for steps in (1, 10):
        fast = plain.predict_batch(batch, range(4), steps)
        np.testing.assert_allclose(fast, naive(plain, batch, range(4), steps), atol=1e-5, rtol=0)


def test_what_depends_on_the_observation_is_computed_once_and_what_depends_on_time_never_again(plain):
    plain.predict(frame(), frame(1), prompt="open", state=STATE, seed=0)
    head, backbone, calls = plain.model.action_head, plain.model.backbone.backbone, []
    parts = {
        "language": backbone.language_model,
        "embedding": backbone.get_input_embeddings(),
        "keys and values": head.blocks[0].cross_kv,
        "time": head.time_mlp,
        "modulation": head.blocks[0].modulation,
        "step": head.action_in,
    }
    hooks = [part.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, part in parts.items()]
    images = []
    hooks.append(backbone.vision_tower.register_forward_hook(lambda _, inputs, __: images.append(len(inputs[0]))))
    plain.predict(frame(), frame(1), prompt="open", state=STATE, seed=0)
    plain.predict(frame(), prompt="open", state=STATE, seed=0)
    for hook in hooks:
        hook.remove()
    assert calls == ["language", "keys and values", *["step"] * 10] * 2
    assert images == [2, 1]  # both cameras in one pass; an absent one costs nothing


def test_warming_up_a_batch_predicts_that_many(plain):
    images = []
    tower = plain.model.backbone.backbone.vision_tower
    hook = tower.register_forward_hook(lambda _, inputs, __: images.append(len(inputs[0])))
    plain.warm_up(3)
    hook.remove()
    assert images == [6]  # two cameras each


def test_warming_up_has_the_layout_of_an_observation(plain):
    """Compiled code is made for shapes and strides: other ones would be compiled at the first real prediction."""
    blank = example_batch(plain.config, image_size=plain.image_processor.height, batch_size=len(PROMPTS))
    prepared = [plain.engine.prepared(batch) for batch in (blank, observations(plain))]
    assert prepared[0].keys() == prepared[1].keys()
    for name, tensor in prepared[0].items():
        other = prepared[1][name]
        assert tensor.dtype == other.dtype, name
        if name in plain.cameras:
            assert (tensor.shape, tensor.stride()) == (other.shape, other.stride())


def test_draws_share_the_context(plain):
    batch = observations(plain)
    both = plain.predict_draws(batch, [range(4), range(7, 11)])
    for draw, seeds in enumerate((range(4), range(7, 11))):
        np.testing.assert_allclose(both[draw], plain.predict_batch(batch, seeds), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiled(checkpoint, plain):
    compiled = VLAPredictor.from_checkpoint(checkpoint, "cpu", compile="default")
    assert 0 < difference(plain, compiled, steps=3) < 1e-4
    # Prompts are padded to one length: another prompt needs no other code.
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompt in PROMPTS:
            args = {"prompt": prompt, "state": STATE, "seed": 0}
            fast = normalized(plain, compiled.predict(frame(), frame(1), **args, num_inference_steps=3)[None])
            slow = normalized(plain, plain.predict(frame(), frame(1), **args, num_inference_steps=3)[None])
            np.testing.assert_allclose(fast, slow, atol=1e-4, rtol=0)


def test_bfloat16(checkpoint, plain):
    mixed = VLAPredictor.from_checkpoint(checkpoint, "cpu", use_amp=True)
    stored = VLAPredictor.from_checkpoint(checkpoint, "cpu", use_amp=True, weight_dtype="bfloat16")
    assert 0 < difference(plain, mixed) < 0.05
    assert 0 < difference(plain, stored) < 0.05
    weights = dict(stored.model.named_parameters())
    assert weights["action_head.blocks.0.cross_kv.weight"].dtype == torch.bfloat16
    assert weights["action_head.context_norm.weight"].dtype == torch.float32
    assert stored.model.normalizer.action_center.dtype == torch.float32
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("mode", "allowed"), [("int8", 0.02), ("int4", 0.3)])
@pytest.mark.parametrize("precision", [{}, {"use_amp": True, "weight_dtype": "bfloat16"}])
def test_quantized(checkpoint, plain, mode, allowed, precision):
    pytest.importorskip({"int8": "torchao", "int4": "bitsandbytes"}[mode])
    quantized = VLAPredictor.from_checkpoint(checkpoint, "cpu", quantization=mode, **precision)
    assert 0 < difference(plain, quantized) < allowed + (0.05 if precision else 0)
    linear = quantized.model.backbone.backbone.language_model.layers[0].mlp.down_proj
    assert type(linear.weight) is not torch.nn.Parameter
    assert type(quantized.model.action_head.action_out.weight) is torch.nn.Parameter


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["cuda_graph", "max-autotune"])
def test_on_a_gpu(checkpoint, mode):
    plain = VLAPredictor.from_checkpoint(checkpoint, "cuda")
    fast = VLAPredictor.from_checkpoint(checkpoint, "cuda", compile=mode)
    assert difference(plain, fast) < 1e-4
    for i, prompt in enumerate(PROMPTS):  # one graph, other contents
        args = {"prompt": prompt, "state": STATE, "seed": i}
        for images in ((frame(i), frame(i + 1)), (frame(i),)):
            np.testing.assert_allclose(fast.predict(*images, **args), plain.predict(*images, **args), atol=1e-4)


# --- what is kept


def test_prompts_are_embedded_once_and_forgotten_in_the_end(checkpoint, monkeypatch):
    monkeypatch.setattr(engine, "MAX_EMBEDDED_PROMPTS", 2)
    small = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    batches = [small.observe(frame(), frame(1), prompt=prompt, state=STATE) for prompt in PROMPTS]
    for batch in batches + batches[::-1]:
        embeds = small.engine.prepared(batch)["prompt_embeds"]
        assert torch.equal(embeds, small.model.backbone.embed_prompt(batch["input_ids"]))
    kept = small.engine._embedded.cache_info()
    assert kept.currsize == 2 and kept.hits == 2  # of the way back, the two that were still there
    together = small.predict_batch(observations(small), range(4))
    noise = small.model.draw_noise([range(4)], 3)
    (plain,) = small.model.act({**observations(small), "noise": noise}, 3)
    np.testing.assert_allclose(together, plain.numpy(), atol=1e-5, rtol=0)


def test_tokenized_prompts_are_bounded(plain):
    tokenizer = plain.prompt_tokenizer
    first = tokenizer("open the window")
    for i in range(MAX_KNOWN_PROMPTS + 10):
        tokenizer.tensor(f"open {i}")
    assert len(tokenizer._known) == MAX_KNOWN_PROMPTS
    assert tokenizer("open the window") == first


def test_threads_share_a_tokenizer(plain, monkeypatch):
    """A server reads requests in several threads; prompts come and go under all of them."""
    monkeypatch.setattr(prompts, "MAX_KNOWN_PROMPTS", 2)
    tokenizer = PromptTokenizer(plain.prompt_tokenizer.tokenizer, 24)
    wanted = {f"open {i}": plain.prompt_tokenizer(f"open {i}") for i in range(7)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda i: (f"open {i % 7}", tokenizer(f"open {i % 7}")), range(6000)))
    finally:
        sys.setswitchinterval(interval)
    assert all(ids == wanted[prompt] for prompt, ids in found)


def test_the_global_generator_is_left_alone_by_a_seed(plain):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plain.warm_up()
    assert torch.equal(torch.get_rng_state(), before)


# --- refusals


def test_settings_that_cannot_be(checkpoint, monkeypatch):
    with pytest.raises(ValueError, match="compile is cuda_graph, but the policy runs on cpu.*--compile default"):
        VLAPredictor.from_checkpoint(checkpoint, "cpu", compile="cuda_graph")
    with pytest.raises(ValueError, match="weight_dtype is bfloat16, but the policy computes in float32; give auto"):
        VLAPredictor.from_checkpoint(checkpoint, "cpu", weight_dtype="bfloat16")
    for mode, package in (("int8", "torchao"), ("int4", "bitsandbytes")):
        for module in (package, f"{package}.quantization"):
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(ImportError, match=f"quantization {mode} needs the {package} package: pip install"):
            VLAPredictor.from_checkpoint(checkpoint, "cpu", quantization=mode)
    content = load_checkpoint(checkpoint)
    content["config"]["model"]["vlm_config"] |= {"quantization": "4bit", "freeze_language_model": True}
    config, model = config_from_dict(content["config"]), VLAModel.from_checkpoint(load_checkpoint(checkpoint))
    with pytest.raises(ValueError, match="quantization is int8, but the policy was trained with its backbone in 4bit"):
        VLAPredictor(model, config, *processors_from_checkpoint(content), device="cpu", quantization="int8")


def test_without_a_compiler_torch_compile_is_refused_by_name(monkeypatch, tmp_path):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="inference.compile is default: .* install one, or give --compile none"):
        engine.accelerate(torch.sin, "default", torch.device("cpu"))
    assert engine.accelerate(torch.sin, "none", torch.device("cpu")) is torch.sin


def test_weights_frozen_in_float16_compute_in_bfloat16(tmp_path, tiny_paligemma_dir):
    files = [write_episodes(tmp_path / "a.parquet", [5])]
    path = train_tiny(tmp_path, tiny_paligemma_dir, files, vlm={"dtype": "float16", "freeze_vision_tower": True})
    seen = {"prompt": "press the button", "state": [0.0] * 4, "seed": 0}
    image = np.full((40, 40, 3), 100, np.uint8)
    plain, half = (
        VLAPredictor.from_checkpoint(path, "cpu", use_amp=amp).predict(image, **seen) for amp in (False, True)
    )
    np.testing.assert_allclose(half, plain, atol=0.05)
