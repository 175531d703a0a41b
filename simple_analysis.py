"""Look at the data as a configuration feeds them: one batch, normalized ranges, the untrained loss, the split of
training and validation episode by episode.

python simple_analysis.py --config_path configs/vla_config.yaml --output_dir analysis
python simple_analysis.py --config_path configs/vla_config.yaml --skip_model          # no backbone weights needed
"""

from __future__ import annotations

import argparse
import logging
import textwrap
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data.doctor.analysis import (
    describe_dimensions,
    describe_episodes,
    describe_lengths,
    overlap,
    prompts_by_split,
    split_rows,
    unused_episodes,
)
from data.doctor.plots import Trace, image_grid, plot_episodes, plot_split, plot_vectors
from data.loader import MixtureDataset, build_datasets, build_sampler
from data.processing import PromptTokenizer, collate_fn, processors_from_config
from data.statistics import require_statistics_of
from inference.report import write_json
from model.normalizer import Normalizer
from model.vla_model import VLAModel
from utils.arguments import CommandParser, run_command
from utils.batch import steps_with_loss
from utils.config_utils import Config, load_config
from utils.misc import derive_seed, set_up_logging, writing
from utils.statistics import load_statistics
from utils.text import csv_text
from utils.text_table import text_table

logger = logging.getLogger(__name__)
MAX_SAMPLES = 4096  # of a split whose normalized values are looked at
SHOWN_EPISODES = 12  # drawn as traces
RANGE = ("min", "q01", "mean", "q99", "max")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--config_path", required=True, help="YAML config, as for training")
    parser.add_argument("--num_samples", type=int, default=4, help="samples of the batch (default %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("analysis"), help="default %(default)s")
    parser.add_argument("--skip_model", action="store_true", help="do not load the backbone: no untrained loss")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value", dest="set_args")
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        parser.error("--num_samples must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_up_logging()
    config = load_config(args.config_path, set_args=args.set_args)
    image_processor, tokenizer = processors_from_config(config)
    train, val = build_datasets(config, image_processor, tokenizer)
    splits = {"train": train} if val is None else {"train": train, "val": val}
    statistics = load_statistics(config.data.normalization_stats_path, config, args.config_path)
    require_statistics_of(train, statistics, config.data.action_mode)

    first = islice(chain.from_iterable(build_sampler(config, train)), args.num_samples)
    samples = list(first)  # those that training begins with
    batch = collate_fn([train[i] for i in samples])
    places = [train.describe(i) for i in samples]
    result: dict[str, Any] = {
        "config": args.config_path,
        "batch": describe_batch(batch),
        "samples": describe_samples(batch, places, tokenizer),
        "splits": {name: describe_split(split) for name, split in splits.items()},
        "overlap": find_overlap(train, val),
        "episodes": list_episodes(splits),
    }
    result["prompts"] = prompts_by_split(result["episodes"])
    normalizer = Normalizer.from_config(config, statistics)
    result["normalized"] = {name: describe_normalized(split, normalizer, config) for name, split in splits.items()}
    result["untrained_loss"] = None
    if not args.skip_model:
        torch.manual_seed(derive_seed("init", config.training.seed))
        model = VLAModel.from_pretrained(config, statistics, image_processor.mean, image_processor.std)
        result["untrained_loss"] = untrained_loss(model, batch, config)

    paths = [args.output_dir / "analysis.json", args.output_dir / "episodes.csv"]
    with writing(args.output_dir, "choose another --output_dir"):
        write_json(paths[0], result)
        pd.DataFrame(result["episodes"]).map(csv_text).to_csv(paths[1], index=False)
        paths += write_plots(args.output_dir, batch, places, config, splits)
        paths += write_split_plots(args.output_dir, result["episodes"])
    print(as_text(result))
    print("", *paths, sep="\n")


def describe_batch(batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per tensor: dtype, shape, min, max and mean; bools count as 0 and 1."""
    result = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            numbers = value.double()
            about = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            result[key] = about | {name: float(getattr(numbers, name)()) for name in ("min", "max", "mean")}
    return result


def describe_samples(batch: dict[str, Any], places: Sequence[str], tokenizer: PromptTokenizer) -> list[dict[str, Any]]:
    """Per sample of a batch: where it comes from, its instruction, its tokens one by one, and what is padding."""
    result = []
    for i, place in enumerate(places):
        ids = batch["input_ids"][i][batch["prompt_mask"][i]].tolist()
        result.append(
            {
                "place": place,
                "prompt": batch["raw_prompt_text"][i],
                "tokens": tokenizer.tokenizer.convert_ids_to_tokens(ids),
                "decoded": tokenizer.tokenizer.decode(ids),
                "prompt_padding": int((~batch["prompt_mask"][i]).sum()),
                "action_padding": int(batch["action_is_pad"][i].sum()),
                "frames": int(batch["vlm_attention_mask"][i].sum()),
                "cameras": int(batch["image_mask"][i].sum()),
            }
        )
    return result


def describe_split(split: MixtureDataset) -> list[dict[str, Any]]:
    """Per dataset of a split: files, episodes, samples, lengths, instructions, padded part of the action steps, and
    the physical range of states and actions."""
    result = []
    for dataset in split.datasets:
        store, episodes = dataset.store, describe_episodes(dataset, "")
        counts: dict[str, int] = {}
        for episode in episodes:
            counts[episode["prompt"]] = counts.get(episode["prompt"], 0) + 1
        samples = dataset.numbers(spread(len(dataset), MAX_SAMPLES))
        lengths = np.array([episode["steps"] for episode in episodes])
        result.append(
            {
                "dataset": dataset.name,
                "files": [str(path) for path in store.files],
                "episodes": len(episodes),
                "samples": len(dataset),
                "length": describe_lengths(lengths),
                "prompts": counts,
                "action_padding": float(samples["action_is_pad"].mean()),
                "state": describe_dimensions(samples["state"][:, : store.state.shape[1]]),
                "action": describe_dimensions(samples["action"][:, 0, : store.action.shape[1]]),
            }
        )
    return result


def list_episodes(splits: dict[str, MixtureDataset]) -> list[dict[str, Any]]:
    """Every episode of the files: train, val, and `unused` for those that `data.max_episodes` leaves out."""
    result = [
        e for name, split in splits.items() for dataset in split.datasets for e in describe_episodes(dataset, name)
    ]
    for dataset in splits["train"].datasets:
        parts = [split.datasets[dataset.dataset_index] for split in splits.values()]
        same = [part for part in parts if part.store.files == dataset.store.files]
        result += describe_episodes(dataset, "unused", unused_episodes(same))
    return result


def find_overlap(train: MixtureDataset, val: MixtureDataset | None) -> dict[str, list[int]]:
    """Per dataset the validation episodes that training holds too; empty where there is no validation split."""
    if val is None:
        return {}
    by_name = {dataset.name: dataset for dataset in train.datasets}
    return {dataset.name: overlap(by_name[dataset.name], dataset) for dataset in val.datasets}


def describe_normalized(split: MixtureDataset, normalizer: Normalizer, config: Config) -> list[dict[str, Any]]:
    """Per dataset the normalized states and the normalized actions of whole chunks, over evenly spread samples:
    ranges, and per dimension the part outside `data.action_bounds`."""
    low, high = config.data.action_bounds
    result = []
    for dataset in split.datasets:
        samples = dataset.numbers(spread(len(dataset), MAX_SAMPLES))
        state_NS, action_NTA, index = (torch.from_numpy(samples[key]) for key in ("state", "action", "dataset_index"))
        normalized = {
            "state": normalizer.normalize_state(state_NS, index)[:, : dataset.store.state.shape[1]].numpy(),
            "action": normalizer.normalize_action(action_NTA, state_NS, index).numpy()[~samples["action_is_pad"]],
        }
        normalized["action"] = normalized["action"][:, : dataset.store.action.shape[1]]
        about: dict[str, Any] = {"dataset": dataset.name}
        for name, values in normalized.items():
            outside = ((values < low - 1e-4) | (values > high + 1e-4)).mean(axis=0)
            about[name] = describe_dimensions(values) | {"outside_bounds": outside.tolist()}
        result.append(about)
    return result


def untrained_loss(model: VLAModel, batch: dict[str, Any], config: Config) -> float:
    """The training loss of the batch before any training: the mean over the action steps that have one, without
    augmentation or dropout."""
    model.eval()
    with torch.no_grad():
        loss_BT = model(batch)
    return float(loss_BT.sum() / steps_with_loss(batch, config).sum())


def spread(length: int, count: int) -> np.ndarray:
    """At most `count` different indices below `length`, evenly spread, int64."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def write_plots(
    folder: Path, batch: dict[str, Any], places: Sequence[str], config: Config, splits: dict[str, MixtureDataset]
) -> list[Path]:
    """The batch's images, and per dataset states and actions, as PNG; returns the paths."""
    paths = [folder / "batch_images.png"]
    frames = np.stack([batch[camera].permute(0, 1, 3, 4, 2).numpy() for camera in config.cameras], axis=1)
    steps = [f"step {step:+d}" if step else "now" for step in range(1 - frames.shape[2], 1)]
    labels = [f"{camera}, {step}" for camera in config.cameras for step in steps]
    rows = [
        f"{textwrap.shorten(prompt, 40, placeholder=' …')}\n{place.rpartition('(')[2].rstrip(')')}"
        for prompt, place in zip(batch["raw_prompt_text"], places, strict=True)
    ]
    image_grid(paths[0], frames.reshape(len(frames), -1, *frames.shape[3:]), rows, labels)
    for i, dataset in enumerate(splits["train"].datasets):
        parts = {name: split.datasets[i] for name, split in splits.items()}
        for column in ("state", "action"):
            prefix = f"{dataset.name}_" if len(splits["train"].datasets) > 1 else ""
            paths.append(folder / f"{prefix}{column}.png")
            values = getattr(dataset.store, column)
            starts = dataset.store.episode_starts
            shown = dataset.episodes[spread(len(dataset.episodes), SHOWN_EPISODES)]
            traces = [Trace(dataset.store.prompt(starts[e]), values[starts[e] : starts[e + 1]]) for e in shown]
            populations = {
                name: np.asarray(getattr(part.store, column))[split_rows(part)] for name, part in parts.items()
            }
            plot_vectors(
                paths[-1], dataset.names[column], traces, populations, f"{column} of {dataset.name}, physical units"
            )
    return paths


def write_split_plots(folder: Path, episodes: Sequence[dict[str, Any]]) -> list[Path]:
    """Per dataset which episodes are trained on, held out and unused, and what they measure, as PNG; returns the
    paths."""
    names, paths = list(dict.fromkeys(episode["dataset"] for episode in episodes)), []
    for name in names:
        of_dataset = sorted((e for e in episodes if e["dataset"] == name), key=lambda e: (e["file"], e["row"]))
        for kind, plot, title in (
            ("split", plot_split, "which episodes are trained on"),
            ("episodes", plot_episodes, "its episodes, physical units"),
        ):
            paths.append(folder / (f"{name}_{kind}.png" if len(names) > 1 else f"{kind}.png"))
            plot(paths[-1], of_dataset, f"{name}: {title}")
    return paths


def as_text(result: dict[str, Any]) -> str:
    """What the script prints."""
    batch = [
        [key, about["dtype"], "x".join(map(str, about["shape"])), about["min"], about["max"], about["mean"]]
        for key, about in result["batch"].items()
    ]
    parts = ["The batch, as the model gets it", text_table(["tensor", "type", "shape", "min", "max", "mean"], batch)]
    for i, sample in enumerate(result["samples"]):
        parts.append(
            f"sample {i}: {sample['place']}\n  prompt {sample['prompt']!r}, {len(sample['tokens'])} tokens: "
            f"{' '.join(map(repr, sample['tokens']))}\n  padding: {sample['prompt_padding']} tokens, "
            f"{sample['action_padding']} action steps; {sample['frames']} frames of {sample['cameras']} cameras"
        )
    if result["untrained_loss"] is not None:
        parts.append(f"untrained loss: {result['untrained_loss']:.4f}")
    normalized = [
        [f"{about['dataset']} {split}", f"{name}[{d}]", *(about[name][key][d] for key in RANGE), 100 * outside]
        for split, datasets in result["normalized"].items()
        for about in datasets
        for name in ("state", "action")
        for d, outside in enumerate(about[name]["outside_bounds"])
    ]
    parts += ["Normalized", text_table(["data", "dimension", *RANGE, "% outside"], normalized)]
    lengths = [
        [
            f"{about['dataset']} {split}",
            about["episodes"],
            about["samples"],
            *about["length"].values(),
            100 * about["action_padding"],
        ]
        for split, datasets in result["splits"].items()
        for about in datasets
    ]
    header = ["data", "episodes", "samples", "shortest", "median", "mean", "longest", "% action padding"]
    parts += [
        "Splits",
        text_table(header, lengths),
        "Episodes",
        text_table(["data", "file", "episodes", "steps"], where(result)),
    ]
    parts += [
        "Prompts",
        text_table(["data", "prompt", "split", "episodes", "% of episodes", "steps"], prompt_rows(result)),
    ]
    for name, shared in result["overlap"].items():
        verdict = f"episodes {numbers(shared)} of validation are training data too" if shared else "none"
        parts.append(f"overlap of training and validation, {name}: {verdict}")
    return "\n\n".join(parts)


def where(result: dict[str, Any]) -> list[list[Any]]:
    """Per dataset, split and file: which episodes begin there, and their steps."""
    by_file: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for episode in result["episodes"]:
        by_file.setdefault((f"{episode['dataset']} {episode['split']}", episode["file"]), []).append(episode)
    return [
        [*key, numbers([e["episode"] for e in episodes]), sum(e["steps"] for e in episodes)]
        for key, episodes in by_file.items()
    ]


def prompt_rows(result: dict[str, Any]) -> list[list[Any]]:
    """Per dataset, prompt and split: episodes, their share of the prompt's, and steps."""
    return [
        [about["dataset"], about["prompt"], split, episodes, 100 * episodes / about["episodes"], steps]
        for about in result["prompts"]
        for split, (episodes, steps) in about["splits"].items()
    ]


def numbers(ascending: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in ascending:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


if __name__ == "__main__":
    run_command(main)
