"""The diffusion head: noise levels and steps against the papers' formulas and diffusers, clip, U-Net, messages."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from model.action_head import build_action_head
from model.action_head.unet import ConditionalUnet1D
from model.normalizer import ActionRange
from tests.model import heads
from tests.model.heads import SMALL, SPEC, STATE, make_context, no_pad, sample, seeded
from utils.config_utils import ActionHeadConfig, ConfigError, config_from_dict

KINDS = ["epsilon", "sample", "v_prediction"]


def make_head(**options):
    return heads.make_head("diffusion", **options)


def signal(levels: int = 100) -> torch.Tensor:
    """a_t of the squared cosine (Nichol and Dhariwal 2021, "Improved DDPM", eq. 17), betas capped at 0.999."""

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((i + 1) / levels) / f(i / levels), 0.999) for i in range(levels)]
    return torch.tensor([1 - beta for beta in betas], dtype=torch.float64).cumprod(0).float()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_error_of_the_prediction_at_diffusers_noise_levels(kind):
    head, context, action = make_head(prediction_type=kind), make_context(), torch.rand(3, 4, 2) * 2 - 1
    loss = head.loss(context, action, no_pad(3), seeded(5))
    generator = seeded(5)
    noise, timestep = torch.randn(3, 4, 2, generator=generator), torch.randint(100, (3,), generator=generator)
    reference = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
    x = reference.add_noise(action, noise, timestep)
    a = signal()[timestep][:, None, None]
    torch.testing.assert_close(x, a.sqrt() * action + (1 - a).sqrt() * noise)
    v = a.sqrt() * noise - (1 - a).sqrt() * action
    torch.testing.assert_close(reference.get_velocity(action, noise, timestep), v)
    target = {"epsilon": noise, "sample": action, "v_prediction": v}[kind]
    predicted = head.denoiser.denoise(x, timestep / 100, head.denoiser.encode_context(context), no_pad(3))
    torch.testing.assert_close(loss, (predicted - target).square().mean(-1))


def denoised(kind: str, x: torch.Tensor, predicted: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    if kind == "epsilon":
        return (x - (1 - a).sqrt() * predicted) / a.sqrt()
    return predicted if kind == "sample" else a.sqrt() * x - (1 - a).sqrt() * predicted


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_steps_agree_with_diffusers_and_with_the_paper(kind):
    """Song et al. 2021, "DDIM", eq. 12 with sigma 0, the denoised action clipped."""
    head, context = make_head(prediction_type=kind, clip_sample_range=1.5), make_context()
    x = start = torch.randn(3, 4, 2, generator=seeded(2))
    encoded = head.denoiser.encode_context(context)
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": kind, "clip_sample_range": 1.5}
    reference = DDIMScheduler(100, timestep_spacing="trailing", **options)
    reference.set_timesteps(5)
    assert reference.timesteps.tolist() == [99, 79, 59, 39, 19]
    levels = torch.cat([signal(), torch.ones(1)])  # before the first level there is no noise: a = 1
    by_hand = x
    for t, before in zip([99, 79, 59, 39, 19], [79, 59, 39, 19, -1], strict=True):
        predicted = head.denoiser.denoise(x, torch.full((3,), t / 100), encoded)
        x = reference.step(predicted, t, x).prev_sample
        a, a_before = levels[t], levels[before]
        predicted = head.denoiser.denoise(by_hand, torch.full((3,), t / 100), encoded)
        action = denoised(kind, by_hand, predicted, a).clamp(-1.5, 1.5)
        noise = denoised_noise(kind, by_hand, predicted, a)
        by_hand = a_before.sqrt() * action + (1 - a_before).sqrt() * noise
    action = head.sample(context, start[:, None], 5)
    torch.testing.assert_close(action, x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(action, by_hand, atol=1e-4, rtol=1e-3)


def denoised_noise(kind: str, x: torch.Tensor, predicted: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    if kind == "epsilon":
        return predicted
    return (
        (x - a.sqrt() * predicted) / (1 - a).sqrt() if kind == "sample" else a.sqrt() * predicted + (1 - a).sqrt() * x
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_steps_agree_with_diffusers(kind):
    head, context = make_head(prediction_type=kind, scheduler="ddpm", horizon=8), make_context(batch=1)
    reference = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type=kind, timestep_spacing="trailing")
    reference.set_timesteps(10)
    generator, encoded = seeded(3), head.denoiser.encode_context(context)
    x = torch.randn(1, 8, 2, generator=generator)
    for t in reference.timesteps.tolist():
        predicted = head.denoiser.denoise(x, torch.full((1,), t / 100), encoded)
        x = reference.step(predicted, t, x, generator=generator).prev_sample
    torch.testing.assert_close(sample(head, context, 3, 10), x, atol=1e-4, rtol=1e-3)


def test_ddpm_alone_draws_noise_between_steps():
    ddim, ddpm = make_head(scheduler="ddim"), make_head(scheduler="ddpm")
    place = [seeded(seed) for seed in range(3)], torch.device("cpu"), 5
    assert ddim.draw_noise(*place).shape == (3, 1, 4, 2) and ddpm.draw_noise(*place).shape == (3, 5, 4, 2)
    noise, context = ddpm.draw_noise(*place), make_context()
    other = noise.clone()
    other[:, 3] += 1
    assert not torch.allclose(ddpm.sample(context, noise, 5), ddpm.sample(context, other, 5))


@pytest.mark.parametrize("steps", [3, 7, 70])
def test_step_counts_that_do_not_divide_the_levels(steps):
    """Each step goes to the very level where the next one starts: the perfect denoiser loses nothing on the way."""
    head = make_head(prediction_type="sample", num_train_timesteps=100)
    schedule = head.schedule(steps, torch.device("cpu"))
    a, action = signal(), torch.rand(1, 4, 2) * 2 - 1
    noise = torch.randn(1, 4, 2)
    x = a[99].sqrt() * action + (1 - a[99]).sqrt() * noise
    timesteps = head.noise_levels()
    timesteps.set_timesteps(steps)
    for step, t in zip(schedule, timesteps.timesteps.tolist(), strict=True):
        torch.testing.assert_close(x, a[t].sqrt() * action + (1 - a[t]).sqrt() * noise, atol=1e-4, rtol=0)
        x = step.action * action + step.x * x + step.predicted * action
    torch.testing.assert_close(x, action, atol=1e-4, rtol=0)


def test_clip_follows_from_the_normalization():
    """Standardised actions reach many sigmas: a clip at 1, diffusers' default, would cut them off."""
    covered, extremes = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), torch.tensor([[-2.0, -6.5], [3.0, 4.0]])
    config = ActionHeadConfig(**SMALL, type="diffusion")
    head = build_action_head(config, SPEC, STATE, ActionRange(covered, extremes))
    assert head.clip_sample_range == 6.5
    assert make_head().clip_sample_range == 1.0
    assert make_head(clip_sample_range=2.5).clip_sample_range == 2.5


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_standardised_actions_are_not_cut_to_one_sigma(scheduler):
    """The perfect denoiser of one action, far outside of [-1, 1], brings every noise to it."""
    torch.manual_seed(0)
    far = torch.tensor([[4.0, -5.0]]).expand(4, 2)
    extremes = torch.tensor([[-6.0, -6.0], [6.0, 6.0]])
    config = ActionHeadConfig(**SMALL, type="diffusion", prediction_type="sample", scheduler=scheduler)
    head = build_action_head(config, SPEC, STATE, ActionRange(extremes, extremes)).eval()
    with torch.no_grad():
        head.denoiser.action_out.bias.copy_(far[0])  # its weights start at zero
    torch.testing.assert_close(sample(head, make_context(), 0, 10), far.expand(3, 4, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("horizon", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("levels", [1, 3])
def test_unet_takes_any_horizon(horizon, levels):
    head = make_head(horizon=horizon, unet_levels=levels)
    assert sample(head, make_context(), 0, 2).shape == (3, horizon, 2)
    assert head.loss(make_context(), torch.rand(3, horizon, 2), no_pad(3, horizon)).shape == (3, horizon)


def test_unet_width_and_condition():
    config = ActionHeadConfig(**(SMALL | {"unet_width": 24, "unet_levels": 3}))
    unet = ConditionalUnet1D(config, SPEC, STATE)
    assert [level.blocks[1].second[0].out_channels for level in unet.down] == [24, 48, 96]
    head = make_head(noise_draws_per_sample=3)
    calls = []
    head.denoiser.context_proj.register_forward_hook(lambda *_: calls.append(1))
    head.loss(make_context(), torch.rand(3, 4, 2), no_pad(3))
    sample(head, make_context(), 0, 5)
    assert len(calls) == 2, "the context is encoded once per loss and once per prediction"


def test_step_counts():
    head = make_head(num_train_timesteps=20)
    assert sample(head, make_context(), 0, 20).isfinite().all()
    message = "num_inference_steps is 21; this diffusion head was trained on 20 noise levels, so give 1 to 20"
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(head, make_context(), 0, 21)


def test_inference_steps_is_another_name_of_one_number():
    def config(head, **inference):
        head = {"type": "diffusion", **head}
        return config_from_dict({"model": {"action_head_config": head}, "inference": inference})

    assert config({"inference_steps": 50}).inference.num_inference_steps == 50
    assert config({"inference_steps": 50}, num_inference_steps=50).inference.num_inference_steps == 50
    assert config({}, num_inference_steps=20).inference.num_inference_steps == 20
    with pytest.raises(ConfigError, match=r"inference_steps is 50 but inference.num_inference_steps is 20"):
        config({"inference_steps": 50}, num_inference_steps=20)
    with pytest.raises(ConfigError, match=r"num_inference_steps is 101 but .*num_train_timesteps is 100; .* at most"):
        config({"inference_steps": 101})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unet_width": 20}, "unet_width is 20; give a multiple of 8"),
        ({"unet_levels": 0}, "unet_levels is 0; it must be positive"),
        ({"clip_sample_range": -1.0}, "clip_sample_range is -1.0; it must be positive"),
        ({"prediction_type": "noise"}, "prediction_type is 'noise'; choose from epsilon, sample, v"),
        ({"denoiser": "mlp"}, "denoiser is 'mlp'; choose from unet, transformer"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_dict({"model": {"action_head_config": {"type": "diffusion", **options}}})


def test_v_is_short_for_v_prediction():
    assert ActionHeadConfig(prediction_type="v") == ActionHeadConfig(prediction_type="v_prediction")


def test_missing_diffusers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="type diffusion needs the diffusers package: pip install diffusers"):
        make_head()
