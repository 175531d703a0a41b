"""How far a pi0 or pi0.5 policy is from what the lerobot library computed with the same weights, array by array.

    F=tests/fixtures/pi/pi0_tiny; python benchmarks/pi0_parity.py --policy_dir $F/policy --reference $F

The reference folder holds what lerobot gave for one policy (tests/fixtures/README.md says what each array is); files
that it lacks are left out. Everything runs in float32 on the CPU, but for the part called bfloat16. The largest
absolute difference may be 1e-4 for losses and 2e-5 for everything else; gradients' norms and values count relative to
the larger of 1 and their size. Exits with 1 where one is larger.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    import _repository  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pi0_attention import attention
from benchmarks.pi0_reference import LOSS, VALUE, Reference, Row, largest, loss_arguments, prefix_embeddings
from data.processing import collate_fn
from data.prompts import state_bins
from inference.predictor import VLAPredictor
from model.action_head.action_expert import time_embedding
from model.action_head.flow_matching import flow_interpolate
from model.action_head.guidance import guidance_weight, soft_mask
from model.context import Context
from model.pi_weights import TABLE_OF_OUTPUT, UNREAD, canonical, our_name
from utils.arguments import CommandParser, output_file
from utils.normalization import published_scaling
from utils.policy_folder import read_relative_dims
from utils.text_table import text_table


def processors(reference: Reference) -> Iterator[Row]:
    """Images, states, token ids and actions on their way in and out."""
    found = reference.arrays("processors")
    if not found:
        return
    predictor, index = reference.predictor, torch.zeros(len(found["raw_state"]), dtype=torch.int64)
    normalizer = reference.model.normalizer
    samples = [
        predictor.observation(**reference.observation(row, reference.cameras)) for row in range(len(found["raw_state"]))
    ]
    for i, camera in enumerate(reference.cameras):
        images = torch.stack([sample[camera][0] for sample in samples])
        yield "processors", f"image_{i}", largest((images - 0.5) / 0.5, found[f"image_{i}"]), VALUE
        there = torch.stack([sample["image_mask"][i] for sample in samples])
        yield "processors", f"image_mask_{i}", largest(there, found[f"image_mask_{i}"]), 0.0
    for i in range(len(reference.cameras), len(reference.slots)):  # black, as seen by a mask that hides it
        hidden = torch.full_like(found[f"image_{i}"], -1.0)
        yield "processors", f"image_{i} (no camera)", largest(hidden, found[f"image_{i}"]), 0.0
        there = torch.zeros_like(found[f"image_mask_{i}"])
        yield "processors", f"image_mask_{i} (no camera)", largest(there, found[f"image_mask_{i}"]), 0.0
    state = normalizer.normalize_state(found["raw_state"], index)
    yield "processors", "state_normalized", largest(state, found["state_normalized"]), VALUE
    action = normalizer.normalize_action(found["raw_action"], found["raw_state"], index)
    yield "processors", "action_normalized", largest(action, found["action_normalized"]), VALUE
    post = normalizer.denormalize_action(found["post_in"][:, None], found["raw_state"], index)[:, 0]
    yield "processors", "post_out", largest(post, found["post_out"]), VALUE
    for prefix, rows in (("", range(len(samples))), ("single_", range(1))):
        masks, ids = found[f"{prefix}token_mask"].flatten(0, -2), found[f"{prefix}tokens"].flatten(0, -2)
        wanted = [one[mask] for one, mask in zip(ids, masks, strict=True)]
        equal = all(samples[row]["input_ids"].tolist() == wanted[row].tolist() for row in rows)
        yield "processors", f"{prefix}tokens", 0.0 if equal else 1.0, 0.0
        lengths = torch.tensor([len(samples[row]["input_ids"]) for row in rows])
        yield "processors", f"{prefix}token_mask", largest(padded_mask(lengths, masks.shape[1]), masks), 0.0
    yield "processors", "single_state_normalized", largest(state[:1], found["single_state_normalized"]), VALUE
    bins = torch.from_numpy(state_bins(found["bins_in"].numpy()))
    yield "processors", "bins_out", largest(bins, found["bins_out"]), 0.0


def relative(reference: Reference) -> Iterator[Row]:
    """Actions relative to the state, by the processors of `relative/`."""
    found, raw = reference.arrays("relative"), reference.arrays("processors")
    if not found:
        return
    data, statistics = reference.predictor.config.data, reference.model.statistics[0]["action"]
    dims = list(read_relative_dims(reference.folder / "relative", reference.width))
    origin = torch.zeros(len(raw["raw_state"]), 1, reference.width)
    origin[..., dims] = raw["raw_state"][:, None, dims]
    scaling = published_scaling(
        statistics, data.normalization_type, data.normalization_arithmetic, reference.width, data.normalization_eps
    )
    normalized = scaling.normalize(raw["raw_action"] - origin)
    yield "relative", "action_normalized", largest(normalized, found["action_normalized"]), VALUE
    yield "relative", "post_out", largest(scaling.denormalize(found["post_in"]) + origin, found["post_out"]), VALUE
    index = torch.zeros(len(raw["raw_state"]), dtype=torch.int64)
    state = reference.model.normalizer.normalize_state(raw["raw_state"], index)
    yield "relative", "state_normalized", largest(state, found["state_normalized"]), VALUE


@torch.no_grad()
def model(reference: Reference) -> Iterator[Row]:
    """Embeddings, keys and values, velocities, losses and sampled actions."""
    found, head, backbone = reference.arrays("model"), reference.head, reference.backbone
    if not found:
        return
    exists = found["prefix_pad_mask"]
    vision = backbone.backbone.vision_tower(found["image_0"]).last_hidden_state
    yield "model", "vision_0", largest(vision, found["vision_0"]), VALUE
    yield "model", "prefix_embs", largest(prefix_embeddings(reference), found["prefix_embs"]), VALUE
    raw = reference.arrays("processors")
    if raw:
        index = torch.zeros(len(raw["raw_state"]), dtype=torch.int64)
        normalizer, wide = reference.model.normalizer, found["state"].shape[1]
        state = normalizer.normalize_state(raw["raw_state"], index)
        yield "model", "state", largest(F.pad(state, (0, wide - state.shape[1])), found["state"]), VALUE
        action = normalizer.normalize_action(raw["raw_action"], raw["raw_state"], index)
        action = F.pad(action, (0, head.flow_dim - action.shape[2]))
        yield "model", "actions", largest(action, found["actions"]), VALUE
    whole = reference.encoded()
    yield "model", "prefix_pad_mask", largest(whole.mask_BL, exists), 0.0
    yield "model", "prefix_out", largest(whole.tokens_BLE[exists], found["prefix_out"][exists]), VALUE
    context = reference.context()
    yield from attention(reference)
    for layer, name in ((0, "0"), (-1, "last")):
        keys, values = (one.transpose(1, 2)[context.mask_BL] for one in context.keys_values[layer])
        wanted_keys = found[f"key_layer_{name}"].transpose(1, 2)[exists]
        yield "model", f"key_layer_{name}", largest(keys, wanted_keys), VALUE
        wanted_values = found[f"value_layer_{name}"].transpose(1, 2)[exists]
        yield "model", f"value_layer_{name}", largest(values, wanted_values), VALUE
    time = 1 - found["time"].double()
    moments = head.conditions(time)
    x, target = flow_interpolate(found["noise"], found["actions"], time)
    yield "model", "x_t", largest(x, found["x_t"]), VALUE
    if moments.mixed is None:
        level = time_embedding(1 - time, head.config.expert.width, head.config.expert.time_periods)
        yield "model", "adarms_cond", largest(head.time_condition(level), found["adarms_cond"]), VALUE
    tokens = head.embed_actions(found["x_t"], moments)
    if head.sees_state:
        tokens = torch.cat([head.embed_state(context.state_BS)[:, None], tokens], dim=1)
    yield "model", "suffix_embs", largest(tokens, found["suffix_embs"]), VALUE
    memory = head.encode_context(context)
    for name in [key for key in found if key.startswith("velocity_at_")]:
        label = name.removeprefix("velocity_at_")
        theirs = found["time"] if label == "time" else torch.full_like(found["time"], float(label))
        velocity = -head.velocity(found["x_t"], 1 - theirs.double(), memory)
        yield "model", name, largest(velocity, found[name]), VALUE
    element = (head.velocity(found["x_t"], time, memory) - target).square()
    yield "model", "loss_per_element", largest(element, found["loss_per_element"]), LOSS
    loss = head.loss_at(context, *loss_arguments(reference)).mean(dim=1)
    yield "model", "loss_per_sample", largest(loss, found["loss_per_sample"]), LOSS
    yield "model", "loss", largest(loss.mean(), found["loss"]), LOSS
    default = reference.predictor.num_inference_steps
    for name, steps in (("sampled_10", 10), ("sampled_4", 4), ("sampled_default_steps", default)):
        actions = head.sample(context, found["noise"], steps)
        yield "model", name, largest(actions, found[name][..., : reference.width]), VALUE
    x, path = found["noise"], [found["noise"]]
    for step in range(10):
        x = x + head.velocity(x, torch.full((len(x),), step / 10, dtype=torch.float64), memory) / 10
        path.append(x)
    yield "model", "sampled_10_path", largest(torch.stack(path), found["sampled_10_path"]), VALUE


@torch.no_grad()
def policy(reference: Reference) -> Iterator[Row]:
    """Whole observations: chunks, normalized and physical, and the loss of raw data."""
    found, raw = reference.arrays("policy"), reference.arrays("processors")
    if not found:
        return
    predictor, head = reference.predictor, reference.head
    rows = range(len(found["noise"]))
    physical = np.stack(
        [
            predictor.predict(**reference.observation(row, reference.cameras), noise=found["noise"][row].numpy())
            for row in rows
        ]
    )
    yield "policy", "chunk_physical", largest(torch.from_numpy(physical), found["chunk_physical"]), VALUE

    def context(cameras: tuple[str, ...]) -> Context:
        samples = [predictor.observation(**reference.observation(row, cameras)) for row in rows]
        return predictor.model.encode(predictor.engine.prepared(collate_fn(samples)))

    steps = predictor.num_inference_steps
    seen = context(reference.cameras)
    yield "policy", "chunk", largest(head.sample(seen, found["noise"], steps), found["chunk"]), VALUE
    last = head.sample(context(reference.cameras[-1:]), found["noise"], steps)
    yield "policy", "chunk_only_last_camera", largest(last, found["chunk_only_last_camera"]), VALUE
    chosen = head.sample(seen, found["select_action_noise"], steps).transpose(0, 1)
    yield "policy", "select_action", largest(chosen[: len(found["select_action"])], found["select_action"]), VALUE
    index = torch.zeros(len(rows), dtype=torch.int64)
    action = predictor.model.normalizer.normalize_action(raw["raw_action"], raw["raw_state"], index)
    is_pad = torch.zeros(action.shape[:2], dtype=torch.bool)
    loss = head.loss_at(seen, action, is_pad, found["forward_noise"], 1 - found["forward_time"].double())
    yield "policy", "forward_loss_per_sample", largest(loss.mean(dim=1), found["forward_loss_per_sample"]), LOSS
    padded = F.pad(action, (0, head.flow_dim - reference.width))
    x, target = flow_interpolate(found["forward_noise"], padded, 1 - found["forward_time"].double())
    velocity = head.velocity(x, 1 - found["forward_time"].double(), head.encode_context(seen))
    per_dim = (velocity - target)[..., : reference.width].square().mean(dim=(0, 1))
    yield "policy", "forward_loss_per_dim", largest(per_dim, found["forward_loss_per_dim"]), LOSS


@torch.no_grad()
def chunking(reference: Reference) -> Iterator[Row]:
    """Real-time chunking: weights, and chunks guided as lerobot does, with the identity for the network's Jacobian."""
    found, head = reference.arrays("rtc"), reference.head
    if not found:
        return
    noise = reference.arrays("model")["noise"]
    previous = found["prev_chunk_left_over"]
    horizon = min(int(found["execution_horizon"]), previous.shape[1])
    for name in [key.removeprefix("weights_") for key in found if key.startswith("weights_")]:
        weights = soft_mask(noise.shape[1], min(int(found["inference_delay"]), horizon), horizon, name.lower())
        yield "rtc", f"weights_{name}", largest(weights, found[f"weights_{name}"]), VALUE
    memory = head.sampling_context(reference.context())
    planned = torch.zeros_like(noise)
    planned[:, : previous.shape[1], : previous.shape[2]] = previous
    for name in [key for key in found if key.startswith("sampled_")]:
        x, weight = noise, found[f"weights_{name.removeprefix('sampled_')}"][:, None]
        for step in range(10):
            time = step / 10
            velocity = head.velocity(x, torch.full((len(x),), time, dtype=torch.float64), memory)
            pull = (planned - (x + (1 - time) * velocity)) * weight
            x = x + (velocity + guidance_weight(time, float(found["max_guidance_weight"])) * pull) / 10
        yield "rtc", f"{name} (their Jacobian)", largest(x, found[name]), VALUE


