"""Scripted experts of ALOHA's two tasks: waypoints for both grippers, reached by inverse kinematics.

An expert knows the objects' poses from the simulator, which a policy does not. It is a list of stages; a stage says
where each gripper goes and whether it is open, and ends when both are there, or after a while. `advance` moves on to
the next stage and is called once a control step; `action` only reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

ARMS = ("left", "right")
TIP_M = 0.135  # from a gripper's link to between its fingertips, along the link's x axis
PITCH = np.deg2rad(60)  # of a gripper that picks something up from the table, downwards
MEETING = {"transfer_cube": np.array([0.0, 0.5, 0.25]), "insertion": np.array([0.0, 0.5, 0.15])}
DAMPING = 0.02  # of the least squares
GAIN = 0.35  # part of the error that one step's command takes away
MAX_STEP_M, MAX_STEP_RAD = 0.03, 0.15  # of that error, at most so much is looked at
NEAR_M, NEAR_RAD = 0.012, 0.12  # a gripper is there
OPEN, SHUT = 1.0, 0.0


@dataclass(frozen=True)
class Goal:
    """Where a gripper's tip goes, metres, world frame; the link's rotation there (3, 3); and how far it is open."""

    position: np.ndarray
    rotation: np.ndarray
    opening: float


@dataclass(frozen=True)
class Stage:
    """Goals of both arms as a function of the objects' positions, and when the stage is over.

    Attributes:
        goals: positions by body -> (left, right).
        least, most: control steps that it takes at least and at most.
        near: metres within which a gripper is where it should be.
    """

    goals: Callable[[dict[str, np.ndarray]], tuple[Goal, Goal]]
    least: int = 1
    most: int = 60
    near: float = NEAR_M


class AlohaExpert:
    """The expert of one episode, from its start or from where somebody else has brought it.

    Args:
        mujoco: the module.
        model, data: of the simulation; only read.
        task: "transfer_cube" or "insertion".
        reward: gym-aloha's, now. It begins with the approach, or with what the grippers have lifted from there on.
    """

    def __init__(self, mujoco: Any, model: Any, data: Any, task: str, reward: int = 0) -> None:
        self._mujoco, self._model, self._data = mujoco, model, data
        self._stages = STAGES[task]
        self._objects = OBJECTS[task]
        self._links = [model.body(f"vx300s_{arm}/gripper_link").id for arm in ARMS]
        # A joint moves once its command differs from its angle by friction / gain; a command far beyond that would take
        # as long to come back, so it is kept within twice as much of the angle.
        slack = model.dof_frictionloss[:16] / model.actuator_gainprm[:16, 0]
        self._slack = 2 * slack + 0.05
        self._stage, self._since = CARRYING[task].get(reward, 0), 0

    def advance(self) -> None:
        """One control step has passed."""
        self._since += 1
        stage = self._stages[self._stage]
        errors = [self._error(arm, goal) for arm, goal in enumerate(self._goals())]
        there = all(np.linalg.norm(e[:3]) < stage.near and np.linalg.norm(e[3:]) < NEAR_RAD for e in errors)
        over = self._since >= stage.least and (there or self._since >= stage.most)
        if over and self._stage < len(self._stages) - 1:
            self._stage, self._since = self._stage + 1, 0

    def action(self, command: np.ndarray) -> np.ndarray:
        """The next command (14,): joints in radians and grippers from 0 to 1, from the last one that was executed."""
        action = np.array(command, np.float64)
        for arm, goal in enumerate(self._goals()):
            joints, place = slice(7 * arm, 7 * arm + 6), slice(8 * arm, 8 * arm + 6)
            wanted = action[joints] + GAIN * self._joint_step(arm, self._error(arm, goal))
            angles, slack = self._data.qpos[place], self._slack[place]
            action[joints] = np.clip(wanted, angles - slack, angles + slack)
            action[7 * arm + 6] = goal.opening
        return action

    def _goals(self) -> tuple[Goal, Goal]:
        positions = {name: self._data.body(name).xpos.copy() for name in self._objects}
        tips = {arm: self._tip(number) for number, arm in enumerate(ARMS)}
        return self._stages[self._stage].goals({**positions, **tips})

    def _tip(self, arm: int) -> np.ndarray:
        return self._data.xpos[self._links[arm]] + TIP_M * self._rotation(arm)[:, 0]

    def _rotation(self, arm: int) -> np.ndarray:
        return self._data.xmat[self._links[arm]].reshape(3, 3)

    def _error(self, arm: int, goal: Goal) -> np.ndarray:
        """(6,): what is missing in position, and in rotation as a rotation vector, world frame."""
        missing = np.zeros(6)
        missing[:3] = goal.position - self._tip(arm)
        quaternion = np.zeros(4)
        self._mujoco.mju_mat2Quat(quaternion, (goal.rotation @ self._rotation(arm).T).ravel())
        self._mujoco.mju_quat2Vel(missing[3:], quaternion, 1.0)
        return missing

    def _joint_step(self, arm: int, error: np.ndarray) -> np.ndarray:
        """Joint angles (6,) that take a bounded part of the error away: damped least squares."""
        jacobian = np.zeros((6, self._model.nv))
        self._mujoco.mj_jac(self._model, self._data, jacobian[:3], jacobian[3:], self._tip(arm), self._links[arm])
        jacobian = jacobian[:, 8 * arm : 8 * arm + 6]
        bounded = np.concatenate([_bounded(error[:3], MAX_STEP_M), _bounded(error[3:], MAX_STEP_RAD)])
        return jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + DAMPING**2 * np.eye(6), bounded)


def _bounded(vector: np.ndarray, limit: float) -> np.ndarray:
    return vector * min(1.0, limit / max(np.linalg.norm(vector), 1e-9))


def _rotation(axis: str, angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    if axis == "x":
        return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


FACING_RIGHT = np.eye(3)  # the left arm's link looks along +x, the right arm's along -x
FACING_LEFT = np.diag([-1.0, -1.0, 1.0])
LEFT_PICK, RIGHT_PICK = FACING_RIGHT @ _rotation("y", PITCH), FACING_LEFT @ _rotation("y", PITCH)
LEFT_ROLLED = FACING_RIGHT @ _rotation("x", np.pi / 2)  # its fingers above and below, not left and right


def _up(metres: float) -> np.ndarray:
    return np.array([0.0, 0.0, metres])


def _transfer_stages() -> tuple[Stage, ...]:
    meeting = MEETING["transfer_cube"]
    waiting = Goal(meeting + [-0.12, 0.0, 0.0], LEFT_ROLLED, OPEN)

    def right(position: np.ndarray, opening: float) -> Goal:
        return Goal(position, RIGHT_PICK, opening)

    def take(positions: dict[str, np.ndarray], opening: float) -> Goal:
        return Goal(positions["box"] + [0.0, 0.0, -0.005], LEFT_ROLLED, opening)

    return (
        Stage(lambda p: (waiting, right(p["box"] + _up(0.09), OPEN))),
        Stage(lambda p: (waiting, right(p["box"], OPEN)), most=60, near=0.005),
        Stage(lambda p: (waiting, right(p["right"], SHUT)), least=14, most=14),
        Stage(lambda p: (waiting, right(meeting, SHUT))),
        Stage(lambda p: (take(p, OPEN), right(meeting, SHUT)), most=50),
        Stage(lambda p: (take(p, SHUT), right(meeting, SHUT)), least=18, most=18),
        Stage(lambda p: (Goal(meeting, LEFT_ROLLED, SHUT), right(meeting, OPEN)), least=10, most=10),
        Stage(lambda p: (Goal(meeting + [-0.05, 0, 0], LEFT_ROLLED, SHUT), right(meeting + [0.15, 0, 0.05], OPEN))),
    )


def _insertion_stages() -> tuple[Stage, ...]:
    meeting = MEETING["insertion"]

    def both(left: np.ndarray, right: np.ndarray, opening: float) -> tuple[Goal, Goal]:
        return Goal(left, LEFT_PICK, opening), Goal(right, RIGHT_PICK, opening)

    def apart(p: dict[str, np.ndarray], metres: float) -> tuple[Goal, Goal]:
        """Socket and peg on one line, their centres so far apart; each tip moves as its object has to."""
        socket, peg = meeting - [metres / 2, 0, 0], meeting + [metres / 2, 0, 0]
        return both(p["left"] + socket - p["socket"], p["right"] + peg - p["peg"], SHUT)

    return (
        Stage(lambda p: both(p["socket"] + _up(0.08), p["peg"] + _up(0.08), OPEN)),
        Stage(lambda p: both(p["socket"], p["peg"] + _up(0.012), OPEN), most=60, near=0.004),
        Stage(lambda p: both(p["socket"], p["peg"] + _up(0.012), SHUT), least=20, most=20),
        Stage(lambda p: both(p["left"] + _up(0.05), p["right"] + _up(0.05), SHUT), least=12, most=12),
        Stage(lambda p: apart(p, 0.22), least=20, most=70),
        Stage(lambda p: apart(p, 0.16), least=15, most=40),
        Stage(lambda p: apart(p, 0.085), most=300),
    )


STAGES = {"transfer_cube": _transfer_stages(), "insertion": _insertion_stages()}
OBJECTS = {"transfer_cube": ("box",), "insertion": ("peg", "socket")}
# gym-aloha's reward -> the stage that goes on from there: 2, lifted by the right gripper, or by both their own; 3 of
# insertion, the two touch; 4 of the cube, the left gripper touches it too
CARRYING = {"transfer_cube": {2: 3, 4: 5}, "insertion": {2: 3, 3: 4}}
