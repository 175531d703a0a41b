"""A scripted expert for LIBERO's tasks that put one thing on or into another.

It knows poses and collision shapes from the simulator, which a policy does not. Bowls are taken by their rim,
everything else across its narrow side; of the grips with room for fingers and hand, it takes the one that turns least.
Stages advance once a control step, with `advance`; `action` only reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

STEP_M, STEP_RAD = 0.05, 0.5  # what an action of 1 asks for
GAIN = 0.7  # part of the way that is asked for in one step
OPENING_M = 0.072  # between the fingers, less a margin
FINGER_M = 0.02  # an open finger's thickness, and room for it
OPEN, SHUT = -1.0, 1.0
RIM_DEPTH_M, WALL_M = 0.025, 0.007  # how far below a bowl's rim, and inside its outer radius, it is held
ANGLES = np.deg2rad(np.arange(-90, 90, 7.5))
ENOUGH_M = 0.012  # of room: then the grip that turns least is taken
CARRY_M = 0.07  # above what is passed over
HAND_M, HAND_ABOVE_M = 0.1, 0.035  # half the hand's width, along which the fingers open; its height over the grip
HELD_ABOVE_M = 0.045  # about so far above its bottom a thing is held
HAND_ROOM_M = 0.03  # around it
MOVED_M = 0.005  # then its grip is chosen again
OVER_M = 0.03  # a thing's middle from that of its place: then it is lowered, not lifted first
THERE_M = 0.02  # from where a way above things ends
OPENED_M, TURNED_RAD = 0.06, 0.2  # fingers so far apart, over the grip and turned to it, go down, not up first
SIGNS = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T  # of a box's corners


@dataclass(frozen=True)
class Grip:
    """Where the gripper takes hold: the point between its fingertips, world frame; the angle in radians about the
    vertical by which it is turned from its pose at rest; how far from the thing's middle, in parts of its length."""

    position: np.ndarray
    angle: float
    off_centre: float = 0.0