def training(reference: Reference) -> Iterator[Row]:
    """Loss, gradients, and AdamW steps on the same noise and time; changes the weights."""
    found, path = reference.arrays("training"), reference.folder / "grad_norms.json"
    if not found:
        return
    head, policy = reference.head, reference.model
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    policy.train()

    def loss() -> Tensor:
        return head.loss_at(reference.context(), *loss_arguments(reference)).mean()

    first = loss()
    first.backward()
    yield "training", "loss", largest(first.detach(), found["loss"]), LOSS
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    worst: dict[str, float] = {}
    for key, norm in json.loads(path.read_text(encoding="utf-8")).items():
        name = canonical(key)
        gradient = None if name in UNREAD or name == TABLE_OF_OUTPUT else gradients[our_name(name)]
        ours = 0.0 if gradient is None else gradient.norm().item()
        part = part_of(name)
        worst[part] = max(worst.get(part, 0.0), abs(ours - (norm or 0.0)) / max(1.0, norm or 0.0))
    for part, difference in worst.items():
        yield "training", f"gradient norms: {part}", difference, VALUE
    for key in [key for key in found if key.startswith("grad:")]:
        name, gradient = canonical(key.removeprefix("grad:")), found[key]
        sign = -1 if name.startswith("action_out_proj") else 1
        difference = largest(sign * gradients[our_name(name)], gradient) / max(1.0, gradient.abs().max().item())
        yield "training", f"gradient: {name.rsplit('.layers.')[-1]}", difference, VALUE
    preset = json.loads((reference.policy_dir / "config.json").read_text(encoding="utf-8"))
    names = {"betas": "optimizer_betas", "eps": "optimizer_eps", "weight_decay": "optimizer_weight_decay"}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, **{ours: preset[name] for ours, name in names.items()})
    losses, norms = [], []
    for _ in found["losses"]:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), preset["optimizer_grad_clip_norm"]))
        optimizer.step()
    yield "training", "losses (of AdamW steps)", largest(torch.stack(losses), found["losses"]), LOSS
    wanted = found["grad_norms_before_clipping"]
    yield "training", "grad_norms_before_clipping", largest(torch.stack(norms) / wanted, wanted / wanted), LOSS


