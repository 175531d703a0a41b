"""The controller of a real robot: a planner thread that takes as long as the test says, on a clock of the test's."""

from __future__ import annotations

import threading
import time
from concurrent import futures

import numpy as np
import pytest

from inference.closed_loop.realtime import RealTimeController, UnderrunError
from inference.closed_loop.rollout import ModelPolicy, execution_settings
from inference.predictor import VLAPredictor
from model.action_head.guidance import soft_mask
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.closed_loop.settings import executing

HORIZON = 10


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Planner:
    """Plans (step it is for, number of the plan). A plan ends when `go` lets it, having taken `seconds`."""

    max_seq_len = 2

    def __init__(self, clock, strategy="rtc", n_action_steps=3):
        self.execution = executing(HORIZON, n_action_steps, strategy)
        self.clock, self.go, self.seconds, self.seen, self.fault = clock, threading.Semaphore(0), 0.15, [], None

    def reset(self, env, seed):
        pass

    def plan(self, history, prompt, prefix=None):
        assert self.go.acquire(timeout=10)
        if self.fault is not None:
            raise self.fault
        self.clock.now += self.seconds
        self.seen.append(([observation["state"][0] for observation in history], prompt, prefix))
        start = history[-1]["state"][0]
        return np.array([(start + i, len(self.seen) - 1) for i in range(HORIZON)], np.float32)


def observe(step):
    return {"image_1": np.zeros((4, 4, 3), np.uint8), "state": np.array([step], np.float32)}


@pytest.fixture
def make_controller():
    """Started controllers, ended after the test."""
    controllers = []

    def make(planner, **options):
        controller = RealTimeController(
            planner, prompt="open the window", control_hz=10, clock=planner.clock, **options
        )
        controllers.append((controller, planner))
        planner.go.release()
        controller.start(observe(0))
        return controller

    yield make
    for controller, planner in controllers:
        for _ in range(3):
            planner.go.release()
        controller.close()


def test_executes_while_it_plans(make_controller):
    planner = Planner(Clock())
    controller = make_controller(planner)
    assert controller.delay == 2  # 0.15 s at 10 Hz, rounded up
    actions = [controller.act(observe(step)) for step in range(5)]  # a plan is wanted at step 3, and takes its time
    assert len(planner.seen) == 1
    planner.go.release()
    controller.wait(timeout=10)
    actions += [controller.act(observe(step)) for step in range(5, 7)]
    np.testing.assert_array_equal(np.stack(actions)[:, 0], range(7))  # old or new, each for its own step
    np.testing.assert_array_equal(np.stack(actions)[:, 1], [0, 0, 0, 0, 0, 1, 1])
    history, prompt, prefix = planner.seen[1]
    assert history == [2, 3] and prompt == "open the window"  # observations of now and before, each once
    assert prefix.weight_BT[0].tolist() == soft_mask(HORIZON, delay=2, overlap=7).tolist()
    assert prefix.action_BTA[0, :7, 0].tolist() == list(range(3, 10))
    assert controller.underruns == 0


def test_measured_latency_sets_how_much_is_committed(make_controller):
    planner = Planner(Clock(), n_action_steps=1)
    controller = make_controller(planner)
    planner.seconds = 0.38
    for step in range(16):
        controller.act(observe(step))
        if step % 4 == 3:
            planner.go.release()
            controller.wait(timeout=10)
            planner.seconds = 0.1
    assert controller.latencies == pytest.approx([0.15, 0.38, 0.1, 0.1, 0.1]) and controller.delay == 4
    committed = [int((prefix.weight_BT == 1).sum()) for _, _, prefix in planner.seen[1:]]
    assert committed == [2, 4, 4, 4]  # the slowest of the last plans counts


def test_a_late_plan_is_warned_about(make_controller, caplog):
    planner = Planner(Clock())
    controller = make_controller(planner)
    planner.seconds = 0.5
    for step in range(4):
        controller.act(observe(step))
    planner.go.release()
    controller.wait(timeout=10)
    assert "a plan took 5 control steps, not 2: chunks may not fit together" in caplog.text


def test_an_underrun_raises_or_holds(make_controller):
    planner = Planner(Clock())
    controller = make_controller(planner)
    for step in range(HORIZON):
        controller.act(observe(step))
    message = "control step 10: no plan covers it; plans take up to 2 control steps of 1 / 10 s and cover 10 .* hold"
    with pytest.raises(UnderrunError, match=message):
        controller.act(observe(HORIZON))
    planner = Planner(Clock())
    controller = make_controller(planner, hold=lambda previous: previous * 0)
    actions = [controller.act(observe(step)) for step in range(HORIZON + 2)]
    assert controller.underruns == 2 and (np.stack(actions)[-2:] == 0).all()
    planner.go.release()
    controller.wait(timeout=10)
    assert controller.act(observe(HORIZON + 2))[0] == HORIZON + 2  # the plan of step 3 covers step 12, just
    assert controller.underruns == 2


