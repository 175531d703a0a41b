"""What tests read of a Markdown page: sections, code blocks, commands, links and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Page:
    """One Markdown file of the repository."""

    path: Path

    @property
    def name(self) -> str:
        """The path from the repository's root."""
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The text without its code blocks."""
        return FENCE.sub("", self.text)

    @property
    def headings(self) -> list[tuple[int, str]]:
        """(level, title) of every heading."""
        return [(len(marks), title) for marks, title in HEADING.findall(self.prose)]

    @property
    def anchors(self) -> list[str]:
        """What a link may name after #, a heading each, as GitHub makes it."""
        return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in self.headings]

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """(language, content) of every code block."""
        return FENCE.findall(self.text)

    @property
    def commands(self) -> list[str]:
        """The commands of all bash blocks, in order: continued lines joined, comments dropped."""
        found = []
        for language, content in self.blocks:
            if language == "bash":
                lines = content.replace("\\\n", " ").splitlines()
                found += [" ".join(without_comment(line).split()) for line in lines if without_comment(line)]
        return found

    @property
    def links(self) -> list[str]:
        """Targets of links and images."""
        return LINK.findall(self.prose)

    @property
    def inline_code(self) -> list[str]:
        """What stands between backticks, outside code blocks."""
        return INLINE.findall(self.prose)

    @property
    def tables(self) -> list[list[list[str]]]:
        """Rows of cells of every table."""
        runs = re.findall(r"(?:^\|.*\|$\n?)+", self.prose, re.MULTILINE)
        return [[[cell.strip() for cell in row.strip("|").split("|")] for row in run.splitlines()] for run in runs]

    @property
    def sections(self) -> list[str]:
        """The text from each heading to the next."""
        return HEADING.split(self.prose)[3::3]


def without_comment(line: str) -> str:
    """A line of shell or YAML without what follows a # at its beginning or after a space."""
    return re.sub(r"(^|\s)#.*$", "", line).strip()


def written_pages() -> list[Page]:
    """Every page that people read, by path."""
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    return [Page(path) for path in sorted([*paths, ROOT / "data/samples/README.md", ROOT / "tests/fixtures/README.md"])]


def translations() -> list[tuple[Page, Page]]:
    """(English, Chinese) of every page that is there in both."""
    chinese = [page for page in written_pages() if page.name.endswith(".zh-CN.md")]
    return [(Page(page.path.with_name(page.path.name.replace(".zh-CN", ""))), page) for page in chinese]