@torch.no_grad()
def bfloat16(reference: Reference) -> Iterator[Row]:
    """Distance of bfloat16 from lerobot's float32 (root mean square); that of lerobot's own bfloat16 is allowed."""
    theirs, found = reference.arrays("bfloat16"), reference.arrays("model")
    if not theirs:
        return
    head, exists = reference.head, found["prefix_pad_mask"]
    ours = {}
    with torch.autocast("cpu", torch.bfloat16):
        ours["sampled_10"] = F.pad(
            head.sample(reference.context(), found["noise"], 10), (0, head.flow_dim - reference.width)
        )
        memory = head.encode_context(reference.context())
        velocity = head.velocity(found["x_t"], 1 - found["time"].double(), memory).float()
        ours["loss_per_element"] = (velocity - (found["actions"] - found["noise"])).square()
        ours["prefix_embs"] = prefix_embeddings(reference).float()
    parts = {
        "sampled_10": (..., slice(reference.width)),
        "loss_per_element": ...,
        "prefix_embs": exists,
    }
    for name, part in parts.items():
        wanted = found[name][part]
        yield (
            "bfloat16",
            f"{name} (rms)",
            *((one[name][part].float() - wanted).square().mean().sqrt().item() for one in (ours, theirs)),
        )


@torch.no_grad()
def openpi(reference: Reference) -> Iterator[Row]:
    """The weights of `openpi/`, read by their own layout, which says nothing of the time embedding's periods."""
    found, wanted = reference.arrays("model"), reference.arrays("openpi")
    if not wanted:
        return
    actions = reference.head.sample(reference.context(), found["noise"], 10)
    yield "openpi", "sampled_10", largest(actions, wanted["sampled_10"][..., : reference.width]), VALUE
    element = (
        -reference.head.velocity(
            found["x_t"], 1 - found["time"].double(), reference.head.encode_context(reference.context())
        )
        - (found["noise"] - found["actions"])
    ).square()
    yield "openpi", "loss_per_element", largest(element, wanted["loss_per_element"]), LOSS


