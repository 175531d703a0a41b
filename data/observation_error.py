"""What every reader of observations raises."""

from __future__ import annotations


class ObservationError(ValueError):
    """A frame, state or prompt can't be used; the message says what was found and what was wanted."""
