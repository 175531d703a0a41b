"""What training did to the weights: their norms, changes from the base, faults, adapters, and histograms.

    python diagnose_weights.py --checkpoint_path experiments/quickstart/checkpoints/model_best.pth.tar
    python diagnose_weights.py --checkpoint_path C --base earlier.pth.tar --plot weights.png --json weights.json

The base is another checkpoint or a PaliGemma directory; by default the directory that the run started from, where it
still exists. The exit code is 1 where a weight is NaN or infinite.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.adapters import ADAPTER, is_adapted
from model.backbone import backbone_class
from model.vla_model import VLAModel
from utils.arguments import CommandParser, output_file, run_command
from utils.checkpoint import evaluation_weights, load_checkpoint
from utils.config_utils import Config, config_from_dict
from utils.misc import atomic_path
from utils.text_table import text_table

PRETRAINED = ("vision tower", "projector", "language model")
HISTOGRAM_VALUES = 500_000  # of each component, evenly spaced
SHOWN = 20  # findings on the terminal


@dataclasses.dataclass
class Measured:
    """One parameter of a policy. A quantized parameter has only a size.

    Sums of squares are kept, not norms, because they add up over a module.
    """

    name: str
    component: str
    values: int
    dtype: str
    trains: bool
    square: float = 0.0
    largest: float = 0.0
    non_finite: int = 0
    base_square: float | None = None  # None: not in the base
    moved_square: float = 0.0  # of the difference from the base
    unchanged: int = 0  # values equal to the base's

    @property
    def module(self) -> str:
        """The component, and within it the layer by its number."""
        layer = re.search(r"(layers|blocks)\.(\d+)", self.name)
        return f"{self.component} {layer[2]}" if layer else self.component


def measure(policy: VLAModel, base: dict[str, Tensor]) -> list[Measured]:
    """Measure every parameter of a policy.

    Args:
        policy: on the CPU.
        base: tensors to compare with, by the names that they have in a policy without adapters.
    """
    components = {id(p): name for name, module in policy.components().items() for p in module.parameters()}
    measured = []
    for name, parameter in policy.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        weight = Measured(name, components[id(parameter)], parameter.numel(), dtype, parameter.requires_grad)
        measured.append(weight)
        if not parameter.is_floating_point():
            continue
        value = parameter.detach().float()
        finite = torch.isfinite(value)
        weight.non_finite = int((~finite).sum())
        value = value.where(finite, 0.0)
        weight.square, weight.largest = value.square().sum().item(), value.abs().max().item()
        before = base.get(name.replace(".base_layer", ""))
        if before is not None and before.shape == value.shape and before.is_floating_point():
            before = before.to(parameter.dtype).float()  # as this policy would store it
            weight.base_square = before.square().sum().item()
            weight.moved_square = (value - before).square().sum().item()
            weight.unchanged = int((value == before).sum())
    return measured


def base_weights(config: Config, name: str | None) -> tuple[dict[str, Tensor], str]:
    """The tensors to compare with, and where they are from.

    Args:
        config: of the checkpoint.
        name: --base; None: what the run started from, if it is there.

    Raises:
        ConfigError, CheckpointError: `name` is neither a checkpoint nor a backbone's directory.
    """
    if name is not None and Path(name).is_file():
        return evaluation_weights(load_checkpoint(name)), name
    vlm = dataclasses.replace(config.model.vlm_config, lora=None, quantization="none")
    if name is not None:
        vlm = dataclasses.replace(vlm, model_name_or_path=name)
    elif not all(Path(path).is_dir() for path in vlm.pretrained_paths):
        return {}, f"nothing: {vlm.pretrained_names} is not here; give --base"
    resampler = config.model.vision_resampler_config
    backbone = backbone_class(vlm.type).from_pretrained(vlm, resampler, config.cameras, (0.5,) * 3, (0.5,) * 3)
    parts = [module for name, module in backbone.components().items() if name in PRETRAINED]
    pretrained = {id(parameter) for part in parts for parameter in part.parameters()}
    named = backbone.named_parameters(prefix="backbone")
    return {name: p.detach() for name, p in named if id(p) in pretrained}, vlm.pretrained_names


def faults_of(policy: VLAModel, measured: list[Measured], merged: bool) -> list[str]:
    """A sentence for each fault, the worst first; `merged` weights, which no longer tell what trained, have fewer."""
    broken = [weight for weight in measured if weight.non_finite]
    faults = [
        f"{weight.name}: {weight.non_finite:,} of {weight.values:,} values are NaN or infinite" for weight in broken
    ]
    if merged:
        return faults
    for weight in measured:
        if weight.trains and weight.square == 0 and not weight.non_finite and ".lora_" not in weight.name:
            faults.append(f"{weight.name}: dead: it trains, and every value is 0")
        if weight.trains and weight.base_square and weight.unchanged == weight.values:
            faults.append(f"{weight.name}: untouched: it trains, and equals the base")
        if not weight.trains and weight.base_square is not None and weight.unchanged < weight.values:
            share = 1 - weight.unchanged / weight.values
            faults.append(
                f"{weight.name}: frozen, but {share:.1%} of it differs from the base; is this the run's base?"
            )
    idle = [name for name, m in policy.named_modules() if is_adapted(m) and not m.lora_B[ADAPTER].weight.any()]
    if idle:
        faults.append(f"{idle[0]}: untouched: its adapter's B is 0 ({len(idle)} such adapters)")
    return faults


def module_rows(measured: list[Measured]) -> list[dict[str, Any]]:
    """Per module its size, what trains, norm, largest value, change relative to the base, and unchanged share."""
    groups = collections.defaultdict(list)
    for weight in measured:
        groups[weight.module].append(weight)
    rows = []
    for module, members in groups.items():
        compared = [weight for weight in members if weight.base_square is not None]
        base_square, values = sum(weight.base_square for weight in compared), sum(weight.values for weight in compared)
        moved = math.sqrt(sum(weight.moved_square for weight in compared))
        rows.append(
            {
                "module": module,
                "values": sum(weight.values for weight in members),
                "train": sum(weight.values for weight in members if weight.trains),
                "norm": math.sqrt(sum(weight.square for weight in members)),
                "largest": max(weight.largest for weight in members),
                "non_finite": sum(weight.non_finite for weight in members),
                "change": moved / math.sqrt(base_square) if base_square else None,
                "unchanged": sum(weight.unchanged for weight in compared) / values if values else None,
            }
        )
    return rows


def dtype_rows(measured: list[Measured]) -> list[dict[str, Any]]:
    """Values by component, stored type, and whether they train."""
    counts = collections.Counter()
    for weight in measured:
        counts[weight.component, weight.dtype, "trains" if weight.trains else "frozen"] += weight.values
    return [{"component": c, "dtype": d, "state": s, "values": values} for (c, d, s), values in counts.items()]


def adapter_rows(policy: VLAModel) -> list[dict[str, Any]]:
    """Adapters by the kind of layer that they adapt: their number, rank, scale, root mean square of the update."""
    kinds = collections.defaultdict(list)
    for name, module in policy.named_modules():
        if is_adapted(module):
            kinds[name.rsplit(".")[-1]].append(module)
    rows = []
    for kind, modules in sorted(kinds.items()):
        squares = [module.get_delta_weight(ADAPTER).detach().float().square().mean().item() for module in modules]
        first = modules[0]
        rms = math.sqrt(sum(squares) / len(squares))
        rank, scale = first.r[ADAPTER], first.scaling[ADAPTER]
        rows.append({"layers": kind, "count": len(modules), "rank": rank, "scale": scale, "update_rms": rms})
    return rows


def plot(policy: VLAModel, base: dict[str, Tensor], rows: list[dict[str, Any]], path: Path) -> None:
    """Histograms of each component's weights beside the base's, and each module's change, as a PNG."""
    from matplotlib.figure import Figure

    components = {
        name: module for name, module in policy.components().items() if any(True for _ in module.parameters())
    }
    changed = [row for row in rows if row["change"] is not None]
    height = 0.9 + 0.17 * len(changed)
    figure = Figure(figsize=(3.2 * len(components), 3.2 + height), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3.2, height))
    names = {id(parameter): name.replace(".base_layer", "") for name, parameter in policy.named_parameters()}
    panels = upper.subplots(1, len(components), squeeze=False)[0]
    for axes, (component, module) in zip(panels, components.items(), strict=True):
        now = [p.detach() for p in module.parameters() if p.is_floating_point()]
        before = [base[names[id(p)]] for p in module.parameters() if names[id(p)] in base]
        for tensors, style in (
            (now, {"alpha": 0.6, "label": "checkpoint"}),
            (before, {"histtype": "step", "color": "black", "label": "base"}),
        ):
            if tensors:
                axes.hist(_sample(tensors).numpy(), bins=120, log=True, **style)
        axes.set(title=component, xlabel="value")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("weights")
    axes = lower.subplots()
    if changed:
        axes.barh([row["module"] for row in changed], [row["change"] for row in changed])
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
    else:
        axes.text(0.5, 0.5, "no base to compare with", ha="center", transform=axes.transAxes)
    axes.set(xlabel="norm of the change relative to the base's norm")
    axes.grid(axis="x", alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _sample(tensors: list[Tensor]) -> Tensor:
    """Evenly spaced finite values of all tensors together."""
    step = max(1, sum(tensor.numel() for tensor in tensors) // HISTOGRAM_VALUES)
    values = torch.cat([tensor.flatten()[::step].float() for tensor in tensors])
    return values[torch.isfinite(values)]


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text; counts have separators."""
    if not rows:
        return "none"
    cells = [[f"{value:,}" if isinstance(value, int) else value for value in row.values()] for row in rows]
    return text_table(list(rows[0]), cells)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--base", help="checkpoint or backbone directory to compare with")
    parser.add_argument("--plot", type=output_file, help="PNG to write; default: beside the checkpoint")
    parser.add_argument("--json", type=output_file, help="write the tables here as well")
    args = parser.parse_args(arguments)
    checkpoint = load_checkpoint(args.checkpoint_path)
    policy = VLAModel.from_checkpoint(checkpoint, must_be_finite=False)
    base, source = base_weights(config_from_dict(checkpoint["config"], source=args.checkpoint_path), args.base)

    measured = measure(policy, base)
    report = {
        "modules": module_rows(measured),
        "dtypes": dtype_rows(measured),
        "adapters": adapter_rows(policy),
        "faults": faults_of(policy, measured, "merged_from" in checkpoint),
    }
    averaged = f", averaged over {checkpoint['ema']['updates']} updates" if "ema" in checkpoint else ""
    print(f"{args.checkpoint_path}: step {checkpoint['step']}{averaged}; compared with {source}")
    for title in ("modules", "dtypes", "adapters"):
        print(f"\n{title}\n{_table(report[title])}")
    print(f"\n{len(report['faults'])} findings")
    if "merged_from" in checkpoint:
        print("  (adapters were merged in: the run's own checkpoints tell dead, untouched and frozen weights)")
    for fault in report["faults"][:SHOWN]:
        print(f"  {fault}")
    if len(report["faults"]) > SHOWN:
        print(f"  and {len(report['faults']) - SHOWN} more (--json lists them all)")
    picture = args.plot or Path(args.checkpoint_path.removesuffix(".pth.tar") + "_weights.png")
    plot(policy, base, report["modules"], picture)
    print(f"\nhistograms: {picture}")
    if args.json:
        args.json.write_text(json.dumps({"base": source, **report}, indent=1), encoding="utf-8")
    return int(any(weight.non_finite for weight in measured))


if __name__ == "__main__":
    run_command(main)
