"""The examination as text and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.doctor.examine import Examination, three_rows
from data.doctor.findings import KINDS
from data.doctor.plots import Cell, Trace, contact_sheet, plot_vectors
from data.doctor.remedies import command
from data.schema import vector_names
from data.tables import open_table
from utils.text import shortened
from utils.text_table import text_table

SUMS = ("errors", "warnings", "seconds")
SHOWN_FINDINGS = 3  # of each kind, in the printed text
SHOWN_PROMPTS = 12


def merge_reports(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The reports of several datasets (name -> `Examination.to_dict`) as one; `datasets` are told apart by name."""
    if len(reports) == 1:
        return next(iter(reports.values()))
    parts = list(reports.values())
    findings = [finding for part in parts for finding in part["findings"]]
    rank = {kind: i for i, kind in enumerate(KINDS)}
    return {
        "may_train": all(part["may_train"] for part in parts),
        **{key: sum(part[key] for part in parts) for key in SUMS},
        **{
            key: {kind: total for kind in KINDS if (total := sum(part[key].get(kind, 0) for part in parts))}
            for key in ("counts", "not_listed")
        },
        "findings": sorted(findings, key=lambda finding: (finding["severity"] != "error", rank[finding["kind"]])),
        "images_examined": all(part["images_examined"] for part in parts),
        "datasets": {
            f"{name} {split}": about for name, part in reports.items() for split, about in part["datasets"].items()
        },
    }


def as_text(report: dict[str, Any]) -> str:
    """What `inspect_parquet.py` prints: the data, a table of kinds, the first findings of each.

    Args:
        report: `Examination.to_dict` or `merge_reports`.
    """
    parts = [_describe_split(split, about) for split, about in report["datasets"].items()]
    if report["findings"]:
        parts.append(_kinds_table(report))
        parts += [_first_findings(report, kind) for kind in _by_severity(report)]
    verdict = "training may start" if report["may_train"] else "training may not start"
    seen = "" if report["images_examined"] else ", images not looked at"
    counts = ", ".join(_plural(report[f"{word}s"], word) for word in ("error", "warning"))
    parts.append(f"{counts}{seen}: {verdict}")
    return "\n\n".join(parts)


def write_plots(seen: Examination, folder: Path) -> list[Path]:
    """Contact sheet (where images were looked at), state and action plots as PNG; returns the paths."""
    if not len(seen.rows):
        return []
    paths = []
    if seen.frames is not None and seen.frames.facts:
        paths.append(folder / "contact_sheet.png")
        lines = f"one line per camera ({', '.join(seen.frames.facts)})" if len(seen.frames.facts) > 1 else ""
        title = f"First, middle and last frame{', ' * bool(lines)}{lines}; captions of episodes with findings in red"
        contact_sheet(paths[-1], _cells(seen), title)
    with open_table(seen.rows.files[seen.rows.file_of[0]]) as table:
        metadata = table.schema.metadata
    for name in seen.rows.vectors:
        paths.append(folder / f"{name.replace('/', '_')}.png")
        rows = seen.rows
        in_val = np.array([split == "val" for split in rows.splits])[rows.file_of]
        populations = {"train": rows.vectors[name][~in_val], "val": rows.vectors[name][in_val]}
        populations = {split: values for split, values in populations.items() if len(values)}
        title = f"{name}, physical units; red: outliers and jumps"
        names = vector_names(metadata, name, next(iter(populations.values())).shape[1])
        plot_vectors(paths[-1], names, _traces(seen, name), populations, title)
    return paths