class Shapes:
    """Where the collision shapes of things and furniture are, from the simulation.

    Args:
        env: LIBERO's environment; only read.
    """

    def __init__(self, env: Any) -> None:
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._geoms = {name: _shapes(self._model, body) for name, body in env.obj_body_id.items()}

    def corners(self, name: str) -> np.ndarray:
        """(N, 3): the corners of a thing's collision shapes, world frame."""
        geoms = self._geoms[name]
        centre, half = np.split(self._model.geom_aabb[geoms], 2, axis=1)
        own = centre[:, None] + SIGNS * half[:, None]  # (geoms, 8, 3)
        turned = np.einsum("gij,gcj->gci", self._data.geom_xmat[geoms].reshape(-1, 3, 3), own)
        return (self._data.geom_xpos[geoms][:, None] + turned).reshape(-1, 3)

    def box(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest x, y, z of a thing."""
        corners = self.corners(name)
        return corners.min(axis=0), corners.max(axis=0)

    def beside(self, name: str, point: np.ndarray, height: float) -> float:
        """Metres, seen from above, from a point (x, y) to the nearest shape of a thing that reaches above `height`."""
        distances, tops = self._seen_from_above(name, point[None])
        return float(distances[0, tops > height].min(initial=np.inf))

    def top(self, name: str, points: np.ndarray, metres: float) -> float:
        """The height of the highest shape of a thing within so many metres of points (N, 2), seen from above; or 0."""
        distances, tops = self._seen_from_above(name, points)
        return float(tops[(distances < metres).any(axis=0)].max(initial=0.0))

    def _seen_from_above(self, name: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances (points, shapes) from points (N, 2) to the shapes of a thing, and how high each shape reaches."""
        geoms = self._geoms[name]
        centre, half = np.split(self._model.geom_aabb[geoms], 2, axis=1)
        turns = self._data.geom_xmat[geoms].reshape(-1, 3, 3)
        centres = self._data.geom_xpos[geoms] + np.einsum("gij,gj->gi", turns, centre)
        tops = centres[:, 2] + np.einsum("gj,gj->g", np.abs(turns[:, 2]), half)
        away = np.concatenate([points[:, None] - centres[:, :2], np.zeros((len(points), len(geoms), 1))], axis=2)
        outside = np.abs(np.einsum("gji,pgj->pgi", turns, away)) - half
        return np.linalg.norm(np.maximum(outside, 0.0), axis=2), tops

    def apart(self, names: Iterable[str], others: Iterable[str], metres: float) -> bool:
        """Whether every thing has so much room to every other, seen from above."""
        boxes = {name: self.box(name) for name in {*names, *others}}
        for name in names:
            low, high = boxes[name]
            for other in boxes.keys() - {name}:
                beside = np.maximum(boxes[other][0] - high, low - boxes[other][1])[:2]
                if beside.max() < metres:
                    return False
        return True


class PickAndPlace:
    """The expert of one episode, from its start or from where somebody else has brought it.

    It begins with the approach, or, where the gripper holds the thing, by carrying it, or by lowering it, where that is
    over its place.

    Args:
        env: LIBERO's environment, after its reset; only read.
        task: its name, for errors.

    Raises:
        NotImplementedError: the goal is not one thing on or in another.
    """

    def __init__(self, env: Any, task: str) -> None:
        goals = env.parsed_problem["goal_state"]
        one_thing = len(goals) == 1 and goals[0][0] in ("on", "in") and goals[0][1] in env.objects_dict
        if not one_thing or (goals[0][0] == "in" and "cabinet" in goals[0][2]):
            raise NotImplementedError(
                f"{task} has no scripted expert: it is not to put one thing on or into another; there are experts for "
                "libero_spatial, libero_object and those tasks of libero_goal and libero_90 that are"
            )
        self._env, self._model, self._data = env, env.sim.model._model, env.sim.data._data
        _, self._thing, self._place = goals[0]
        self._shapes = Shapes(env)
        self._held: np.ndarray | None = None  # the gripper's position minus the thing's, once it is held
        self._since = 0
        if self._grasps():
            self._stage = self._go_on()
        else:
            self._stage = 0
            self._plan_grip()

    def advance(self) -> None:
        """One control step has passed, by the expert's own action or by somebody else's, who may be further than it."""
        self._since += 1
        if self._stage < 2:
            if np.abs(self._centre(self._thing) - self._gripped_at).max() > MOVED_M:
                self._plan_grip()
            if self._grasps():
                self._stage, self._since = self._go_on(), 0
            elif self._stage == 0 and self._is_on_its_way_down():
                self._stage, self._since = 1, 0
        target, _ = self._target()
        there = np.abs(target - self._gripper()).max() < (THERE_M if self._stage in (0, 3) else 0.008)
        least, most = ((1, 60), (1, 40), (9, 9), (1, 40), (1, 80), (1, 30), (7, 7), (1, 1000))[self._stage]
        if self._stage < 7 and self._since >= least and (there or self._since >= most):
            self._stage, self._since = self._stage + 1, 0
            if self._stage == 3:
                self._held = self._gripper() - self._centre(self._thing)

    def action(self) -> np.ndarray:
        """float64 (7,) in [-1, 1]."""
        target, opening = self._target()
        angle = self._grip.angle if self._stage < 7 else 0.0
        move = GAIN * (target - self._gripper()) / STEP_M
        turn = GAIN * self._rotation_error(angle) / STEP_RAD
        return np.clip([*move, *turn, opening], -1.0, 1.0)

    def _grasps(self) -> bool:
        """Whether both fingers touch the thing."""
        return bool(self._env._check_grasp(self._env.robots[0].gripper, self._env.objects_dict[self._thing]))

    def _is_on_its_way_down(self) -> bool:
        """Whether the gripper is open, turned as the grip, and straight over it, below where the approach ends."""
        away = self._gripper() - self._target()[0]
        fingers = self._data.qpos[self._env.robots[0]._ref_gripper_joint_pos_indexes]
        return bool(
            np.abs(away[:2]).max() < THERE_M
            and away[2] < 0
            and np.abs(fingers).sum() > OPENED_M
            and np.linalg.norm(self._rotation_error(self._grip.angle)) < TURNED_RAD
        )

    def _go_on(self) -> int:
        """The stage in which to begin with a thing that is held."""
        finger = self._env.robots[0].controller.ee_ori_mat[:, 0]
        self._grip = Grip(self._gripper(), float(np.arctan2(-finger[0], finger[1])))
        self._held = self._gripper() - self._centre(self._thing)
        place, _ = self._destination()
        over_its_place = np.linalg.norm((self._centre(self._thing) - place)[:2]) < OVER_M
        return 5 if over_its_place else 3

    def _plan_grip(self) -> None:
        """Choose a grip of the thing where it lies now: it may still slide, or be pushed."""
        self._gripped_at, self._grip = self._centre(self._thing), self._best_grip()

    def _target(self) -> tuple[np.ndarray, float]:
        """Where the gripper goes in this stage, and its command."""
        grip = self._grip.position
        over = self._highest_furniture(self._gripper()[:2], grip[:2]) + 0.02
        above = [grip[0], grip[1], max(grip[2] + 0.06, self._box(self._thing)[1][2] + 0.06, over)]
        if self._stage == 0:
            return np.array(above), OPEN
        if self._stage == 1:
            return grip, OPEN
        if self._stage == 2:
            return grip, SHUT
        assert self._held is not None
        low = self._held[2] + self._centre(self._thing)[2] - self._box(self._thing)[0][2]  # gripper above its bottom
        place, top = self._destination()
        place = place + [*self._held[:2], 0.0]
        passed = self._highest_furniture(grip[:2], place[:2]) - CARRY_M + 0.02
        carry = max(place[2] + top, self._lifted_from(), passed) + CARRY_M + low
        if self._stage == 3:
            return np.array([grip[0], grip[1], carry]), SHUT
        if self._stage == 4:
            return np.array([place[0], place[1], carry]), SHUT
        down = np.array([place[0], place[1], place[2] + top + low + 0.012])
        if self._stage in (5, 6):
            return down, SHUT if self._stage == 5 else OPEN
        return np.array([*self._gripper()[:2], carry]), OPEN

    def _gripper(self) -> np.ndarray:
        return self._data.site_xpos[self._env.robots[0].eef_site_id].copy()

    def _rotation_error(self, angle: float) -> np.ndarray:
        """The rotation vector (3,) from the gripper's pose to one that looks down, turned by `angle`."""
        finger, down = np.array([-np.sin(angle), np.cos(angle), 0.0]), np.array([0.0, 0.0, -1.0])
        wanted = np.stack([finger, np.cross(down, finger), down], axis=1)
        missing = wanted @ self._env.robots[0].controller.ee_ori_mat.T
        cosine = np.clip((np.trace(missing) - 1) / 2, -1.0, 1.0)
        axis = np.array([missing[2, 1] - missing[1, 2], missing[0, 2] - missing[2, 0], missing[1, 0] - missing[0, 1]])
        return np.arccos(cosine) * axis / max(np.linalg.norm(axis), 1e-9)

    def _corners(self, name: str) -> np.ndarray:
        return self._shapes.corners(name)

    def _box(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._shapes.box(name)

    def _centre(self, name: str) -> np.ndarray:
        low, high = self._box(name)
        return (low + high) / 2

    def _lifted_from(self) -> float:
        """The height of the highest thing that is not a fixture, which a carried one may have to pass."""
        others = [name for name in self._env.objects_dict if name != self._thing]
        return max((self._box(name)[1][2] for name in others), default=0.0) - 0.04

    def _highest_furniture(self, start: np.ndarray, end: np.ndarray) -> float:
        """The height of the highest furniture that the hand passes on the straight way between two points (x, y)."""
        way = start + np.linspace(0.0, 1.0, 9)[:, None] * (end - start)
        tops = (self._shapes.top(name, way, HAND_M + HAND_ROOM_M) for name in self._env.fixtures_dict)
        return max(tops, default=0.0)

    def _destination(self) -> tuple[np.ndarray, float]:
        """Where the thing's bottom goes: x, y and the height of the place; and how far above it things are let go."""
        if self._place in self._env.object_sites_dict:
            site = self._data.site_xpos[self._model.site(self._place).id].copy()
            if "contain_region" in self._place:  # a basket: over its rim
                rim = self._box(self._place.removesuffix("_contain_region"))[1][2]
                return site, rim - site[2] - 0.03
            return site, 0.0
        low, high = self._box(self._place)
        centre = (low + high) / 2
        if "bowl" in self._place:
            return np.array([centre[0], centre[1], low[2]]), high[2] - low[2] - 0.02
        return np.array([centre[0], centre[1], low[2]]), high[2] - low[2] - 0.008

    def _best_grip(self) -> Grip:
        """The first with enough room for fingers and hand, in the order of the turn; else the one with most room."""
        grips = list(self._grips_of_a_rim() if "bowl" in self._thing else self._grips_across())
        if not grips:
            raise NotImplementedError(f"{self._thing} is too wide for the gripper")
        roomy = [grip for grip in grips if grip[0] >= ENOUGH_M]
        if not roomy:
            return max(grips, key=itemgetter(0))[1]
        return min(roomy, key=lambda grip: (abs(grip[1].angle), grip[1].off_centre, -grip[0]))[1]

    def _grips_of_a_rim(self) -> Iterator[tuple[float, Grip]]:
        """Room and grip, one finger in the bowl."""
        low, high = self._box(self._thing)
        centre, height = (low + high)[:2] / 2, high[2] - RIM_DEPTH_M
        radius = np.mean(high[:2] - low[:2]) / 2 - WALL_M
        for angle in ANGLES:
            finger = np.array([-np.sin(angle), np.cos(angle)])
            for side in (-1.0, 1.0):
                point = centre + side * radius * finger
                fingertip = self._room(point + 0.04 * side * finger, height)
                room = min(fingertip, self._hand_room(point, finger, height), 0.05)
                room += min(self._room_at_destination(point - centre, finger), 0.0)
                yield room, Grip(np.array([*point, height]), angle)

    def _grips_across(self) -> Iterator[tuple[float, Grip]]:
        """Room and grip, a finger on either side: in the middle, and of what is flat a quarter of its length off."""
        corners = self._corners(self._thing)
        low, high = corners.min(axis=0), corners.max(axis=0)
        centre = (low + high)[:2] / 2
        flat = high[2] - low[2] < 0.06
        height = max(high[2] - 0.03, (low[2] + high[2]) / 2 if flat else low[2])
        for angle in ANGLES:
            finger = np.array([-np.sin(angle), np.cos(angle)])
            along = np.array([finger[1], -finger[0]])
            width, length = (np.ptp((corners[:, :2] - centre) @ axis) for axis in (finger, along))
            if width > OPENING_M:
                continue
            for part in (0.0, -0.25, 0.25) if flat else (0.0,):
                point = centre + part * length * along
                ends = [point + side * 0.05 * finger for side in (-1.0, 1.0)]
                room = min(*(self._room(end, height) for end in ends), self._hand_room(point, finger, height), 0.04)
                room += min(self._room_at_destination(point - centre, finger), 0.0)
                yield room, Grip(np.array([*point, height]), angle, abs(part))

    def _room(self, point: np.ndarray, height: float) -> float:
        """Metres from a fingertip to the nearest other thing or wall of furniture, seen from above; negative within."""
        others = [self._box(name) for name in self._env.objects_dict if name != self._thing]
        things = min((_distance(point, *box) for box in others), default=np.inf)
        walls = (self._shapes.beside(name, point, height) for name in self._env.fixtures_dict)
        return min(things, *walls, np.inf) - FINGER_M / 2

    def _hand_room(self, point: np.ndarray, finger: np.ndarray, height: float) -> float:
        """Metres, seen from above, between the hand over a grip and the nearest thing that reaches up to it."""
        ends = [point + side * HAND_M * finger for side in (-1.0, 0.0, 1.0)]
        rooms = (
            self._shapes.beside(name, end, height + HAND_ABOVE_M)
            for name in (*self._env.fixtures_dict, *self._env.objects_dict)
            for end in ends
            if name != self._thing
        )
        room = min(rooms, default=np.inf)
        return room - HAND_ROOM_M if room > 0 else -HAND_M

    def _room_at_destination(self, offset: np.ndarray, finger: np.ndarray) -> float:
        """Metres between the hand, when it lets go, and the nearest piece of furniture that stands higher."""
        place, top = self._destination()
        tall = [self._box(name) for name in self._env.fixtures_dict]
        tall = [box for box in tall if box[1][2] > place[2] + top + HELD_ABOVE_M + HAND_ABOVE_M]
        ends = [place[:2] + offset + side * HAND_M * finger for side in (-1.0, 0.0, 1.0)]
        return min((_distance(end, *box) for box in tall for end in ends), default=np.inf) - HAND_ROOM_M


def _shapes(model: Any, root: int) -> np.ndarray:
    """The collision shapes (geoms of group 0) of a body and of all that hang on it."""
    parents, found = model.body_parentid, {root}
    for body in range(root + 1, model.nbody):  # parents come first
        if parents[body] in found:
            found.add(body)
    return np.flatnonzero(np.isin(model.geom_bodyid, list(found)) & (model.geom_group == 0))


def _distance(point: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """From a point to a box, seen from above; negative within it."""
    outside = np.maximum(np.maximum(low[:2] - point, point - high[:2]), 0.0)
    return float(np.linalg.norm(outside)) if outside.any() else -float(min(*(point - low[:2]), *(high[:2] - point)))
