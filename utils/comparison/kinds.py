"""One suspected mistake between a session and the training data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mismatch:
    """One suspected mistake.

    Attributes:
        kind: a short name, such as `red_and_blue_exchanged`.
        where: the camera, `state[2]`, `action`, `prompt` or `control rate`.
        evidence: what was measured.
        remedy: what to look at.
    """

    kind: str
    where: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind.replace('_', ' ')} ({self.evidence}); {self.remedy}"
