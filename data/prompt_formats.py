"""How an instruction becomes the text that a policy reads: PaliGemma's own way, and those of pi0 and pi0.5.

Shape letters: B batch, S state_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

PromptFormat = Literal["paligemma", "pi0", "openpi_pi0", "pi05"]

BIN_EDGES = np.linspace(-1, 1, 257)[:-1]  # left edges of 256 bins, float64


def prompt_texts(prompt: str, prompt_format: PromptFormat, state_bins: Sequence[int] | None = None) -> tuple[str, ...]:
    """The texts that are tokenized one after the other, without the token that a prompt starts with.

    `paligemma`: white space made single, a closing newline. `pi0` (LeRobot): as written, a closing newline unless
    there is one. `openpi_pi0`: "_" and newlines become spaces, and the closing newline is a text of its own. `pi05`
    (both libraries): the instruction and the state's bins in a sentence that ends in `Action: `.

    Args:
        prompt: the instruction as written.
        prompt_format: one of the four.
        state_bins: for `pi05`, from `state_bins`.
    """
    if prompt_format == "paligemma":
        return (" ".join(prompt.split()) + "\n",)
    if prompt_format == "pi0":
        return (prompt if prompt.endswith("\n") else f"{prompt}\n",)
    cleaned = prompt.strip().replace("_", " ").replace("\n", " ")
    if prompt_format == "openpi_pi0":
        return cleaned, "\n"
    assert state_bins is not None, "pi0.5's prompt says the state"
    return (f"Task: {cleaned}, State: {' '.join(map(str, state_bins))};\nAction: ",)


def state_bins(state: np.ndarray) -> np.ndarray:
    """The bins of normalized states as pi0.5's prompt gives them, int64 of the same shape.

    256 bins of equal width from -1 on; nothing is clipped but what comes: below -1 is bin -1, and everything from
    127/128 on is bin 255.

    Args:
        state: float32, normalized and not padded.
    """
    return np.digitize(state, bins=BIN_EDGES) - 1
