"""Tensors of published pi0 and pi0.5 files: every spelling, both directions, and what does not fit by its name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from model import pi_weights
from model.pi_weights import canonical, our_name, published_shapes, read_tensors, to_ours, to_published
from tests.pi_fixtures import KINDS, folder, plain
from utils.policy_folder import PolicyFolderError, read_weights


def tensors(kind: str, part: str = "policy") -> dict[str, Tensor]:
    return read_weights(folder(kind) / part)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_come_from_shapes(kind: str) -> None:
    sizes, _ = read_tensors(tensors(kind), "file")
    wanted = plain(kind, "sizes.json")
    for part, found in (("language", sizes.language), ("expert", sizes.expert)):
        assert (found.width, found.mlp_dim, found.num_heads, found.head_dim) == tuple(
            wanted[part][key] for key in ("width", "mlp_dim", "num_heads", "head_dim")
        )
    assert (sizes.variant, sizes.num_layers, sizes.vocab_size) == (kind, 3, 448)
    assert (sizes.vision_width, sizes.vision_layers, sizes.vision_mlp_dim) == (32, 2, 52)
    assert (sizes.patch_size, sizes.image_size, sizes.max_action_dim) == (14, 56, 32)
    assert sizes.max_state_dim == (32 if kind == "pi0" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_are_each_others_inverse(kind: str) -> None:
    sizes, named = read_tensors(tensors(kind), "file", kind)
    assert named.keys() == published_shapes(sizes).keys()
    there = to_ours(named)
    assert len(there) == len(named) and torch.equal(
        there["action_head.action_out_proj.bias"], -named["action_out_proj.bias"]
    )
    back = to_published(there, named)
    assert all(torch.equal(back[name], value) for name, value in named.items())


@pytest.mark.parametrize("kind", KINDS)
def test_openpis_layout_is_the_same_policy_rounded(kind: str) -> None:
    _, lerobot = read_tensors(tensors(kind), "file")
    _, openpi = read_tensors(tensors(kind, "openpi"), "file")
    assert lerobot.keys() == openpi.keys()
    assert all(torch.equal(lerobot[name].bfloat16(), value) for name, value in openpi.items())
    assert all(value.dtype == torch.float32 for value in pi_weights.float32_masters(openpi).values())


@pytest.mark.parametrize(
    "spelling",
    [
        "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.bias",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.bias",
        "paligemma_with_expert.paligemma.vision_tower.vision_model.post_layernorm.bias",
        "model.paligemma_with_expert.paligemma.vision_tower.post_layernorm.bias",
    ],
)
def test_every_spelling_of_a_name(spelling: str) -> None:
    assert canonical(spelling) == f"{pi_weights.VISION}post_layernorm.bias"
    assert our_name(canonical(spelling)) == "backbone.backbone.vision_tower.post_layernorm.bias"


def test_older_spellings_of_the_language_model() -> None:
    start = "model.paligemma_with_expert.paligemma."
    assert canonical(f"{start}language_model.model.embed_tokens.weight") == pi_weights.TABLE
    assert canonical(f"{start}language_model.lm_head.weight") == pi_weights.TABLE_OF_OUTPUT
    assert canonical(f"{start}multi_modal_projector.linear.bias") == f"{pi_weights.PROJECTOR}bias"
    assert canonical("model.action_in_proj.bias") == "action_in_proj.bias"


def test_the_output_table_stands_for_the_input_table_where_that_is_missing() -> None:
    whole = tensors("pi0")
    table = whole.pop(f"model.{pi_weights.TABLE}")
    assert torch.equal(read_tensors(whole, "file")[1][pi_weights.TABLE], table)


Q_PROJ = "paligemma_with_expert.gemma_expert.model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w.pop(f"model.{Q_PROJ}"), f"file: {Q_PROJ} is missing; download or convert it again"),
        (lambda w: w.update(surplus=torch.ones(1)), "file: surplus is not part of pi0; download"),
        (lambda w: w.update({f"model.{Q_PROJ}": torch.ones(3, 4)}), f"{Q_PROJ} is (3, 4), wanted (128, 32)"),
        (lambda w: w.update({Q_PROJ: torch.ones(1)}), f"{Q_PROJ} is there twice, under two spellings"),
        (lambda w: w.pop("model.action_in_proj.weight"), "action_in_proj.weight is missing"),
        (
            lambda w: w.update({"model.time_mlp_in.weight": torch.ones(1)}),
            "a mixture of pi0 and pi0.5: it has tensors of both (time_mlp_in, action_time_mlp_in)",
        ),
        (lambda w: [w.pop(key) for key in list(w) if "time" in key or "state" in key], "neither a pi0 nor a pi0.5"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, fault: str) -> None:
    found = tensors("pi0")
    change(found)
    with pytest.raises(PolicyFolderError, match=re.escape(fault)):
        read_tensors(found, "file")


def test_a_pi05_declared_pi0_is_refused() -> None:
    with pytest.raises(PolicyFolderError, match="file: declared as pi0, but its tensors are those of pi05"):
        read_tensors(tensors("pi05"), "file", "pi0")


def test_heads_of_the_vision_tower_must_divide_its_width() -> None:
    sizes, _ = read_tensors(tensors("pi0"), "file")
    with pytest.raises(PolicyFolderError, match="vision_num_attention_heads is 5, which does not divide .* width 32"):
        sizes.backbone_config(5)
