"""A closed-loop evaluation as a page: success beside its controls, every episode's outcome, uncertainty, videos."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.page import sensitivity_sections
from inference.report import alarms
from utils.misc import read_json_lines
from utils.page.content import (
    Chart,
    Charts,
    Episode,
    Line,
    Outcomes,
    Page,
    Rate,
    Rates,
    Section,
    Tone,
    Video,
    Videos,
    Viewer,
)
from utils.page.episodes import left_out
from utils.page.pictures import VIDEO_BYTES, film_frames, video_file

CONTROLS = {
    "policy": "the policy",
    "blind": "the policy without looking",
    "replay": "a replayed demonstration",
    "expert": "the simulator's expert",
}


@dataclass(frozen=True)
class Evaluation:
    """One closed-loop evaluation.

    Attributes:
        folder: where it was written.
        result: content of rollouts.json.
        lines: of episodes.jsonl, those of the result's tasks and seeds.
    """

    folder: Path
    result: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What ran: the policy, or the control."""
        settings = self.result["settings"]
        name = CONTROLS.get(settings["control"]) or f"the policy without {settings['control'].removeprefix('blind ')}"
        prompts = settings["prompts"]
        if prompts == "own":
            return name
        if re.fullmatch(r"paraphrase \d+", prompts):
            return f"{name}, {prompts} of each instruction"
        return f"{name}, {'another task’s instruction' if prompts == 'swapped' else f'instruction “{prompts}”'}"

    @property
    def is_main(self) -> bool:
        """Whether it is of a policy as it is used."""
        return self.result["settings"]["control"] == "policy" and self.result["settings"]["prompts"] == "own"


def read_evaluation(folder: Path, tasks: Collection[str] = ()) -> Evaluation:
    """Read a closed-loop evaluation from its --output_dir.

    Args:
        tasks: of another evaluation, of which this one must have one; none: it may have any.

    Raises:
        ValueError: there is none.
    """
    path, lines = folder / "rollouts.json", folder / "episodes.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no rollouts.json; give the --output_dir of a finished closed-loop evaluation")
    found = read_json_lines(lines) if lines.is_file() else []
    result = json.loads(path.read_text(encoding="utf-8"))
    if tasks and not result["tasks"].keys() & set(tasks):
        raise ValueError(
            f"{folder} is an evaluation of {', '.join(result['tasks'])}, and of none of {', '.join(tasks)}"
        )
    counted = {(task, seed) for task, about in result["tasks"].items() for seed in about["seeds"]}
    return Evaluation(folder, result, [line for line in found if (line["task"], line["seed"]) in counted])


def rollout_page(main: Evaluation, beside: Sequence[Evaluation] = (), episodes: Sequence[Episode] = ()) -> Page:
    """The page of a closed-loop evaluation.

    Args:
        main: what the page is about.
        beside: controls and other evaluations.
        episodes: recorded ones, to scrub through.
    """
    settings, summary = main.result["settings"], main.result["summary"]
    sections, missing = rollout_sections(main, beside)
    if episodes:
        sections.insert(1, Section("Recorded episodes", [Viewer(episodes)], "What the policy saw, and what it did."))
        films = sum(len(episode.films) for episode in episodes)
        longest = max(episode.steps for episode in episodes)
        widest = max(len(episode.curves) for episode in episodes)
        total = summary["episodes"]
        missing += left_out(len(episodes), total, film_frames(films), longest, widest, "failures first")
    verdict, tone = rollout_verdict(main, beside)
    plans = [task["plan_seconds"] for task in main.result["tasks"].values()]
    facts = [
        ("success", f"{summary['successes']} of {summary['episodes']}"),
        ("tasks", len(main.result["tasks"])),
        ("seeds", f"from {settings['seed']}"),
        ("simulator", settings["env"]),
        *((("MuJoCo", settings["env_settings"]["mujoco"]),) if "mujoco" in settings["env_settings"] else ()),
        ("execution", f"{settings['execution']['strategy']}, {settings['execution']['n_action_steps']} steps a plan"),
        ("time per plan", f"{1000 * sum(plans) / len(plans):.1f} ms"),
        ("policy", Path(settings["checkpoint"] or "none").name),
    ]
    return Page("evaluation", main.name[:1].upper() + main.name[1:], verdict, tone, facts, sections, missing)