def padded_mask(lengths_B: Tensor, width: int) -> Tensor:
    """bool (B, width), True for the first tokens of each row."""
    return torch.arange(width) < lengths_B[:, None]


def part_of(name: str) -> str:
    """Vision tower, projector, language model, expert, or projections around it."""
    for part, word in (
        ("vision tower", "vision_tower"),
        ("projector", "multi_modal"),
        ("language model", "paligemma."),
    ):
        if word in name:
            return part
    return "expert" if "gemma_expert" in name else "projections"


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--policy_dir", type=Path, required=True, help="the policy, as lerobot wrote it")
    parser.add_argument("--reference", type=Path, required=True, help="the folder of arrays")
    parser.add_argument("--tokenizer_name_or_path", help="default: tokenizer/ of the reference, if it has one")
    parser.add_argument("--vision_num_attention_heads", type=int, help="default: sizes.json of the reference, else 16")
    parser.add_argument("--json", type=output_file, help="write the table there as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    own_tokenizer, sizes = args.reference / "tokenizer", args.reference / "sizes.json"
    settings: dict[str, Any] = {
        "tokenizer_name_or_path": args.tokenizer_name_or_path
        or (str(own_tokenizer) if own_tokenizer.is_dir() else None),
        "vision_num_attention_heads": args.vision_num_attention_heads,
    }
    if args.vision_num_attention_heads is None and sizes.is_file():
        settings["vision_num_attention_heads"] = json.loads(sizes.read_text())["vision"]["num_heads"]

    def load(folder: Path, use_amp: bool) -> Reference:
        return Reference(
            args.reference, folder, VLAPredictor.from_pretrained(folder, "cpu", use_amp=use_amp, **settings)
        )

    rows: list[Row] = []
    for part in (processors, relative, model, policy, chunking, bfloat16, training):  # the last one trains
        reference = load(args.policy_dir, use_amp=False)
        rows += part(reference)
    if (args.reference / "openpi").is_dir():
        other = load(args.reference / "openpi", use_amp=False)
        periods = reference.head.config.expert.time_periods
        expert = dataclasses.replace(other.head.config.expert, time_periods=periods)
        other.head.config = dataclasses.replace(other.head.config, expert=expert)
        rows += openpi(other)
    header = ("part", "array", "largest difference", "allowed", "")
    table = [(*row, "ok" if row[2] <= row[3] else "TOO FAR") for row in rows]
    print(text_table(header, table))
    failed = [row for row in table if row[-1] != "ok"]
    print(f"{len(rows) - len(failed)} of {len(rows)} within their tolerance")
    if args.json is not None:
        names = ("part", "array", "difference", "allowed")
        args.json.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=1))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
