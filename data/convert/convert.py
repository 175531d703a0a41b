"""Any recording that a reader knows into the schema of docs/data_format.md: a reader, a mapping, and one way."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.convert.columns import Columns
from data.convert.conversion import UNITS, ConversionSummary, convert_files, parse_episodes, plan_files
from data.convert.episode_writer import EpisodeFileWriter, ImageEncoding, OutputFile
from data.convert.foreign_sources import reading
from data.convert.mapping import Mapping, parse_mapping, with_fps
from data.convert.readers import FORMATS, open_reader, reader_options
from data.convert.readers.base import Episode, Reader
from data.schema import LABELS, TIMESTAMP
from utils.parquet_utils import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A recording that is open, and how it becomes columns."""

    reader: Reader
    mapping: Mapping
    episodes: dict[int, Episode]  # by their number in the source


def open_source(name: str | None, path: Path, entries: MappingType[str, Any], *, follow_links: bool = False) -> Source:
    """Open a recording with a mapping.

    Args:
        name: one of FORMATS; None: what the mapping's `format` says.
        path: what was recorded.
        entries: of `read_entries`.
        follow_links: read files that are links to others outside of the folder.

    Raises:
        DataError: no format or another one, or a fault in the mapping or the recording's metadata.
    """
    entries = dict(entries)
    stated = entries.pop("format", None)
    if name is None and stated is None:
        raise DataError(f"give --from: {', '.join(FORMATS)}")
    if None not in (name, stated) and name != stated:
        raise DataError(f"--from is {name}, and the mapping is for {stated}; use another preset or map.yaml")
    name = name or stated
    options = reader_options(name)
    reader = open_reader(name, path, {key: entries[key] for key in options if key in entries}, follow_links)
    mapping = parse_mapping(reader.derived(entries), options)
    reader.check_mapping(mapping)
    mapping = with_fps(mapping, reader.fps(), str(path))
    numbered = enumerate(reader.episodes())
    return Source(reader, mapping, {i if e.number is None else e.number: e for i, e in numbered})


def convert(
    source: Source,
    output_dir: Path,
    *,
    episodes: Sequence[str] | None = None,
    encoding: ImageEncoding | None = None,
    num_workers: int = 1,
    overwrite: bool = False,
) -> ConversionSummary:
    """Convert a recording into Parquet files of our schema, one each episode (see `plan_files`).

    Args:
        source: of `open_source`.
        output_dir: where the files go.
        episodes: numbers and ranges such as "3-7"; None: all.
        encoding: of frames that are encoded.
        num_workers, overwrite: see `convert_files`.

    Raises:
        DataError: a fault in the recording or the mapping, naming place and remedy.
    """
    reader, mapping, encoding = source.reader, source.mapping, encoding or ImageEncoding()
    chosen = parse_episodes(episodes, source.episodes, str(reader.path))
    columns = Columns(reader, mapping, encoding)
    columns.check(source.episodes[chosen[0]])
    widths = columns.widths(source.episodes[chosen[0]])
    files = plan_files(
        output_dir,
        chosen,
        total=len(source.episodes),
        places={index: source.episodes[index] for index in chosen},
        settings={
            "format": type(reader).DESCRIPTION,
            "mapping": {**mapping.given, "fps": mapping.fps},
            "options": reader.options,
            **reader.settings(),
            **encoding.settings(),
        },
        sources=lambda members: reader.sources([source.episodes[index] for index in members]),
    )
    facts = {
        "source": reader.path.resolve().name,
        "source_format": type(reader).DESCRIPTION,
        "fps": mapping.fps,
        "cameras": {camera.key: column for column, camera in mapping.cameras.items()},
        "units": UNITS,
        **reader.facts(mapping),
    }
    job = functools.partial(_convert_file, columns, mapping, facts, widths)
    summary = convert_files(files, job, num_workers=num_workers, overwrite=overwrite)
    if not summary.rows:
        raise DataError(f"{reader.path}: the mapping keeps no step; correct keep, drop_first, drop_last")
    return summary


def _convert_file(
    columns: Columns, mapping: Mapping, facts: MappingType[str, Any], widths: tuple[int, int], file: OutputFile
) -> int:
    """Make one file; how many steps it has."""
    total = 0
    with EpisodeFileWriter(
        file.path,
        cameras=list(mapping.cameras),
        state_dim=widths[0],
        per_action_dim=widths[1],
        metadata=file.metadata(facts),
        source=str(columns.reader.path),
        extra=(TIMESTAMP, *(name for name in LABELS if getattr(mapping, name) is not None)),
    ) as writer:
        for index, episode in zip(file.episodes, file.places, strict=True):
            with reading(episode.files[0]):
                length = writer.write_episode(index, None, _checked(columns, episode, widths), episode.name)
            total += length
            if length == 0:
                logger.warning("%s: the mapping keeps none of its steps: left out", episode.name)
    return total


def _checked(columns: Columns, episode: Episode, widths: tuple[int, int]) -> Any:
    """The steps of an episode, all as wide as those of the first episode."""
    for steps in columns.steps(episode):
        found = steps.state.shape[1], steps.action.shape[1]
        if found != widths:
            raise DataError(
                f"{episode.name}: state has {found[0]} values and action {found[1]}, in the first episode they have "
                f"{widths[0]} and {widths[1]}; convert these episodes apart (--episodes)"
            )
        yield steps
