"""The 50 tasks of Meta-World v3: what the robot is told, and how hard the task is. Needs no simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tier = Literal["easy", "medium", "hard", "very hard"]


@dataclass(frozen=True)
class MetaWorldTask:
    """One task.

    ``tier`` follows Seo et al. 2022, "Masked World Models for Visual Control" (arXiv 2206.14244), appendix F:
    the grouping that LeRobot's and SmolVLA's Meta-World results are reported in.
    """

    instruction: str
    tier: Tier


TASKS: dict[str, MetaWorldTask] = {
    "assembly-v3": MetaWorldTask("pick up the ring by its handle and put it over the peg", "hard"),
    "basketball-v3": MetaWorldTask("pick up the basketball and drop it through the hoop", "medium"),
    "bin-picking-v3": MetaWorldTask("take the block out of the red bin and put it in the blue bin", "medium"),
    "box-close-v3": MetaWorldTask("pick up the lid and close the box with it", "medium"),
    "button-press-topdown-v3": MetaWorldTask("press the button down from above", "easy"),
    "button-press-topdown-wall-v3": MetaWorldTask("reach over the wall and press the button down", "easy"),
    "button-press-v3": MetaWorldTask("push the button on the front of the box", "easy"),
    "button-press-wall-v3": MetaWorldTask("go around the wall and push the button behind it", "easy"),
    "coffee-button-v3": MetaWorldTask("press the button of the coffee machine", "easy"),
    "coffee-pull-v3": MetaWorldTask("pull the mug away from the coffee machine", "medium"),
    "coffee-push-v3": MetaWorldTask("push the mug under the coffee machine", "medium"),
    "dial-turn-v3": MetaWorldTask("turn the dial", "easy"),
    "disassemble-v3": MetaWorldTask("lift the ring off the peg", "very hard"),
    "door-close-v3": MetaWorldTask("close the door", "easy"),
    "door-lock-v3": MetaWorldTask("lock the door by turning the knob down", "easy"),
    "door-open-v3": MetaWorldTask("open the door by its handle", "easy"),
    "door-unlock-v3": MetaWorldTask("unlock the door by turning the knob sideways", "easy"),
    "drawer-close-v3": MetaWorldTask("push the drawer shut", "easy"),
    "drawer-open-v3": MetaWorldTask("pull the drawer open", "easy"),
    "faucet-close-v3": MetaWorldTask("close the faucet", "easy"),
    "faucet-open-v3": MetaWorldTask("open the faucet", "easy"),
    "hammer-v3": MetaWorldTask("pick up the hammer and drive the nail into the wall", "medium"),
    "hand-insert-v3": MetaWorldTask("put the gripper into the hole in the table", "hard"),
    "handle-press-side-v3": MetaWorldTask("press the handle on the side of the box down", "easy"),
    "handle-press-v3": MetaWorldTask("press the handle down", "easy"),
    "handle-pull-side-v3": MetaWorldTask("pull the handle on the side of the box up", "easy"),
    "handle-pull-v3": MetaWorldTask("pull the handle up", "easy"),
    "lever-pull-v3": MetaWorldTask("pull the lever up", "easy"),
    "peg-insert-side-v3": MetaWorldTask("pick up the peg and insert it into the hole in the side", "medium"),
    "peg-unplug-side-v3": MetaWorldTask("pull the peg out of its socket", "easy"),
    "pick-out-of-hole-v3": MetaWorldTask("lift the block out of the hole in the table", "hard"),
    "pick-place-v3": MetaWorldTask("pick up the puck and hold it at the goal", "hard"),
    "pick-place-wall-v3": MetaWorldTask("pick up the puck and carry it over the wall to the goal", "very hard"),
    "plate-slide-back-side-v3": MetaWorldTask("slide the plate sideways out of the cabinet", "easy"),
    "plate-slide-back-v3": MetaWorldTask("slide the plate back out of the cabinet", "easy"),
    "plate-slide-side-v3": MetaWorldTask("slide the plate sideways into the cabinet", "easy"),
    "plate-slide-v3": MetaWorldTask("slide the plate forward into the cabinet", "easy"),
    "push-back-v3": MetaWorldTask("pull the puck back to the goal", "hard"),
    "push-v3": MetaWorldTask("push the puck to the goal", "hard"),
    "push-wall-v3": MetaWorldTask("push the puck around the wall to the goal", "medium"),
    "reach-v3": MetaWorldTask("move the gripper to the goal", "easy"),
    "reach-wall-v3": MetaWorldTask("move the gripper over the wall to the goal", "easy"),
    "shelf-place-v3": MetaWorldTask("pick up the block and place it on the shelf", "very hard"),
    "soccer-v3": MetaWorldTask("push the soccer ball into the net", "medium"),
    "stick-pull-v3": MetaWorldTask("grasp the stick and pull the thermos with it", "very hard"),
    "stick-push-v3": MetaWorldTask("grasp the stick and push the thermos with it", "very hard"),
    "sweep-into-v3": MetaWorldTask("sweep the block into the hole in the table", "medium"),
    "sweep-v3": MetaWorldTask("sweep the block off the edge of the table", "medium"),
    "window-close-v3": MetaWorldTask("slide the window closed", "easy"),
    "window-open-v3": MetaWorldTask("slide the window open", "easy"),
}
TIERS: dict[str, str] = {name: task.tier for name, task in TASKS.items()}
