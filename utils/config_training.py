"""The sections of training: `training`, `optimizer` and `lr_scheduler`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from utils.config_fields import not_negative, positive
from utils.config_reader import ConfigError
from utils.foreign_files import is_plain_name


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, what to write and when."""

    epochs: int = 10  # passes over the training data
    max_steps: int | None = None  # optimizer steps; stops earlier than epochs when reached
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step; data.batch_size is their total
    log_interval: int = 10  # optimizer steps between log lines
    checkpoint_dir: str = "experiments"  # everything goes to {checkpoint_dir}/{experiment_name}/
    experiment_name: str = "default"
    grad_clip_norm: float | None = 1.0  # None: no clipping
    seed: int = 42  # of first weights, order of samples, noise and augmentation
    max_hours: float | None = None  # wall-clock hours of one start; then it saves and exits, to be resumed
    save_every_n_epochs: int = 1
    save_every_n_steps: int | None = None  # optimizer steps between checkpoints within epochs; None: none
    keep_last_k: int | None = 3  # keep this many checkpoint_* files, besides model_best; None: all
    val_every_n_epochs: int = 1
    val_max_batches: int | None = None  # batches of data.batch_size, of samples spread over the set; None: all
    val_num_samples: int = 1  # draws per held-out sample; 2 or more add spread and best-of-k of heads that sample
    val_num_plots: int = 4  # held-out samples whose predictions are drawn at every validation; 0: none
    eval_every_n_epochs: int | None = None  # closed-loop episodes of the section closed_loop; None: none
    save_adapters_only: bool = False  # leave frozen weights out of checkpoints: they are read from the backbone again
    best_metric: str = "val_loss"  # what model_best is best in: a validation metric, or success (eval_every_n_epochs)
    early_stopping_patience: int | None = None  # validations without a new best before training stops; None: never
    ema_decay: float | None = None  # average weights over updates, for evaluation; 0.999, say; None: no average
    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()  # where metrics and pictures go as well
    log_samples: bool = False  # write which samples each step takes to logs/samples_rank_{r}.jsonl
    compile: bool = False  # torch.compile of the transformer layers: slow first steps, then faster ones on a GPU
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"  # the latter searches for faster kernels
    num_threads: int | None = None  # CPU threads of the training process; None: torch's choice
    strategy: Literal["ddp", "fsdp"] = "ddp"  # main_train_ddp.py: whole model on every rank, or sharded over them
    checkpoint_format: Literal["file", "shards"] = "file"  # shards: every fsdp rank writes its part beside the file
    distributed_timeout_s: float = 1800.0  # seconds that a rank waits for the others before it gives up

    def __post_init__(self) -> None:
        positive(self, "training", "epochs", "gradient_accumulation_steps", "log_interval")
        positive(self, "training", "save_every_n_epochs", "val_every_n_epochs", "val_num_samples")
        if self.val_num_plots < 0:
            raise ConfigError(f"training.val_num_plots is {self.val_num_plots}; give 0 (no plots) or more")
        positive(self, "training", "distributed_timeout_s")
        if self.checkpoint_format == "shards" and self.strategy != "fsdp":
            raise ConfigError(
                "training.checkpoint_format is shards, but training.strategy ddp shards nothing; take file, or fsdp"
            )
        if self.eval_every_n_epochs is not None and self.strategy == "fsdp":
            raise ConfigError(
                "training.eval_every_n_epochs runs episodes on every rank by itself, which training.strategy fsdp, "
                "whose ranks hold a part of the policy each, can't do; take ddp, or evaluate with main_eval.py"
            )
        for name in (
            "max_steps",
            "max_hours",
            "save_every_n_steps",
            "keep_last_k",
            "val_max_batches",
            "eval_every_n_epochs",
            "early_stopping_patience",
            "num_threads",
            "grad_clip_norm",
        ):
            if getattr(self, name) is not None:
                positive(self, "training", name)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"training.ema_decay is {self.ema_decay}; give a number in (0, 1), or null for none")
        if not is_plain_name(self.experiment_name):
            raise ConfigError(f"training.experiment_name is {self.experiment_name!r}; give a plain folder name")


