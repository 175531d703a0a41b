"""ALOHA's two simulated tasks and what the robot is told: the instruction, then paraphrases. Needs no simulator."""

TASKS: dict[str, tuple[str, ...]] = {
    "transfer_cube": (
        "pick up the red cube with the right arm and hand it to the left arm",
        "take the red block and pass it from the right gripper to the left one",
        "give the cube to your left hand",
    ),
    "insertion": (
        "insert the red peg into the blue socket",
        "push the peg into the socket",
        "plug the red stick into the blue tube",
    ),
}