def rollout_sections(main: Evaluation, beside: Sequence[Evaluation] = ()) -> tuple[list[Section], list[str]]:
    """The sections of a closed-loop evaluation, and what they leave out."""
    tasks = main.result["tasks"]
    rates = [_rate(task, one) for task in tasks for one in (main, *beside) if task in one.result["tasks"]]
    seeds = {
        tuple(one.result["tasks"][task]["seeds"])
        for one in (main, *beside)
        for task in tasks.keys() & one.result["tasks"].keys()
    }
    caption = "Bars are 95 % Wilson intervals. "
    caption += "All ran from the same seeds." if len(seeds) == 1 else "They did not all run from the same seeds."
    rows = [
        (name, [(good, _outcome(task, i)) for i, good in enumerate(task["success"])]) for name, task in tasks.items()
    ]
    sections = [Section("Success", [Rates(rates, caption), Outcomes(rows, "Every episode: ● success, × failure.")])]
    unsure = _uncertainty(main)
    if unsure is not None:
        sections.append(unsure)
    videos, hidden = _videos(main)
    if videos:
        sections.append(Section("Rollouts", [Videos(videos)]))
    sections += sensitivity_sections(main.folder, main.result["settings"])
    return sections, [f"{hidden} videos, which are in {main.folder / 'videos'}."] if hidden else []


def rollout_verdict(main: Evaluation, beside: Sequence[Evaluation] = ()) -> tuple[str, Tone]:
    """Whether it solves the tasks, in a sentence: a control whose interval meets the policy's is a warning."""
    summary = main.result["summary"]
    low, high = (100 * limit for limit in summary["wilson_95"])
    rate = 100 * summary["successes"] / summary["episodes"]
    name = main.name[:1].upper() + main.name[1:]
    text = f"{name} succeeds in {summary['successes']} of {summary['episodes']} episodes "
    text += f"({rate:.0f} %, 95 % interval {low:.0f} to {high:.0f} %)."
    if "alarm" in main.result["settings"]:
        text += f" {alarms(main.result).capitalize()}."
    controls = [one for one in beside if not one.is_main]
    if not controls or not main.is_main:
        return text, "plain"
    best = max(controls, key=lambda one: one.result["summary"]["successes"] / one.result["summary"]["episodes"])
    about = best.result["summary"]
    share = f"{about['successes']} of {about['episodes']}"
    if about["wilson_95"][1] >= summary["wilson_95"][0]:
        return f"{text} That is not clearly more than {best.name} ({share}).", "warning"
    return f"{text} The best control, {best.name}, succeeds in {share}.", "good"


def _rate(task: str, one: Evaluation) -> Rate:
    about = one.result["tasks"][task]
    return Rate(task, one.name, about["successes"], about["episodes"], *about["wilson_95"], main=one.is_main)


def _outcome(task: dict[str, Any], i: int) -> str:
    outcome = "success" if task["success"][i] else "failure"
    alarm = (task.get("alarm_step") or [None] * len(task["seeds"]))[i]
    return f"seed {task['seeds'][i]}: {outcome}, {task['steps'][i]} steps" + (
        f", alarm at {alarm}" if alarm is not None else ""
    )


def _uncertainty(main: Evaluation) -> Section | None:
    """Each episode's uncertainty over its steps, by outcome; None where there is none."""
    lines: dict[bool, list[Line]] = {True: [], False: []}
    every = max(1, main.result["settings"]["execution"]["n_action_steps"])
    for line in main.lines:
        values = [float("nan") if value is None else value for value in line.get("uncertainty") or []]
        if not values or all(value != value for value in values):
            continue
        alarm = line.get("alarm_step")
        # Lines of earlier versions don't say when plans came; most strategies ask for one every `n_action_steps`.
        steps = line.get("plan_steps") or [every * i for i in range(len(values))]
        marks = [] if alarm is None else [max(i for i, step in enumerate(steps) if step <= alarm)]
        good = line["success"]
        name = f"{line['task']}, seed {line['seed']}"
        tone: Tone = "good" if good else "error"
        lines[good].append(Line(name, steps, values, marks=marks, tone=tone))
    charts = [
        Chart(f"{'successes' if good else 'failures'}: {len(some)} episodes", "step", some)
        for good, some in lines.items()
        if some
    ]
    intro = "How unsure the policy was at each plan, one line an episode. Circles are alarms."
    return Section("Uncertainty", [Charts(charts)], intro) if charts else None


def _videos(main: Evaluation) -> tuple[list[Video], int]:
    """The filmed episodes that fit in a page, failures first, and how many do not."""
    filmed = [line for line in main.lines if line.get("video")]
    videos, size, hidden = [], 0, 0
    for line in sorted(filmed, key=lambda line: line["success"]):
        places = Path(line["video"]), main.folder / "videos" / Path(line["video"]).name
        path = next((place for place in places if place.is_file()), None)
        if path is None or size + path.stat().st_size > VIDEO_BYTES:
            hidden += 1
            continue
        size += path.stat().st_size
        outcome = "success" if line["success"] else "failure"
        caption = f"{line['task']}, seed {line['seed']}: {outcome} after {line['steps']} steps. “{line['prompt']}”"
        videos.append(Video(video_file(path), caption, "good" if line["success"] else "error"))
    return videos, hidden
