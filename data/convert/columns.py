"""From blocks of a reader to columns of docs/data_format.md, as a mapping says: the same for every format.

Numbers and texts are made in `data/convert/values.py`, frames in `data/convert/frames.py`; `data/convert/rows.py` says
which rows stay.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data.convert.conversion import check_names
from data.convert.episode_writer import ImageEncoding, Steps
from data.convert.foreign_sources import reading
from data.convert.frames import check_camera, encoded_images, resolved
from data.convert.mapping import TERMINAL, Mapping
from data.convert.readers.base import Block, Episode, Reader
from data.convert.rows import (
    ACTION,
    CORRECTED,
    KEPT,
    PROMPT,
    STATE,
    TERMINATED,
    TIME,
    rows_of,
    shifted,
    without_first,
    without_last,
)
from data.convert.values import Place, attribute_text, attribute_value, text_of, truths, vector, where_true
from data.schema import INTERVENTION, SUCCESS, TIMESTAMP
from utils.parquet_utils import DataError

logger = logging.getLogger(__name__)

_told: set[str] = set()  # what this process has warned of


class Columns:
    """The columns of a source's episodes."""

    def __init__(self, reader: Reader, mapping: Mapping, encoding: ImageEncoding) -> None:
        """
        Args:
            reader: of the source.
            mapping: what becomes what; `fps` is set.
            encoding: of frames that are encoded.
        """
        self.reader, self._mapping, self._encoding = reader, mapping, encoding
        self._time_key = reader.time_key()

    def check(self, episode: Episode) -> None:
        """Compare the mapping with what an episode holds.

        Raises:
            DataError: a key that is not there, that can't be read, or of another kind than its column needs.
        """
        found = self.reader.keys(episode)
        plain = {name: self.reader.plain_key(name) for name in self._mapping.named_keys}
        prompt = self._mapping.prompt
        if prompt.kind == "key" and " " in prompt.value and plain[prompt.value] not in found:
            raise DataError(
                f"{episode.name}: no key {prompt.value!r}, which prompt names; an instruction itself is written as "
                f"text:{prompt.value}"
            )
        check_names(plain.values(), list(found), "key", episode.name)
        available = {name: found[key] for name, key in plain.items()}
        for name in self._mapping.named_keys:
            if available[name].kind.startswith("not read: "):
                raise DataError(f"{episode.name}: {name!r} is {available[name].kind}")
        for column, camera in self._mapping.cameras.items():
            check_camera(column, camera, available[camera.key], episode.name)

    def widths(self, episode: Episode) -> tuple[int, int]:
        """Values of `state` and of `action`, from the first steps of an episode.

        Raises:
            DataError: the mapping does not fit what is there.
        """
        with reading(episode.files[0]):
            block = next(self._raw(episode))
        return block[STATE].shape[1], block[ACTION].shape[1]

    def steps(self, episode: Episode) -> Iterator[Steps]:
        """The steps of an episode; none where the mapping keeps none of them.

        Raises:
            DataError: a value that does not fit its column, naming episode, step and key.
        """
        mapping, finish = self._mapping, self._finisher(episode)
        rows = without_last(self._raw(episode), mapping.drop_last)
        rows = shifted(rows, mapping.action_shift)
        rows = without_first(rows, mapping.drop_first)
        begin, waiting = 0, None
        terminated, first_time = False, None
        for block in rows:
            terminated = bool(block[TERMINATED][-1])
            if mapping.keep:
                block = rows_of(block, np.flatnonzero(block[KEPT]))
            if not len(block[PROMPT]):
                continue
            if TIME in block and first_time is None:
                first_time = block[TIME][0]
            if waiting is not None:
                yield waiting
            waiting = finish(block, begin, first_time)
            begin += len(waiting.prompts)
        if waiting is not None:
            yield dataclasses.replace(waiting, terminal=terminated)

    def _raw(self, episode: Episode) -> Iterator[Block]:
        """The columns of whole blocks; images as they are stored, since not all of them are needed."""
        mapping, reader = self._mapping, self.reader
        keys = [*mapping.keys, *([self._time_key] if self._time_key else [])]
        fixed_prompt = self._fixed_prompt(episode)
        begin, last_action = 0, None
        for block in reader.blocks(episode, list(dict.fromkeys(keys))):
            length = len(next(iter(block.values())))
            where = Place(episode.name, begin)
            columns: Block = {STATE: vector(mapping.state, block, length, STATE, where)}
            columns[ACTION] = last_action = vector(mapping.action, block, length, ACTION, where)
            if fixed_prompt is None:
                columns[PROMPT] = self._texts(block[mapping.prompt.value], where)
            else:
                columns[PROMPT] = [fixed_prompt] * length
            if mapping.terminal in TERMINAL:
                columns[TERMINATED] = np.full(length, mapping.terminal == "always")
            else:
                columns[TERMINATED] = truths(block[mapping.terminal], mapping.terminal, where)
            if mapping.keep:
                columns[KEPT] = where_true(block[mapping.keep.key], mapping.keep, where)
            if mapping.intervention:
                columns[CORRECTED] = where_true(block[mapping.intervention.key], mapping.intervention, where)
            if self._time_key:
                columns[TIME] = block[self._time_key]
            columns |= {column: block[camera.key] for column, camera in mapping.cameras.items()}
            yield columns
            begin += length
        if begin == 0:
            raise DataError(f"{episode.name}: holds no steps; remove it or record it again")
        if reader.WARN_OF_ZERO_ACTION and not (mapping.drop_last or mapping.action_shift):
            _warn_of_zero_action(last_action, episode)

    def _finisher(self, episode: Episode) -> Callable[[Block, int, float | None], Steps]:
        """What makes `Steps` of the rows that stay."""
        mapping, success = self._mapping, self._succeeded(episode)
        attributes = self.reader.attributes(episode) if any(c.flip == "auto" for c in mapping.cameras.values()) else {}
        cameras = {column: resolved(camera, attributes, episode) for column, camera in mapping.cameras.items()}

        def finish(block: Block, begin: int, first_time: float | None) -> Steps:
            length = len(block[PROMPT])
            where = Place(episode.name, begin)
            if TIME in block:
                time = block[TIME].astype(np.float32)
                dropped = mapping.drop_first or mapping.keep
                time = (block[TIME] - first_time).astype(np.float32) if dropped else time
            else:
                time = (np.arange(begin, begin + length) / mapping.fps).astype(np.float32)
            labels = {INTERVENTION: block[CORRECTED]} if CORRECTED in block else {}
            labels |= {SUCCESS: np.full(length, success)} if success is not None else {}
            return Steps(
                images={
                    column: encoded_images(block[column], camera, self._encoding, column, where)
                    for column, camera in cameras.items()
                },
                state=block[STATE],
                action=block[ACTION],
                prompts=block[PROMPT],
                extra={TIMESTAMP: time, **labels},
            )

        return finish

    def _succeeded(self, episode: Episode) -> bool | None:
        """Whether an episode succeeded; None where the mapping does not say where that stands."""
        outcome, where = self._mapping.success, Place(episode.name, 0)
        if outcome is None or outcome.kind in TERMINAL:
            return None if outcome is None else outcome.kind == TERMINAL[0]
        if outcome.kind == "file":
            name = episode.files[0].relative_to(self.reader.root).as_posix()
            return (re.search(outcome.where.key, name) is not None) != outcome.where.invert
        if outcome.kind == "attribute":
            given = attribute_value(self.reader.attributes(episode), outcome.where.key, outcome.json_key, episode)
            return bool(where_true([given], outcome.where, where)[0])
        with reading(episode.files[0]):
            # The whole episode is looked through before its first step is written.
            found = [where_true(v, outcome.where, where) for v in self.reader.values(episode, outcome.where.key)]
        if not found:
            raise DataError(f"{episode.name}: holds no steps; remove it or record it again")
        # with `invert` a failure is marked somewhere
        return all(map(np.all, found)) if outcome.where.invert else any(map(np.any, found))

    def _fixed_prompt(self, episode: Episode) -> str | None:
        """The instruction of every step of an episode; None where each step has its own."""
        prompt = self._mapping.prompt
        if prompt.kind == "key":
            return None
        if prompt.kind == "text":
            return prompt.value
        if prompt.kind == "file":
            name = episode.files[0].relative_to(self.reader.root).as_posix()
            match = re.search(prompt.value, name)
            if not match or match[1] is None:
                raise DataError(f"{episode.name}: prompt {prompt.value!r} does not fit the name {name!r}; correct it")
            text = match[1] if " " in match[1] else match[1].replace("_", " ")
        else:
            text = attribute_text(self.reader.attributes(episode), prompt.value, prompt.json_key, episode)
        return text if text.strip() or prompt.empty is None else prompt.empty

    def _texts(self, values: np.ndarray | list[Any], where: Place) -> list[str]:
        known: dict[bytes, str] = {}
        texts = []
        for i, value in enumerate(values):
            if isinstance(value, str):
                text = value
            else:
                raw = value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()
                text = known.get(raw)
                if text is None:
                    text = known[raw] = text_of(value, self._mapping.prompt.value, where.step(i))
            texts.append(text if text.strip() or self._mapping.prompt.empty is None else self._mapping.prompt.empty)
        return texts


def _warn_of_zero_action(action: np.ndarray, episode: Episode) -> None:
    if action is not None and not np.any(action[-1]) and "zero action" not in _told:
        _told.add("zero action")
        logger.warning(
            "%s: the last step's action is all zero; if episodes end with an observation alone, give drop_last: 1",
            episode.name,
        )
