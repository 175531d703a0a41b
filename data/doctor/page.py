"""The examination of data as a page: findings with the frames that they are about, episodes, what the data hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.comparison.fit import DimensionFit
from data.comparison.page import fit_section
from data.doctor import structure
from data.doctor.examine import Examination, choose_episodes
from data.doctor.findings import KINDS
from data.doctor.findings import Finding as Fault
from data.doctor.images import pictures_of
from data.doctor.remedies import command
from data.schema import vector_names
from data.tables import open_table
from utils.comparison.kinds import Mismatch
from utils.page.content import (
    Block,
    Episode,
    Finding,
    Findings,
    Mark,
    Page,
    Picture,
    Section,
    Table,
    Text,
    Tone,
    Viewer,
)
from utils.page.episodes import MAX_EPISODES, MAX_MARKS, curves_of, left_out, sampled_steps
from utils.page.pictures import chosen_steps, film, film_frames, thumbnail

LISTED = 6  # findings of a kind
CAMERAS = 3  # whose frame a finding shows
PIXELS = 160  # of the longer side of a frame


@dataclass
class _Part:
    """One dataset: its examination, the episodes that are shown with their frames' rows, and where they begin."""

    name: str
    seen: Examination
    shown: list[int]
    first: int  # number of its first episode in the viewer
    file_number: dict[str, int]
    first_val: int

    def place(self, fault: Fault) -> int | None:
        """The global row that a finding is about; the middle of its episode where it names none."""
        rows, file = self.seen.rows, self.file_number.get(fault.file)
        if file is None:
            return None
        if fault.row is not None:
            row = int(rows.file_starts[file]) + fault.row
            return row if row < rows.file_starts[file + 1] else None
        if fault.episode is None:
            return None
        number = fault.episode + (self.first_val if rows.splits[file] == "val" else 0)
        if number >= rows.num_episodes:
            return None
        where = rows.episode_rows(number)
        return (where.start + where.stop - 1) // 2

    def episode(self, row: int) -> int:
        """The number over both splits of the episode of a global row."""
        return int(np.searchsorted(self.seen.rows.episode_starts, row, side="right")) - 1


def doctor_page(seen: Mapping[str, Examination], report: Mapping[str, Any], title: str) -> Page:
    """The page.

    Args:
        seen: dataset -> examination; "" for the only one.
        report: of all of them, `merge_reports`, with `against` where the data were held against a policy.
        title: what was examined.
    """
    parts = _parts(seen)
    films = sum(len(part.shown) * len(part.seen.rows.all_cameras) for part in parts)
    frames = film_frames(films)
    episodes: list[Episode] = []
    kinds: dict[str, list[Finding]] = {}
    for part in parts:
        listed = _listed(part)
        pictures = _pictures(part, [fault for faults in listed.values() for fault in faults], frames)
        for kind, faults in listed.items():
            kinds.setdefault(kind, []).extend(_finding(part, fault, pictures) for fault in faults)
        episodes += [_episode(part, number, pictures, frames, films) for number in part.shown]
    sections = [Section("Findings", _found(report, kinds))]
    if "against" in report:
        about = report["against"]
        table = [DimensionFit(**dimension) for dimension in about["dimensions"]]
        found = [Mismatch(**mismatch) for mismatch in about["mismatches"]]
        sections.append(fit_section(f"Beside {Path(about['policy']).name}", table, found))
    if episodes:
        intro = "Frames of all cameras beside state and action. What was found in an episode is marked and listed."
        sections.append(Section("Episodes", [Viewer(episodes)], intro))
    sections.append(Section("What the data hold", list(_tables(report))))
    verdict, tone = _verdict(report)
    steps = [episode.steps for episode in episodes]
    total = sum(about["episodes"] for about in report["datasets"].values())
    widest = max((vector.shape[1] for part in parts for vector in part.seen.rows.vectors.values()), default=0)
    choice = "up to half of them with findings, the others evenly chosen"
    missing = left_out(len(episodes), total, frames, max(steps, default=0), widest, choice) if episodes else []
    hidden = sum(report["counts"].values()) - sum(map(len, kinds.values()))
    if hidden:
        missing.append(f"{hidden} findings are counted and not listed; --report writes more of them, as JSON.")
    if not report["images_examined"]:
        missing.append("Pictures: they were not looked at (--skip_images).")
    return Page("data", title, verdict, tone, _facts(report), sections, missing)


