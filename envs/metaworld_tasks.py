"""The 50 tasks of Meta-World v3: what the robot is told, in several wordings, and how hard the task is.

Needs no simulator.
"""

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

# Other words for the same tasks: each names what is moved and where to, and none is another task's instruction.
PARAPHRASES: dict[str, tuple[str, ...]] = {
    "assembly-v3": ("take the ring and slip it onto the peg", "fit the ring over the upright peg"),
    "basketball-v3": ("throw the ball into the basket", "bring the basketball above the hoop and let go"),
    "bin-picking-v3": ("move the block from the red bin to the blue one", "sort the cube into the blue bin"),
    "box-close-v3": ("put the cover on the box", "shut the open box with its lid"),
    "button-press-topdown-v3": ("come from above and push the button in", "hit the button on top of the box"),
    "button-press-topdown-wall-v3": ("push the button behind the wall from above", "clear the wall, then press down"),
    "button-press-v3": ("press the red button facing you", "push in the box's front button"),
    "button-press-wall-v3": ("reach past the wall and press the button in", "press the button that the wall hides"),
    "coffee-button-v3": ("start the coffee machine", "make coffee by pushing the machine's button"),
    "coffee-pull-v3": ("take the cup out from under the coffee machine", "drag the mug off the coffee machine"),
    "coffee-push-v3": ("place the cup below the coffee machine", "slide the mug into the coffee machine"),
    "dial-turn-v3": ("rotate the dial", "twist the round knob around"),
    "disassemble-v3": ("take the ring off the peg", "remove the nut from the upright peg"),
    "door-close-v3": ("push the door shut", "swing the door until it is closed"),
    "door-lock-v3": ("turn the door's knob down to lock it", "lock up the door"),
    "door-open-v3": ("pull the door open", "swing the door out by its handle"),
    "door-unlock-v3": ("turn the door's knob sideways to unlock it", "undo the lock of the door"),
    "drawer-close-v3": ("close the drawer", "slide the drawer back in"),
    "drawer-open-v3": ("open the drawer", "slide the drawer out by its handle"),
    "faucet-close-v3": ("turn the water off", "rotate the tap until it is shut"),
    "faucet-open-v3": ("turn the water on", "rotate the tap to let water out"),
    "hammer-v3": ("hit the nail in with the hammer", "use the hammer to knock the nail in"),
    "hand-insert-v3": ("lower the hand into the opening of the table", "reach down into the hole"),
    "handle-press-side-v3": ("push down the lever beside the box", "from the side, press the handle downward"),
    "handle-press-v3": ("push the lever of the box downward", "move the handle to the bottom"),
    "handle-pull-side-v3": ("lift the lever beside the box", "from the side, raise the handle"),
    "handle-pull-v3": ("raise the lever of the box", "move the handle to the top"),
    "lever-pull-v3": ("lift the lever", "raise the lever until it points up"),
    "peg-insert-side-v3": ("plug the peg into the opening from the side", "grasp the peg and slide it into the hole"),
    "peg-unplug-side-v3": ("unplug the peg", "draw the peg sideways out of the hole"),
    "pick-out-of-hole-v3": ("take the block out of the hole", "grasp the cube in the hole and raise it"),
    "pick-place-v3": ("grasp the puck and bring it to the goal", "lift the puck to the marked spot"),
    "pick-place-wall-v3": ("lift the puck over the wall to its goal", "bring the puck to the far side of the wall"),
    "plate-slide-back-side-v3": ("move the plate out of the cabinet to the side", "take the plate out sideways"),
    "plate-slide-back-v3": ("pull the plate out of the cabinet", "bring the plate back toward you"),
    "plate-slide-side-v3": ("move the plate into the cabinet from the side", "get the plate in sideways"),
    "plate-slide-v3": ("push the plate straight into the cabinet", "move the plate forward until it is inside"),
    "push-back-v3": ("drag the puck back to its goal", "bring the puck toward you, to the goal"),
    "push-v3": ("move the puck over the table to the goal", "shove the puck onto the marked spot"),
    "push-wall-v3": ("shove the puck past the wall to its goal", "get the puck around the wall by pushing"),
    "reach-v3": ("reach for the goal", "bring the hand to the marked point"),
    "reach-wall-v3": ("reach the goal behind the wall", "bring the hand past the wall to the marked point"),
    "shelf-place-v3": ("put the cube on the shelf", "lift the block onto the shelf"),
    "soccer-v3": ("score a goal with the ball", "kick the soccer ball into the goal"),
    "stick-pull-v3": ("use the stick to drag the thermos", "hook the thermos with the stick and pull"),
    "stick-push-v3": ("use the stick to shove the thermos", "take the stick and push the thermos away with it"),
    "sweep-into-v3": ("push the block until it falls into the hole", "wipe the cube into the table's hole"),
    "sweep-v3": ("push the block off the table", "wipe the cube over the edge of the table"),
    "window-close-v3": ("close the window", "push the window shut by its handle"),
    "window-open-v3": ("open the window", "push the window open by its handle"),
}
