"""The action expert: LeRobot's pi0 and pi0.5 number for number, and what must hold whatever its weights are.

Tolerances are absolute, on values of up to 5 and loss elements of up to 100.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from model.action_head import build_action_head
from model.action_head.action_expert import ActionExpertHead, time_embedding
from model.action_head.guidance import soft_mask
from model.context import ActionPrefix, Context, ContextSpec
from model.pi_weights import TABLE_OF_OUTPUT, UNREAD, canonical, our_name
from tests.model.heads import no_pad, seeded
from tests.pi_fixtures import KINDS, arrays, make_backbone, make_context, make_expert, plain
from utils.config_model import ActionHeadConfig, ExpertConfig
from utils.config_utils import ConfigError

both = pytest.mark.parametrize("kind", KINDS)


def close(found: Tensor, wanted: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def time_of(theirs: Tensor) -> Tensor:
    """Our time of theirs, with all its digits."""
    return 1 - theirs.double()


# --- against LeRobot


@both
@torch.no_grad()
def test_prefix_is_lerobots(kind: str) -> None:
    backbone, found = make_backbone(kind), arrays(kind, "model")
    pixels = found["image_0"]
    close(backbone.backbone.vision_tower(pixels).last_hidden_state, found["vision_0"])
    embeds = [backbone.image_features(found[f"image_{i}"]) for i in range(3)]
    embeds = torch.cat([*embeds, backbone.embed_prompt(found["tokens"])], dim=1)
    exists = found["prefix_pad_mask"]
    close(embeds, found["prefix_embs"])
    context = make_context(backbone, kind)
    assert context.mask_BL.sum() == exists.sum() and context.mask_BL.shape[1] == exists.sum(dim=1).max()
    for layer, name in ((0, "0"), (-1, "last")):
        values = context.keys_values[layer][1].transpose(1, 2)[context.mask_BL]
        close(values, found[f"value_layer_{name}"].transpose(1, 2)[exists])


@both
@torch.no_grad()
def test_velocities_are_lerobots_turned_round(kind: str) -> None:
    head, found = make_expert(kind), arrays(kind, "model")
    context = head.encode_context(make_context(make_backbone(kind), kind))
    for name, theirs in (("1.0", torch.ones(3)), ("0.5", torch.full((3,), 0.5)), ("0.1", torch.full((3,), 0.1))):
        close(head.velocity(found["x_t"], time_of(theirs), context), -found[f"velocity_at_{name}"])
    close(head.velocity(found["x_t"], time_of(found["time"]), context), -found["velocity_at_time"])


@both
@torch.no_grad()
def test_sampled_actions_are_lerobots(kind: str) -> None:
    head, found = make_expert(kind), arrays(kind, "model")
    context = make_context(make_backbone(kind), kind)
    for steps in (10, 4):
        close(head.sample(context, found["noise"], steps), found[f"sampled_{steps}"][..., :7])
    schedule = head.schedule(10, torch.device("cpu"))
    assert torch.equal(head.sample(context, found["noise"], 10, schedule), head.sample(context, found["noise"], 10))


@both
def test_loss_and_gradients_are_lerobots(kind: str) -> None:
    backbone, head, found = make_backbone(kind), make_expert(kind), arrays(kind, "model")
    arguments = found["actions"][..., :7], no_pad(3, 10), found["noise"], time_of(found["time"])
    loss = head.loss_at(make_context(backbone, kind), *arguments)
    close(loss, found["loss_per_element"][..., :7].mean(-1), atol=1e-4)
    loss.mean().backward()
    ours = {f"backbone.{name}": parameter.grad for name, parameter in backbone.named_parameters()}
    ours |= {f"action_head.{name}": parameter.grad for name, parameter in head.named_parameters()}
    for key, norm in plain(kind, "grad_norms.json").items():
        name = canonical(key)
        gradient = None if name in UNREAD or name == TABLE_OF_OUTPUT else ours[our_name(name)]
        if not norm:  # None, or an exact zero of what nothing reads
            assert gradient is None or not gradient.any(), key
        else:
            assert gradient.norm().item() == pytest.approx(norm, rel=2e-5, abs=2e-5), key
    for key, gradient in arrays(kind, "training").items():
        if key.startswith("grad:"):
            name = canonical(key.removeprefix("grad:"))
            sign = -1 if name.startswith("action_out_proj") else 1
            close(sign * ours[our_name(name)], gradient, atol=2e-5 * max(1.0, gradient.abs().max().item()))


@both
@torch.no_grad()
def test_openpis_rounded_weights_act_as_lerobot_says(kind: str) -> None:
    head, found, wanted = make_expert(kind, "openpi"), arrays(kind, "model"), arrays(kind, "openpi")
    context = make_context(make_backbone(kind, "openpi"), kind)
    close(head.sample(context, found["noise"], 10), wanted["sampled_10"][..., :7])
    loss = head.loss_at(context, found["actions"][..., :7], no_pad(3, 10), found["noise"], time_of(found["time"]))
    close(loss, wanted["loss_per_element"][..., :7].mean(-1), atol=1e-4)


@both
@torch.no_grad()
def test_bfloat16_is_no_farther_from_float32_than_lerobots_is(kind: str) -> None:
    head, found, theirs = make_expert(kind), arrays(kind, "model"), arrays(kind, "bfloat16")
    backbone = make_backbone(kind, vision_dtype="float32")  # as LeRobot does
    with torch.autocast("cpu", torch.bfloat16):
        ours = head.sample(make_context(backbone, kind), found["noise"], 10)
    wanted = found["sampled_10"][..., :7]
    error, allowed = (
        (ours - wanted).square().mean().sqrt(),
        (theirs["sampled_10"][..., :7] - wanted).square().mean().sqrt(),
    )
    assert error <= allowed, (error, allowed)


@both
@torch.no_grad()
def test_chunking_weights_and_the_identity_in_place_of_the_jacobian_give_lerobots_chunks(kind: str) -> None:
    """LeRobot's correction takes the identity for the network's Jacobian; guidance here computes the true one."""
    head, found, rtc = make_expert(kind), arrays(kind, "model"), arrays(kind, "rtc")
    context = head.sampling_context(make_context(make_backbone(kind), kind))
    weights = soft_mask(10, int(rtc["inference_delay"]), int(rtc["execution_horizon"]))
    close(weights, rtc["weights_EXP"])
    planned = torch.zeros(3, 10, 32)
    planned[:, :7, :7] = rtc["prev_chunk_left_over"]
    for name in ("ZEROS", "ONES", "LINEAR", "EXP"):
        x = found["noise"]
        for step in range(10):
            time = step / 10
            velocity = head.velocity(x, torch.full((3,), time, dtype=torch.float64), context)
            pull = (planned - (x + (1 - time) * velocity)) * rtc[f"weights_{name}"][:, None]
            strength = 10.0 if time == 0 else min(10.0, (time**2 + (1 - time) ** 2) / (time * (1 - time)))
            x = x + (velocity + strength * pull) / 10
        close(x, rtc[f"sampled_{name}"], atol=1e-4)


@both
def test_training_steps_are_lerobots(kind: str) -> None:
    """Five AdamW steps with equal data, noise and time."""
    backbone, head, found, wanted = (
        make_backbone(kind),
        make_expert(kind),
        arrays(kind, "model"),
        arrays(kind, "training"),
    )
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    arguments = found["actions"][..., :7], no_pad(3, 10), found["noise"], time_of(found["time"])
    for loss_before, norm in zip(wanted["losses"], wanted["grad_norms_before_clipping"], strict=True):
        optimizer.zero_grad()
        loss = head.loss_at(make_context(backbone, kind), *arguments).mean()
        loss.backward()
        assert loss.item() == pytest.approx(loss_before.item(), abs=1e-4)
        assert torch.nn.utils.clip_grad_norm_(parameters, 1.0).item() == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()


# --- whatever the weights are

SPEC = ContextSpec(width=12, num_layers=2, num_kv_heads=2, head_dim=8, rope_theta=10000.0)
SMALL = {"width": 16, "mlp_dim": 24, "num_heads": 4, "max_state_dim": 5, "max_action_dim": 6}
SHAPES = [("token", True), ("token", False), ("adaptive_norm", False), ("adaptive_norm", True)]
every_shape = pytest.mark.parametrize(("time", "state_token"), SHAPES)


def small_head(time: str = "token", state_token: bool = True, **options: Any) -> ActionExpertHead:
    """Random everywhere, also where weights start at 0."""
    torch.manual_seed(0)
    expert = ExpertConfig(**SMALL, time=time, state_token=state_token, **options.pop("expert", {}))
    head = build_action_head(
        ActionHeadConfig(type="action_expert", per_action_dim=4, expert=expert, **options), SPEC, 3
    )
    for parameter in head.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return head.eval()


def small_context(batch: int = 2, length: int = 7, seed: int = 1) -> Context:
    """The last tokens of sample 1 do not exist."""
    generator = seeded(seed)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1:, -2:] = False
    pairs = [tuple(torch.randn(batch, 2, length, 8, generator=generator) for _ in range(2)) for _ in range(2)]
    return Context(
        torch.randn(batch, length, 12, generator=generator),
        mask,
        torch.randn(batch, 3, generator=generator),
        None,
        tuple(pairs),
    )


def chance(rows: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 8, 6, generator=seeded(seed)), torch.rand(rows, generator=seeded(seed + 1))


ACTION = torch.randn(2, 8, 4, generator=seeded(5))


def test_time_embedding_has_more_digits_than_float32_angles() -> None:
    found = time_embedding(torch.tensor([1.0, 0.37]), 8, (4e-3, 4.0))
    angles = 2 * torch.pi * torch.tensor([[1.0], [0.37]]).double() / (4e-3 * 1000 ** (torch.arange(4).double() / 3))
    close(found, torch.cat([angles.sin(), angles.cos()], dim=-1).float(), atol=1e-7)


@every_shape
def test_noise_draws_are_as_many_passes(time: str, state_token: bool) -> None:
    head, context, (noise, moments) = small_head(time, state_token), small_context(), chance(6)
    together = head.loss_at(context, ACTION, no_pad(2, 8), noise, moments)
    apart = [head.loss_at(context, ACTION, no_pad(2, 8), noise[i::3], moments[i::3]) for i in range(3)]
    close(together, torch.stack(apart).mean(dim=0), atol=1e-5)
    assert head.loss(context, ACTION, no_pad(2, 8), seeded(0)).shape == (2, 8)


@every_shape
@torch.no_grad()
def test_what_does_not_exist_has_no_influence_and_may_be_left_out(time: str, state_token: bool) -> None:
    head, context, (noise, _) = small_head(time, state_token), small_context(), chance(2)
    spoilt = [
        tuple(one.masked_fill(~context.mask_BL[:, None, :, None], 7.0) for one in pair) for pair in context.keys_values
    ]
    wanted = head.sample(context, noise, 3)
    close(head.sample(dataclasses.replace(context, keys_values=tuple(spoilt)), noise, 3), wanted, atol=0)
    shorter = Context(
        context.tokens_BLE[1:, :5],
        context.mask_BL[1:, :5],
        context.state_BS[1:],
        None,
        tuple(tuple(one[1:, :, :5] for one in pair) for pair in context.keys_values),
    )
    close(head.sample(shorter, noise[1:], 3), wanted[1:], atol=1e-5)


@every_shape
@torch.no_grad()
def test_sampling_writes_no_keys_of_its_own_into_the_context(time: str, state_token: bool) -> None:
    head, context, (noise, _) = small_head(time, state_token), small_context(), chance(2)
    before = [one.clone() for pair in context.keys_values for one in pair]
    first = head.sample(context, noise, 3)
    assert torch.equal(head.sample(context, noise, 3), first)
    assert all(map(torch.equal, before, [one for pair in context.keys_values for one in pair]))
    # without places for the steps' own keys and values, they are put beside the others anew at every step
    head.sampling_context = lambda context, draws: head.encode_context(context)
    close(head.sample(context, noise, 3), first, atol=1e-6)


@torch.no_grad()
def test_the_state_sees_no_action() -> None:
    head, context = small_head(), small_context()
    memory = head.encode_context(context)
    assert memory.layers[0][0].shape[2] == context.mask_BL.shape[1] + 1
    assert memory.mask_BL[:, -1].all() and memory.next_position_B.tolist() == [9, 7]
    moved = dataclasses.replace(context, state_BS=context.state_BS + 1)
    (noise, _) = chance(2)
    assert not torch.allclose(head.sample(moved, noise, 2), head.sample(context, noise, 2), atol=1e-3)
    unread = small_head(use_state_input=False)
    assert torch.equal(unread.sample(moved, noise, 2), unread.sample(context, noise, 2))


@every_shape
def test_checkpointed_gradients_are_the_same(time: str, state_token: bool) -> None:
    found = []
    for checkpointing in (False, True):
        head = small_head(time, state_token, expert={"gradient_checkpointing": checkpointing}).train()
        context = small_context()
        for pair in context.keys_values:
            for one in pair:
                one.requires_grad_()
        head.loss_at(context, ACTION, no_pad(2, 8), *chance(4)).sum().backward()
        found.append([parameter.grad for parameter in head.parameters()] + [context.keys_values[1][0].grad])
        assert all(gradient is not None for gradient in found[-1])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_detached_context_gets_no_gradient() -> None:
    for detach in (False, True):
        context = small_context()
        context.keys_values[0][0].requires_grad_()
        head = small_head(detach_context=detach)
        head.loss_at(context, ACTION, no_pad(2, 8), *chance(2)).sum().backward()
        assert (context.keys_values[0][0].grad is None) == detach
        assert head.state_proj.weight.grad.any()


def test_padded_steps_have_no_loss_and_no_influence() -> None:
    is_pad = no_pad(2, 8)
    is_pad[1, 5:] = True
    head, context, draws = small_head(), small_context(), chance(2)
    loss = head.loss_at(context, ACTION, is_pad, *draws)
    assert not loss[is_pad].any() and loss[~is_pad].all()
    spoilt = ACTION.masked_fill(is_pad[..., None], float("nan"))
    assert torch.equal(head.loss_at(context, spoilt, is_pad, *draws), loss)


def test_missing_dimensions_are_noised_and_have_no_loss() -> None:
    head, context, draws = small_head(), small_context(), chance(2)
    narrow = dataclasses.replace(context, action_dim_mask_BA=torch.tensor([[True, True, True, False]] * 2))
    action = ACTION.clone()
    action[..., 3] = 0
    loss = head.loss_at(narrow, action, no_pad(2, 8), *draws)
    action[..., 3] = 9
    assert torch.equal(head.loss_at(narrow, action, no_pad(2, 8), *draws), loss)
    changed = draws[0].clone()
    changed[..., 3:] += 1
    assert not torch.allclose(head.loss_at(narrow, action, no_pad(2, 8), changed, draws[1]), loss)
    assert not head.sample(narrow, draws[0], 2)[..., 3].any()


@every_shape
def test_velocity_is_the_slope_of_the_path_that_it_learns(time: str, state_token: bool) -> None:
    """One batch is learnt: from the trained noise the integration ends near the trained actions."""
    head, context, (noise, _) = small_head(time, state_token).train(), small_context(), chance(2)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for step in range(200):
        optimizer.zero_grad()
        moments = torch.rand(8, generator=seeded(step))
        head.loss_at(context, ACTION, no_pad(2, 8), noise.repeat_interleave(4, dim=0), moments).mean().backward()
        optimizer.step()
    found = head.eval().sample(context, noise, 10)
    assert (found - ACTION).square().mean() < 0.2 * ACTION.square().mean()


@every_shape
def test_it_continues_chunks_by_guidance_and_by_clean_prefixes(time: str, state_token: bool) -> None:
    head, context, (noise, _) = small_head(time, state_token, max_clean_prefix=3), small_context(), chance(2)
    plan = ACTION * 0.3
    prefix = ActionPrefix(plan, soft_mask(8, 2, 5).expand(2, -1))
    with torch.no_grad():
        free, bent = head.sample(context, noise, 5), head.sample(context, noise, 5, prefix=prefix)
        assert (bent - plan)[:, :2].abs().mean() < 0.5 * (free - plan)[:, :2].abs().mean()
        clean = head.sample(context, noise, 5, prefix=dataclasses.replace(prefix, clean=True))
        assert torch.equal(clean[:, :2], plan[:, :2])
        with pytest.raises(ValueError, match="the prefix commits 4 actions, .* max_clean_prefix 3"):
            head.sample(context, noise, 5, prefix=ActionPrefix(plan, soft_mask(8, 4, 5).expand(2, -1), clean=True))
    assert torch.isfinite(head.train().loss(context, ACTION, no_pad(2, 8), seeded(0))).all()


def test_noise_is_as_wide_as_the_padded_actions() -> None:
    head = small_head()
    noise = head.draw_noise([seeded(3), seeded(4)], torch.device("cpu"), 10)
    assert noise.shape == (2, 8, 6) and torch.equal(noise[1], head.draw_noise([seeded(4)], torch.device("cpu"), 10)[0])
    assert head.is_stochastic and head.continues_chunks and head.wants_keys_values


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "expert.num_heads is 3, but the backbone has 2 heads of keys and values; give a multiple"),
        ({"max_action_dim": 3}, "expert.max_action_dim is 3, but there are 4 values; give at least that many"),
        ({"max_state_dim": 2}, "expert.max_state_dim is 2, but there are 3 values"),
        ({"width": 15}, "expert.width is 15; give an even number"),
        ({"time_periods": (4.0, 1.0)}, r"expert.time_periods is \[4.0, 1.0\]; give \[shortest, longest\]"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expert = ExpertConfig(**(SMALL | settings))
        build_action_head(ActionHeadConfig(type="action_expert", per_action_dim=4, expert=expert), SPEC, 3)
    with pytest.raises(ConfigError, match=re.escape("this backbone hands over no keys and values")):
        build_action_head(ActionHeadConfig(type="action_expert"), ContextSpec(12), 3)
