"""What a page can show, as plain values; whoever has results puts them together, and `build.write_page` writes them.

Strings may come from anywhere: they are escaped where the page is written. Sources of pictures, films and videos are
`data:` addresses, made by `utils.page.pictures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

Tone = Literal["good", "warning", "error", "plain"]


@dataclass(frozen=True)
class Picture:
    """A still picture; `caption` is its text for those who do not see it, too."""

    source: str
    caption: str


@dataclass(frozen=True)
class Film:
    """Frames of one camera in one picture, line by line.

    Attributes:
        name: of the camera.
        source: of the picture.
        columns, width, height: frames per line, and pixels of one.
        steps: the episode's step of each frame, ascending.
        missing: which of them have no frame.
    """

    name: str
    source: str
    columns: int
    width: int
    height: int
    steps: list[int]
    missing: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    """One value over an episode's steps.

    Attributes:
        group, name: such as `state` and `gripper`.
        values: one for each of the episode's `sampled` steps; None where there is none.
        predicted: what the policy said, likewise.
        low, high: the range of several draws.
        marked: steps whose value is marked as wrong.
    """

    group: str
    name: str
    values: list[float | None]
    predicted: list[float | None] | None = None
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    marked: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """Something to see at a step of an episode."""

    step: int
    tone: Tone
    text: str


@dataclass(frozen=True)
class Episode:
    """One episode of the viewer.

    Attributes:
        title: such as `train episode 3`.
        text: file, instruction, outcome: a line or two.
        steps: how many it has.
        rate: control steps a second; None: unknown.
        sampled: the steps that the curves have values for, ascending.
    """

    title: str
    text: str
    steps: int
    rate: float | None
    sampled: list[int]
    films: list[Film]
    curves: list[Curve]
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class Viewer:
    """Episodes to scrub through."""

    kind: ClassVar[str] = "viewer"
    episodes: Sequence[Episode]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong at a place; `jump` is (episode of the viewer, step)."""

    where: str
    message: str
    pictures: Sequence[Picture] = ()
    jump: tuple[int, int] | None = None


@dataclass(frozen=True)
class Findings:
    """All findings of one kind; `more` of them are not listed, and `command` mends them where one does."""

    kind: ClassVar[str] = "findings"
    name: str
    tone: Tone
    remedy: str
    findings: Sequence[Finding]
    more: int = 0
    command: str = ""


@dataclass(frozen=True)
class Table:
    """Cells under a header; numbers get four digits. Rows of `flagged` (row -> tone) stand out."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    flagged: dict[int, Tone] = field(default_factory=dict)

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which stand to the right."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, int | float) for cell in cells)


@dataclass(frozen=True)
class Range:
    """Where 98 % of a dimension's values lie after normalization, and the share outside of the statistics' own 98 %."""

    name: str
    low: float
    high: float
    outside: float
    note: str = ""


@dataclass(frozen=True)
class Ranges:
    """Ranges beside -1 to 1."""

    kind: ClassVar[str] = "ranges"
    ranges: Sequence[Range]
    caption: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a chart; `low` and `high` are a band around it, and `marks` positions of points that stand out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marks: Sequence[int] = ()
    tone: Tone | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis; with `log` the values' axis is logarithmic."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]
    caption: str = ""


@dataclass(frozen=True)
class Rate:
    """Successes of some episodes with a 95 % interval; `main` is what the page is about, others are controls."""

    group: str
    name: str
    successes: int
    episodes: int
    low: float
    high: float
    main: bool = False


@dataclass(frozen=True)
class Rates:
    """Success rates, those of a group together."""

    kind: ClassVar[str] = "rates"
    rates: Sequence[Rate]
    caption: str = ""


@dataclass(frozen=True)
class Outcomes:
    """Per line of `rows` a name and its episodes: (succeeded, what to say about it)."""

    kind: ClassVar[str] = "outcomes"
    rows: Sequence[tuple[str, Sequence[tuple[bool, str]]]]
    caption: str = ""


@dataclass(frozen=True)
class Video:
    """One video, with its outcome as `tone`."""

    source: str
    caption: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Videos:
    """Videos side by side."""

    kind: ClassVar[str] = "videos"
    videos: Sequence[Video]


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side; with `wide` one below the other."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]
    wide: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """A text with its line breaks, folded away under its title."""

    kind: ClassVar[str] = "code"
    text: str
    title: str


Block = Viewer | Findings | Table | Ranges | Charts | Rates | Outcomes | Videos | Pictures | Text | Code


@dataclass(frozen=True)
class Section:
    """A part of a page; `intro` says how to read it."""

    title: str
    blocks: Sequence[Block]
    intro: str = ""


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        subject: what was looked at: `data`, `training run`, `evaluation`.
        title: which one.
        verdict: the answer in a sentence, with its `tone`.
        facts: (name, value), few.
        sections: the evidence.
        left_out: what the page does not show, a sentence each.
    """

    subject: str
    title: str
    verdict: str
    tone: Tone
    facts: Sequence[tuple[str, object]]
    sections: Sequence[Section]
    left_out: Sequence[str] = ()

    @property
    def has_viewer(self) -> bool:
        """Whether findings can be shown in a viewer."""
        return any(isinstance(block, Viewer) for section in self.sections for block in section.blocks)
