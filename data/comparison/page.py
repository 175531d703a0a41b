"""Whether statistics fit data, as a section of a page."""

from __future__ import annotations

from collections.abc import Sequence

from data.comparison.fit import DimensionFit
from utils.comparison.kinds import Mismatch
from utils.page.content import Block, Finding, Findings, Range, Ranges, Section, Text

INTRO = (
    "Each dimension as the statistics normalize it. The shaded part is −1 to 1, where 98 % of the values lie that "
    "min-max and quantile statistics were made of; what reaches far beyond is data that the policy has never met."
)


def fit_section(title: str, table: Sequence[DimensionFit], found: Sequence[Mismatch]) -> Section:
    """Suspected mistakes, and every dimension beside the statistics."""
    kinds = dict.fromkeys((mismatch.kind, mismatch.remedy) for mismatch in found)
    blocks: list[Block] = []
    for kind, remedy in kinds:
        listed = [Finding(m.where, m.evidence) for m in found if (m.kind, m.remedy) == (kind, remedy)]
        blocks.append(Findings(kind.replace("_", " "), "warning", remedy, listed))
    if not blocks:
        blocks.append(Text("No mistake is suspected."))
    if table:
        blocks.append(Ranges([Range(fit.name, *fit.mapped, fit.outside, fit.note) for fit in table]))
    return Section(title, blocks, INTRO if table else "")