def test_synchronous_execution_holds_while_planning(make_controller):
    planner = Planner(Clock(), strategy="synchronous")
    with pytest.raises(ValueError, match="synchronous execution stands still while it plans: give hold"):
        RealTimeController(planner, prompt="p", control_hz=10)
    controller = make_controller(planner, hold=lambda previous: previous * 0 - 1)
    actions = [controller.act(observe(step)) for step in range(5)]
    planner.go.release()
    controller.wait(timeout=10)
    actions.append(controller.act(observe(5)))
    assert np.stack(actions)[:, 0].tolist() == [0, 1, 2, -1, -1, 3]


def test_errors_of_the_planner_reach_the_control_loop(make_controller):
    planner = Planner(Clock())
    controller = make_controller(planner)
    for step in range(4):
        controller.act(observe(step))
    planner.fault = ValueError("the camera fell off")
    planner.go.release()
    with pytest.raises(ValueError, match="the camera fell off"):
        controller.wait(timeout=10)


@pytest.mark.parametrize("strategy", ["naive_async", "rtc", "ensemble", "synchronous"])
def test_one_failed_plan_is_raised_once_and_planning_goes_on(make_controller, strategy):
    planner = Planner(Clock(), strategy)
    controller = make_controller(planner, hold=lambda previous: np.array([-1, -1], np.float32))
    planned, errors = [], 0
    planner.fault = ConnectionError("the server restarts")
    for step in range(20):
        try:
            action = controller.act(observe(step))
            assert action[0] in (step, -1) or strategy == "synchronous"  # each for its own control step, or held
            planned.append(int(action[1]))
        except ConnectionError:
            errors += 1
        if controller._plan is not None:
            planner.go.release()
            futures.wait([controller._plan])
            if errors == 0 and planner.fault is not None:
                with pytest.raises(ConnectionError):
                    controller._plan.result()
                planner.fault = None
    assert errors == 1 and max(planned) >= 3


def test_a_plan_that_can_t_be_executed_is_not_the_last(make_controller):
    planner = Planner(Clock())
    controller = make_controller(planner)
    real = planner.plan
    planner.plan = lambda *arguments: real(*arguments)[:3]
    for step in range(4):
        controller.act(observe(step))
    planner.go.release()
    with pytest.raises(ValueError, match="the policy planned 3 actions, 0 of them not finite"):
        controller.wait(timeout=10)
    planner.plan = real
    planner.go.release()
    controller.act(observe(4))
    controller.wait(timeout=10)
    assert controller.act(observe(5)).tolist() == [5, 2]


@pytest.mark.parametrize("strategy", ["naive_async", "rtc", "ensemble", "synchronous"])
def test_every_start_begins_an_episode_of_its_own(make_controller, strategy):
    planner = Planner(Clock(), strategy)
    controller = make_controller(planner, hold=lambda previous: previous)
    for step in range(4):
        controller.act(observe(step))  # leaves a plan under way
    planner.go.release(2)
    controller.start(observe(100))
    assert planner.seen[-1][0] == [100] and planner.seen[-1][2] is None  # neither history nor chunk of the other
    actions = [controller.act(observe(100 + step))[0] for step in range(3)]
    assert actions == [100, 101, 102] and controller.underruns == 0


def test_a_start_that_failed_can_be_repeated():
    planner = Planner(Clock())
    planner.fault = ConnectionError("no server yet")
    with RealTimeController(planner, prompt="p", control_hz=10, clock=planner.clock) as controller:
        planner.go.release()
        with pytest.raises(ConnectionError, match="no server yet"):
            controller.start(observe(0))
        with pytest.raises(RuntimeError, match="act before start: call start"):
            controller.act(observe(0))
        planner.fault = None
        planner.go.release()
        controller.start(observe(1))
        assert controller.act(observe(1))[0] == 1


def test_mistakes():
    planner = Planner(Clock())
    with pytest.raises(ValueError, match="control_hz is 0; give the control loop's rate"):
        RealTimeController(planner, prompt="p", control_hz=0)
    with (
        RealTimeController(planner, prompt="p", control_hz=10) as controller,
        pytest.raises(RuntimeError, match="act before start: call start"),
    ):
        controller.act(observe(0))


def test_a_real_policy_in_real_time(tmp_path, tiny_paligemma_dir):
    """No fakes: threads, clock and a small model; every step has its action while plans are made."""
    files = [write_episodes(tmp_path / "a.parquet", [12])]
    checkpoint = train_tiny(tmp_path, tiny_paligemma_dir, files, head={"horizon": 20})
    predictor = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    policy = ModelPolicy(predictor, execution_settings(predictor, execution="rtc", n_action_steps=3))
    frame = {"image_1": np.full((40, 40, 3), 90, np.uint8), "state": np.zeros(4, np.float32)}
    with RealTimeController(
        policy, prompt="press the button", control_hz=5, hold=lambda previous: previous
    ) as controller:
        controller.start(frame)
        actions = []
        for _ in range(8):
            actions.append(controller.act(frame))
            time.sleep(0.2)
    assert np.isfinite(actions).all()
    assert len(controller.latencies) >= 2 and controller.underruns == 0
