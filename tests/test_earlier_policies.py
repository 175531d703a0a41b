"""Policies written by an earlier version load and act as they did: tests/fixtures/policies, with their actions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inference.predictor import VLAPredictor

POLICIES = Path(__file__).parent / "fixtures" / "policies"
# On the processor that wrote them the actions are equal to the bit; other kernels sum in another order.
TOLERANCE = {"atol": 2e-6, "rtol": 2e-6}


@pytest.mark.parametrize(
    "name", ["flow.pth.tar", "flow_export", "diffusion_siglip_llm.pth.tar", "discrete_delta.pth.tar"]
)
def test_policies_of_earlier_versions_act_as_they_did(name):
    expected = np.load(POLICIES / "expected.npz")
    predictor = VLAPredictor.from_pretrained(POLICIES / name, device="cpu")
    second = {"images_2": expected["image_2"]} if "image_2" in predictor.cameras else {}
    action_TA = predictor.predict(
        expected["image_1"], prompt="open the window", state=expected["state"], seed=7, **second
    )
    policy = name.removesuffix("_export").removesuffix(".pth.tar")
    np.testing.assert_allclose(action_TA, expected[f"{policy}_action"], **TOLERANCE)