def _parts(seen: Mapping[str, Examination]) -> list[_Part]:
    parts: list[_Part] = []
    for name, examination in seen.items():
        rows = examination.rows
        room = MAX_EPISODES // len(seen) or 1
        shown = choose_episodes(rows, examination.findings.listed, room) if len(rows) else []
        numbers = {str(path): i for i, path in enumerate(rows.files)}
        splits = [rows.splits[rows.file_of[start]] for start in rows.episode_starts[:-1]]
        first_val = splits.index("val") if "val" in splits else len(splits)
        first = sum(len(part.shown) for part in parts)
        parts.append(_Part(name, examination, shown, first, numbers, first_val))
    return parts


def _listed(part: _Part) -> dict[str, list[Fault]]:
    listed: dict[str, list[Fault]] = {}
    for fault in part.seen.findings.ordered():
        faults = listed.setdefault(fault.kind, [])
        if len(faults) < LISTED:
            faults.append(fault)
    return listed


def _pictures(part: _Part, faults: list[Fault], frames: int) -> dict[str, dict[int, np.ndarray]]:
    """The frames that the page shows: camera -> global row -> uint8 (H, W, 3)."""
    if part.seen.frames is None:
        return {}
    rows = {row for fault in faults if (row := part.place(fault)) is not None}
    for number in part.shown:
        where = part.seen.rows.episode_rows(number)
        rows |= {where.start + step for step in chosen_steps(where.stop - where.start, frames)}
    return pictures_of(part.seen.rows, np.array(sorted(rows), np.int64), PIXELS)


def _finding(part: _Part, fault: Fault, pictures: Mapping[str, Mapping[int, np.ndarray]]) -> Finding:
    row = part.place(fault)
    place = "" if fault.row is None else f" row {fault.row}"
    where = f"{fault.file}{place}" + ("" if fault.episode is None else f", episode {fault.episode}")
    if row is None:
        return Finding(where, fault.message)
    number = part.episode(row)
    step = row - int(part.seen.rows.episode_starts[number])
    jump = (part.first + part.shown.index(number), step) if number in part.shown else None
    shown = [(camera, frames[row]) for camera, frames in pictures.items() if row in frames][:CAMERAS]
    stills = [Picture(thumbnail(frame), f"{camera}, step {step}") for camera, frame in shown]
    return Finding(where, fault.message, stills, jump)


def _episode(
    part: _Part, number: int, pictures: Mapping[str, Mapping[int, np.ndarray]], frames: int, films: int
) -> Episode:
    rows = part.seen.rows
    where = rows.episode_rows(number)
    steps = where.stop - where.start
    path, row, episode = rows.place(where.start)
    marks, marked = [], {}
    for fault in part.seen.findings.listed:
        at = part.place(fault)
        if at is not None and where.start <= at < where.stop:
            marks.append(Mark(at - where.start, fault.severity, f"{fault.kind.replace('_', ' ')}: {fault.message}"))
    for column, found in part.seen.findings.marks.items():
        dimensions = marked.setdefault(column, {})
        for i, d in found:
            if where.start <= i < where.stop:
                dimensions.setdefault(d, []).append(i - where.start)
    marks = sorted(marks, key=lambda mark: mark.step)[:MAX_MARKS]
    at_marks = [mark.step for mark in marks] + [s for d in marked.values() for where_ in d.values() for s in where_]
    sampled = sampled_steps(steps, at_marks)
    shown = [step for step in range(steps) if any(where.start + step in of_row for of_row in pictures.values())]
    kept = {camera: [of_row.get(where.start + step) for step in shown] for camera, of_row in pictures.items()}
    made = [film(camera, shown, some, films) for camera, some in kept.items()]
    with open_table(path) as table:
        metadata = table.schema.metadata
    curves = []
    for column, values in rows.vectors.items():
        names = vector_names(metadata, column, values.shape[1])
        curves += curves_of(column, names, values[where], sampled, marked=marked.get(column))
    prompt = rows.prompts[rows.prompt[where.start]] if rows.prompt[where.start] >= 0 else "no prompt"
    split = rows.splits[rows.file_of[where.start]]
    return Episode(
        title=" ".join(filter(None, (part.name, split, f"episode {episode}"))),
        text=f"{prompt}\n{path}, from row {row}, {steps} steps",
        steps=steps,
        rate=structure.file_rates(rows)[int(rows.file_of[where.start])],
        sampled=sampled,
        films=[one for one in made if one is not None],
        curves=curves,
        marks=marks,
    )