def _describe_split(split: str, about: dict[str, Any]) -> str:
    rate = f", {about['rate_hz']:.4g} Hz" if about["rate_hz"] else ""
    length = about["length"]
    spread = f", {length['min']} to {length['max']} steps each (median {length['median']:g})" if length else ""
    lines = [
        f"{split}: {len(about['files'])} files, {about['episodes']} episodes, {about['steps']} steps{spread}{rate}"
    ]
    for camera, facts in about["cameras"].items():
        sizes = ", ".join(f"{number} x {size}" for size, number in facts.get("sizes", {}).items())
        lines.append(f"  {camera}: in {facts['files']} of {len(about['files'])} files{', ' + sizes if sizes else ''}")
    for prompt in about["prompts"][:SHOWN_PROMPTS]:
        counts = f"{_plural(prompt['episodes'], 'episode')}, {_plural(prompt['steps'], 'step')}"
        lines.append(f"  {counts}: {shortened(prompt['prompt'], 80)!r}")
    if len(about["prompts"]) > SHOWN_PROMPTS:
        lines.append(f"  and {len(about['prompts']) - SHOWN_PROMPTS} more prompts")
    for name in about["vectors"]:
        if about[name]["rows"]:
            statistics = {key: values for key, values in about[name].items() if key != "rows"}
            rows = zip(*statistics.values(), strict=True)
            lines.append(text_table([name, *statistics], [[f"{name}[{d}]", *row] for d, row in enumerate(rows)]))
    return "\n".join(lines)


def _kinds_table(report: dict[str, Any]) -> str:
    rows = [
        [KINDS[kind].severity, kind, report["counts"][kind], _place(_of_kind(report, kind)[0])]
        for kind in _by_severity(report)
    ]
    return text_table(["severity", "kind", "count", "first"], rows)


def _by_severity(report: dict[str, Any]) -> list[str]:
    return sorted(report["counts"], key=lambda kind: KINDS[kind].severity)


def _first_findings(report: dict[str, Any], kind: str) -> str:
    findings = _of_kind(report, kind)
    lines = [f"{KINDS[kind].severity} {kind}: {KINDS[kind].remedy}"]
    lines += [f"  {_place(finding)}: {finding['message']}" for finding in findings[:SHOWN_FINDINGS]]
    rest = report["counts"][kind] - min(len(findings), SHOWN_FINDINGS)
    lines += [f"  and {rest} more"] if rest else []
    mend = command((finding["edit"], finding["data"]) for finding in findings)
    return "\n".join(lines + ([f"  mend: {mend}"] if mend else []))


def _of_kind(report: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["kind"] == kind]


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _place(finding: dict[str, Any]) -> str:
    row = "" if finding["row"] is None else f" row {finding['row']}"
    episode = "" if finding["episode"] is None else f" (episode {finding['episode']})"
    return f"{finding['file']}{row}{episode}"


def _cells(seen: Examination) -> list[Cell]:
    rows, frames = seen.rows, seen.frames
    flagged: dict[tuple[str, int], list[str]] = {}
    for finding in seen.findings.listed:
        if finding.episode is not None:
            flagged.setdefault((finding.file, finding.episode), []).append(finding.kind)
    cells = []
    for number in seen.shown:
        where = rows.episode_rows(number)
        path, row, episode = rows.place(where.start)
        split = rows.splits[rows.file_of[where.start]]
        kinds = list(dict.fromkeys(flagged.get((str(path), episode), [])))
        prompt = rows.prompts[rows.prompt[where.start]] if rows.prompt[where.start] >= 0 else "no prompt"
        caption = f"{split} episode {episode}, {where.stop - where.start} steps · {Path(str(path)).name} row {row}\n"
        caption += shortened(", ".join(kinds), 80) if kinds else shortened(prompt, 80)
        pictures = [[frames.pictures[camera].get(i) for i in three_rows(rows, number)] for camera in frames.facts]
        cells.append(Cell(caption, pictures, bool(kinds)))
    return cells


def _traces(seen: Examination, name: str) -> list[Trace]:
    rows = seen.rows
    marks = seen.findings.marks.get(name, [])
    traces = []
    for number in seen.shown:
        where = rows.episode_rows(number)
        here = [(i - where.start, d) for i, d in marks if where.start <= i < where.stop]
        prompt = rows.prompt[where.start]
        group = rows.prompts[prompt] if prompt >= 0 else "no prompt"
        traces.append(Trace(shortened(group, 60), rows.vectors[name][where], here))
    return traces