@dataclass(frozen=True)
class ClosedLoopConfig:
    """The episodes of `training.eval_every_n_epochs`, in a simulator."""

    env: str = "metaworld"  # a simulator, as of main_eval.py --env
    tasks: tuple[str, ...] = ()  # names, groups or all
    env_options: tuple[str, ...] = ()  # key=value each, as of main_eval.py --env_options
    episodes: int = 5  # of each task
    num_envs: int = 1  # simulator processes of each rank; 1 simulates in the training process
    num_videos: int = 1  # of each task, those of its first episodes; kept in videos/ and sent to the trackers
    seed: int = 20_000  # of the first episode; main_eval.py begins at 10000, so that a best policy meets new scenes
    dataset: str | None = None  # of a mixture, the one whose robot is driven

    def __post_init__(self) -> None:
        positive(self, "closed_loop", "episodes", "num_envs")
        not_negative(self, "closed_loop", "num_videos", "seed")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer over every parameter that trains."""

    type: Literal["AdamW", "AdamW8bit", "SGD"] = "AdamW"  # AdamW8bit: bitsandbytes, a byte per moment
    lr: float = 5e-5  # peak; of every parameter without a rate of its own
    vision_lr: float | None = None  # peak of the vision tower and its projector; None: lr
    language_lr: float | None = None  # peak of the language model; None: lr
    head_lr: float | None = None  # peak of the action head and the vision resampler; None: lr
    weight_decay: float = 0.01  # not applied to norms and biases, unless decay_all
    decay_all: bool = False  # decay every parameter, as pi0's original training does
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    eps: float = 1e-8  # AdamW
    momentum: float = 0.9  # SGD

    def __post_init__(self) -> None:
        positive(self, "optimizer", "lr", "eps")
        for name in ("vision_lr", "language_lr", "head_lr"):
            if getattr(self, name) is not None:
                positive(self, "optimizer", name)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {list(self.betas)}; give two numbers in [0, 1)")
        not_negative(self, "optimizer", "weight_decay")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum is {self.momentum}; give a number in [0, 1)")


@dataclass(frozen=True)
class LRSchedulerConfig:
    """The learning rate as a function of the step.

    `T_max` and `step_size` count epochs for `CosineAnnealingLR` and `StepLR`, as they do where torch's schedulers of
    these names are stepped once an epoch; all other lengths count optimizer steps. `interval` says otherwise.
    """

    type: Literal["CosineAnnealingLR", "StepLR", "warmup_cosine", "constant", "lerobot_cosine"] = "warmup_cosine"
    interval: Literal["step", "epoch"] | None = None  # unit of every length below; None: see above
    warmup_steps: int = 0  # linear from 0, before any of the schedules
    T_max: int | None = None  # where the cosine reaches eta_min and stays; None: the end of training
    eta_min: float = 0.0  # final learning rate of the cosines
    step_size: int | None = None  # StepLR, which needs it: where the learning rate falls, again and again
    gamma: float = 0.1  # StepLR

    def __post_init__(self) -> None:
        not_negative(self, "lr_scheduler", "warmup_steps", "eta_min")
        for name in ("T_max", "step_size"):
            if getattr(self, name) is not None:
                positive(self, "lr_scheduler", name)
        positive(self, "lr_scheduler", "gamma")
        if self.type == "StepLR" and self.step_size is None:
            raise ConfigError("lr_scheduler.type is StepLR without a step_size; give a number of epochs")
        if self.type == "lerobot_cosine" and self.T_max is None:
            raise ConfigError("lr_scheduler.type is lerobot_cosine, whose T_max must be given (30000 for pi0)")

    def counts_epochs(self, name: str) -> bool:
        """Whether a length (`warmup_steps`, `T_max` or `step_size`) is a number of epochs, not of optimizer steps."""
        if self.interval is not None:
            return self.interval == "epoch"
        return name != "warmup_steps" and self.type in ("CosineAnnealingLR", "StepLR")