def _found(report: Mapping[str, Any], kinds: Mapping[str, list[Finding]]) -> list[Block]:
    blocks: list[Block] = []
    for kind in sorted(kinds, key=lambda name: KINDS[name].severity):
        mend = command((f["edit"], f["data"]) for f in report["findings"] if f["kind"] == kind)
        more = report["counts"][kind] - len(kinds[kind])
        about = KINDS[kind]
        blocks.append(Findings(kind.replace("_", " "), about.severity, about.remedy, kinds[kind], more, mend))
    return blocks or [Text(f"None of the {len(KINDS)} kinds of fault that are looked for.")]


def _verdict(report: Mapping[str, Any]) -> tuple[str, Tone]:
    """What is wrong, in a sentence."""
    kinds = sorted(report["counts"], key=lambda kind: KINDS[kind].severity)
    named = [f"{kind.replace('_', ' ')} ({report['counts'][kind]})" for kind in kinds]
    among = ", ".join(named[:3]) + (f" and {len(named) - 3} more kinds" if len(named) > 3 else "")
    suspected = report.get("against", {}).get("mismatches", [])
    policy = ""
    if suspected:
        first = suspected[0]
        also = f" and {len(suspected) - 1} more" if len(suspected) > 1 else ""
        policy = f"The policy was trained on something else: {first['where']}: {first['kind'].replace('_', ' ')}{also}."
    if report["errors"]:
        return " ".join(filter(None, (f"Training may not start: {among}.", policy))), "error"
    if policy:
        return policy + (f" The data themselves: {among}." if named else ""), "warning"
    if named:
        return f"Training may start, but look at these first: {among}.", "warning"
    episodes = sum(about["episodes"] for about in report["datasets"].values())
    pictures = "" if report["images_examined"] else "; pictures were not looked at"
    beside = ", and they look like the policy's training data" if "against" in report else ""
    return f"Nothing wrong was found in {episodes} episodes{beside}{pictures}.", "good"


def _facts(report: Mapping[str, Any]) -> list[tuple[str, object]]:
    splits = report["datasets"].values()
    rates = dict.fromkeys(f"{about['rate_hz']:.4g} Hz" for about in splits if about["rate_hz"])
    return [
        ("episodes", sum(about["episodes"] for about in splits)),
        ("steps", f"{sum(about['steps'] for about in splits):,}"),
        ("files", sum(len(about["files"]) for about in splits)),
        ("cameras", ", ".join(dict.fromkeys(camera for about in splits for camera in about["cameras"])) or "none"),
        ("instructions", len({prompt["prompt"] for about in splits for prompt in about["prompts"]})),
        ("control rate", ", ".join(rates) or "unknown"),
        ("errors", report["errors"]),
        ("warnings", report["warnings"]),
    ]


def _tables(report: Mapping[str, Any]) -> list[Table]:
    header = ("split", "files", "episodes", "steps", "shortest", "median", "longest", "Hz")
    rows, cameras, prompts, tables = [], [], [], []
    for split, about in report["datasets"].items():
        length = about["length"] or {}
        spread = [length.get(key) for key in ("min", "median", "max")]
        rows.append([split, len(about["files"]), about["episodes"], about["steps"], *spread, about["rate_hz"]])
        for camera, facts in about["cameras"].items():
            sizes = ", ".join(f"{number:,} × {size}" for size, number in facts.get("sizes", {}).items())
            cameras.append([split, camera, facts["files"], sizes or "not looked at"])
        prompts += [[prompt["prompt"], split, prompt["episodes"], prompt["steps"]] for prompt in about["prompts"][:40]]
        for name in about["vectors"]:
            if about[name]["rows"]:
                numbers = {key: values for key, values in about[name].items() if key != "rows"}
                lines = [
                    [f"{name}[{d}]", *map(float, row)] for d, row in enumerate(zip(*numbers.values(), strict=True))
                ]
                tables.append(Table((name, *numbers), lines, f"{name}, {split}, physical units"))
    tables[:0] = [
        Table(header, rows, "Splits"),
        Table(("split", "camera", "files", "frames"), cameras, "Cameras"),
        Table(("instruction", "split", "episodes", "steps"), prompts, "Instructions"),
    ]
    return [table for table in tables if table.rows]
