"""The state of a recording: which numeric columns it is joined from, in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data.schema import STATE, as_list, vector_width, vectors
from data.tables import Table
from utils.parquet_utils import DataError, Source
from utils.statistics import state_labels


@dataclass(frozen=True)
class StateColumns:
    """Which numeric columns make up the state, in order, and how many values each has.

    Attributes:
        widths: values of each column by name; a column of plain numbers has 1. Empty: nothing reads a state, and the
            files have none.
        width: of the state; zeros where `widths` is empty.
        width_from: the config key that sets it, for messages.
    """

    widths: dict[str, int]
    width: int
    width_from: str = "data.state_dim"

    @classmethod
    def of_tables(
        cls,
        names: Sequence[str],
        width: int,
        tables: Iterable[Table],
        width_from: str = "data.state_dim",
        *,
        needed: bool = True,
    ) -> StateColumns:
        """Look up the columns in the recordings' first rows.

        Args:
            names: `data.state_columns`.
            width: that they must have together.
            tables: the recordings, opened as they are asked for; of most only the schema is read, if at all.
            width_from: the config key that sets the width.
            needed: whether something reads the state; if not, files may lack it.

        Raises:
            DataError: a column is missing, no numbers, or together they have another width.
        """
        if needed and len(names) == 1:
            return cls({names[0]: width}, width, width_from)
        first = None
        for table in tables:
            with table:
                if first is None and (needed or set(names) <= set(table.schema.names)):
                    table.image_columns((), names)
                    first = table.path, next(table.batches(list(names), 1))[1]
                if needed:
                    break
                if not set(names) <= set(table.schema.names):
                    return cls({}, width, width_from)
        if len(names) == 1:
            return cls({names[0]: width}, width, width_from)
        path, row = first
        widths = {name: vector_width(as_list(row.column(name)), name, path) for name in names}
        if sum(widths.values()) != width:
            listed = " + ".join(f"{name} {each}" for name, each in widths.items())
            raise DataError(
                f"{path}: data.state_columns have {listed} = {sum(widths.values())} values, config wants "
                f"{width_from} {width}; correct one of them"
            )
        return cls(widths, width, width_from)

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return list(self.widths)

    @property
    def labels(self) -> list[str]:
        """What each value of the state is called: `force[2]`."""
        return state_labels(self.widths or {STATE: self.width})

    def read(self, batch: pa.RecordBatch, path: Source, first_row: int) -> np.ndarray:
        """The states of some rows, float32 (rows, width); errors as `vectors`."""
        if not self.widths:
            return np.zeros((batch.num_rows, self.width), dtype=np.float32)
        several = len(self.widths) > 1
        parts = [
            vectors(
                as_list(batch.column(name)),
                *(name, width, path, first_row),
                width_from=None if several else self.width_from,
            )
            for name, width in self.widths.items()
        ]
        return np.concatenate(parts, axis=1) if several else parts[0]
