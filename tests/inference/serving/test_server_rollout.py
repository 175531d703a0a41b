"""A whole simulated episode through openpi's client takes the actions of in-process prediction."""

from __future__ import annotations

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from envs import make_env
from inference.closed_loop.rollout import ModelPolicy
from inference.predictor import VLAPredictor
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.serving.servers import running
from utils.misc import derive_seed

SEED = 10_003


@pytest.mark.slow
@pytest.mark.sim
def test_a_rollout_through_openpis_client(tmp_path, tiny_paligemma_dir):
    demos = write_episodes(tmp_path / "demos.parquet", [8, 8])
    predictor = VLAPredictor.from_checkpoint(train_tiny(tmp_path, tiny_paligemma_dir, [demos]), device="cpu")
    env = make_env("metaworld", "window-open-v3", image_size=64)
    policy = ModelPolicy(predictor)
    policy.reset(env, SEED)

    def drive(plan):
        observation, _ = env.reset(seed=SEED)
        states, actions, number, ended = [observation["state"]], [], 0, False
        while not ended:
            for action in plan(observation, number)[: predictor.n_action_steps]:
                observation, _, terminated, truncated, _ = env.step(action)
                actions.append(action)
                states.append(observation["state"])
                ended = ended or terminated or truncated
            number += 1
        return np.array(actions), np.array(states)

    with running(predictor) as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port)

        def ask(observation, number):
            request = {"observation/image": observation["image_1"], "observation/state": observation["state"]}
            request |= {"prompt": env.unwrapped.instruction, "seed": derive_seed("rollout", SEED, number)}
            return client.infer(request)["actions"]

        served_actions, served_states = drive(ask)
    own_actions, own_states = drive(lambda observation, number: policy.plan([observation], env.unwrapped.instruction))
    env.close()
    np.testing.assert_allclose(served_actions, own_actions, atol=1e-6)
    np.testing.assert_allclose(served_states, own_states, atol=1e-6)
    assert np.ptp(own_states, axis=0).max() > 1e-3, "the robot moved"
