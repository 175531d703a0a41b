"""The configuration: precedence, types, and an error for every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from utils.cli import config_from_args, refuse_to_overwrite, train_parser
from utils.config_utils import (
    ActionHeadConfig,
    Config,
    ConfigError,
    VLMConfig,
    config_from_dict,
    config_to_dict,
    is_free,
    load_config,
    save_config,
)


def test_defaults_round_trip(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(Config(), path)
    assert load_config(path) == Config() == config_from_dict(config_to_dict(Config()))


def test_precedence_flag_over_set_over_yaml_over_default(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optimizer: {lr: 1e-3, weight_decay: 0.5, eps: 1e-6}\n")
    config = load_config(path, {"optimizer.lr": 1e-5}, ["optimizer.lr=1e-4", "optimizer.weight_decay=0.1"])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.eps) == (1e-5, 0.1, 1e-6)
    assert config.optimizer.betas == Config().optimizer.betas


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("5e-5", 5e-5), ("1.0e-4", 1e-4), ("'2e-5'", 2e-5), ("1", 1.0)]
)
def test_numbers_are_numbers_however_yaml_reads_them(tmp_path, text, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"optimizer: {{lr: {text}}}\n")
    lr = load_config(path).optimizer.lr
    assert lr == value and isinstance(lr, float)


def test_every_documented_key_is_accepted():
    config = config_from_dict(
        {
            "data": {
                "train_parquet_files": ["a", "b"],
                "val_parquet_files": "c",
                "tokenizer_name_or_path": "t",
                "image_processor_name_or_path": "i",
                "siglip_model_name": "s",
                "max_seq_len": 2,
                "prompt_max_len": 20,
                "batch_size": 4,
                "num_workers": 0,
                "normalization_stats_path": "n.json",
                "state_dim": 14,
                "action_bounds": [-2, 2],
            },
            "model": {
                "vlm_config": {
                    "model_name_or_path": "m",
                    "use_aux_camera": True,
                    "freeze_vision_tower": True,
                    "freeze_language_model": True,
                    "dtype": "torch.bfloat16",
                    "num_image_tokens": 256,
                },
                "vision_resampler_config": {"type": "perceiver", "output_dim": 2048},
                "action_head_config": {
                    "type": "flow_matching",
                    "use_state_input": False,
                    "horizon": 16,
                    "num_action_dims": 14,
                    "action_dim": 224,
                    "num_action_bins": 128,
                    "mlp_hidden_dims": [512],
                    "dropout_prob": 0.1,
                },
            },
            "training": {
                "epochs": 3,
                "log_interval": 5,
                "checkpoint_dir": "out",
                "experiment_name": "e",
                "grad_clip_norm": 1.0,
                "seed": 1,
                "save_every_n_epochs": 2,
                "max_steps": 10,
                "val_every_n_epochs": 3,
            },
            "optimizer": {"type": "adamw", "lr": 1e-4, "weight_decay": 0.0, "betas": [0.9, 0.99]},
            "lr_scheduler": {"type": "CosineAnnealingLR", "T_max": 100, "eta_min": 1e-6},
            "wandb": {"project": "p", "entity": None},
        }
    )
    assert config.model.action_head_config.per_action_dim == 14 and config.model.vlm_config.dtype == "bfloat16"
    assert config.data.train_parquet_files == ("a", "b") and config.data.val_parquet_files == ("c",)
    assert config.cameras == ("image_1", "image_2") and config.optimizer.type == "AdamW"
    assert config.experiment_dir == Path("out/e")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optimizer": {"learning_rate": 1}}, "unknown key optimizer.learning_rate; did you mean optimizer."),
        ({"data": {"batchsize": 1}}, "unknown key data.batchsize; did you mean data.batch_size?"),
        ({"modle": {}}, "unknown key modle; did you mean model?"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr is 'fast' (str); wanted a number"),
        ({"data": {"batch_size": 2.5}}, "data.batch_size is 2.5 (float); wanted a whole number"),
        ({"data": {"batch_size": True}}, "data.batch_size is True (bool); wanted a whole number"),
        ({"model": {"vlm_config": {"use_aux_camera": "yes"}}}, "use_aux_camera is 'yes' (str); wanted true or false"),
        (
            {"optimizer": {"type": "adamx"}},
            "optimizer.type is 'adamx'; choose from AdamW, AdamW8bit, SGD; did you mean AdamW?",
        ),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas is [0.9]; wanted a list of 2 values"),
        ({"optimizer": 3}, "optimizer is 3; wanted a section with keys"),
        (
            {"model": {"action_head_config": {"action_dim": 50}}},
            "action_dim is 50 but horizon 8 x per_action_dim 7 = 56",
        ),
        (
            {"model": {"action_head_config": {"num_action_dims": 4, "per_action_dim": 6}}},
            "num_action_dims is 4 but per_action_dim is 6",
        ),
        ({"model": {"action_head_config": {"hidden_dim": 100, "num_heads": 8}}}, "does not split into 8 heads"),
        ({"model": {"action_head_config": {"time_clamp": [0.5, 0.2]}}}, "time_clamp is [0.5, 0.2]"),
        ({"model": {"action_head_config": {"time_beta": [0, 1]}}}, "both parameters must be positive"),
        ({"model": {"action_head_config": {"dropout_prob": 1.0}}}, "dropout_prob is 1.0; give a number in [0, 1)"),
        ({"model": {"vlm_config": {"dtype": "int8"}}}, "dtype is 'int8'; give bfloat16, float16 or float32"),
        ({"data": {"batch_size": 0}}, "data.batch_size is 0; it must be positive"),
        ({"data": {"num_workers": -1}}, "data.num_workers is -1"),
        ({"data": {"prompt_max_len": 2}}, "data.prompt_max_len is 2"),
        ({"data": {"action_bounds": [1, -1]}}, "give [low, high] with low < high"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr is -1.0; it must be positive"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "give two numbers in [0, 1)"),
        ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay is -1.0; give 0 or more"),
        ({"lr_scheduler": {"warmup_steps": -1}}, "lr_scheduler.warmup_steps is -1"),
        ({"training": {"experiment_name": "a/b"}}, "give a plain folder name"),
        ({"training": {"max_steps": 0}}, "training.max_steps is 0; it must be positive"),
        ({"inference": {"latency_steps": -1}}, "inference.latency_steps is -1; give 0 or more control steps"),
        ({"inference": {"max_guidance_weight": 0}}, "inference.max_guidance_weight is 0.0; it must be positive"),
        ({"inference": {"ensemble_decay": -1}}, "inference.ensemble_decay is -1.0; give 0 or more"),
        ({"optimizer": {"momentum": 1.0}}, "optimizer.momentum is 1.0; give a number in"),
        ({"lr_scheduler": {"eta_min": -1e-5}}, "lr_scheduler.eta_min is -1e-05; give 0 or more"),
        ({"inference": {"guidance_steps": 0}}, "inference.guidance_steps is 0; it must be positive"),
        ({"inference": {"execution": "rct"}}, "did you mean rtc?"),
        (
            {"model": {"action_head_config": {"max_clean_prefix": 8}}},
            "max_clean_prefix is 8; give 0 to 7, so that at least one of the 8 actions is left to predict",
        ),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr is nan (float); wanted a number"),
        ({"training": {"max_hours": "inf"}}, "training.max_hours is 'inf' (str); wanted a number"),
        ({"data": {"mixture": [{"path": "a", "name": "x", "weight": -1}]}}, "data.mixture x: weight is -1.0; give 0"),
        ({"data": {"mixture": [{"path": "a", "name": "x", "weight": 0}]}}, "data.mixture: every weight is 0; give one"),
        ({"data": {"mixture": [{"path": "a"}]}}, "data.mixture: every entry needs both a path and a name"),
        ({"data": {"mixture": [{"path": p, "name": "x"} for p in "ab"]}}, "names ['x', 'x'] are not distinct"),
        (
            {"data": {"mixture": [{"path": "a", "name": "x", "per_action_dim": 8}]}},
            "data.mixture x: per_action_dim 8 exceeds model.action_head_config.per_action_dim 7; set that to the",
        ),
        ({"data": {"mixture": [{"path": "a", "name": "x", "state_dim": 8}]}}, "state_dim 8 exceeds data.state_dim 7"),
        (
            {"data": {"mixture": [{"path": "a", "name": "x"}], "train_parquet_files": "b"}},
            "data.mixture and data.train_parquet_files both name training data; give one of them",
        ),
        ({"data": {"val_fraction": 0.1, "val_parquet_files": "b"}}, "both say what is held out; give one of them"),
        ({"data": {"val_fraction": 1}}, "data.val_fraction is 1.0; give a number in [0, 1)"),
        ({"data": {"absolute_action_dims": [7]}}, "absolute_action_dims is [7]; actions have dimensions 0 to 6"),
        (
            {"data": {"action_mode": "delta", "state_dim": 6}},
            "state_dim 6 has no value for action dimensions [6]; list them in data.absolute_action_dims",
        ),
        ({"training": {"ema_decay": 1}}, "training.ema_decay is 1.0; give a number in (0, 1), or null for none"),
        ({"serving": {"batch_window_ms": -1}}, "serving.batch_window_ms is -1.0; give 0 or more"),
        (
            {"inference": {"best_of": 4}, "model": {"action_head_config": {"type": "regression"}}},
            "inference.best_of is 4, but model.action_head_config.type regression samples nothing, so that all draws "
            "are one; give 1",
        ),
        (
            {"inference": {"best_of": 4}, "model": {"action_head_config": {"type": "discrete"}}},
            "type discrete samples nothing, so that all draws are one; give 1, or take decoding sample",
        ),
        ({"inference": {"n_action_steps": 9}}, "n_action_steps is 9 but model.action_head_config.horizon is 8"),
    ],
)
def test_mistakes_are_named(tree, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_dict(tree)


def test_heads_that_sample_take_the_best_of_several_draws():
    for head in ({"type": "flow_matching"}, {"type": "diffusion"}, {"type": "discrete", "decoding": "sample"}):
        tree = {"inference": {"best_of": 4}, "model": {"action_head_config": head}}
        assert config_from_dict(tree).inference.best_of == 4


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="no such file; give --config_path"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder, not a file; give --config_path"):
        load_config(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text("base: none.yaml")
    with pytest.raises(ConfigError, match=r"none.yaml: no such file; correct base: in \S+c.yaml"):
        load_config(path)
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(path)
    path.write_text("")
    assert load_config(path) == Config()
    with pytest.raises(ConfigError, match="--set lr: no '='"):
        load_config(path, set_args=["lr"])
    path.write_text("optimizer: 3")
    with pytest.raises(ConfigError, match="--set optimizer.lr=1: optimizer is a value, not a section"):
        load_config(path, set_args=["optimizer.lr=1"])


def test_whose_mistake_it_is(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {batch_size: 4}")
    with pytest.raises(ConfigError, match=r"c.yaml with --set data.batchsize=2: unknown key data.batchsize; did you"):
        load_config(path, set_args=["data.batchsize=2"])
    with pytest.raises(ConfigError, match=r"c.yaml with data.batch_size 0: data.batch_size is 0"):
        load_config(path, {"data.batch_size": 0, "data.num_workers": None}, ["data.state_dim=3"])
    with pytest.raises(ConfigError, match=r"c.yaml with --set dta.state_dim=3: unknown key dta; did you mean data"):
        load_config(path, set_args=["dta.state_dim=3"])
    path.write_text("data: {batchsize: 4}")
    with pytest.raises(ConfigError, match=r"c.yaml: unknown key data.batchsize"):
        load_config(path, set_args=["data.state_dim=3"])
    path.write_text("data: {batch_size: 0}")
    with pytest.raises(ConfigError, match=r"c.yaml with optimizer.lr -1: optimizer.lr is -1"):
        load_config(path, {"optimizer.lr": -1}, ["data.batch_size=2"])
    assert load_config(path, set_args=["data.batch_size=2"]).data.batch_size == 2


def test_a_file_can_not_be_its_own_base(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(ConfigError, match=r"is its own base \(a.yaml -> b.yaml -> c.yaml -> b.yaml\); remove one of"):
        load_config(tmp_path / "a.yaml")


def test_base_states_differences(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {batch_size: 4, state_dim: 3}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\ndata: {batch_size: 16}\n")
    config = load_config(tmp_path / "child.yaml")
    assert (config.data.batch_size, config.data.state_dim) == (16, 3)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load_and_state_only_differences(path):
    load_config(path)
    tree = yaml.safe_load(path.read_text())
    assert set(tree) <= set(config_to_dict(Config())) | {"base"}


def _args(tmp_path, *extra):
    (tmp_path / "c.yaml").write_text("training: {experiment_name: a}\n")
    return train_parser(None).parse_args(["--config_path", str(tmp_path / "c.yaml"), *extra])


def test_every_flag_reaches_its_key(tmp_path):
    flags = "--epochs 3 --batch_size 2 --lr 1e-3 --experiment_name x --model_name_or_path m --use_wandb"
    flags += " --train_data_override t1 t2 --val_data_override v --wandb_project_name p --wandb_entity e"
    config = config_from_args(_args(tmp_path, *flags.split(), "--set", "data.num_workers=0", "training.seed=5"))
    assert (config.training.epochs, config.data.batch_size, config.optimizer.lr) == (3, 2, 1e-3)
    assert config.training.experiment_name == "x" and config.model.vlm_config.model_name_or_path == "m"
    assert config.data.train_parquet_files == ("t1", "t2") and config.data.val_parquet_files == ("v",)
    assert config.wandb.enabled and (config.wandb.project, config.wandb.entity) == ("p", "e")
    assert (config.data.num_workers, config.training.seed) == (0, 5)
    older = config_from_args(_args(tmp_path, "--model_path_override", "m2"))
    assert older.model.vlm_config.model_name_or_path == "m2"


def test_contradicting_flags(tmp_path):
    with pytest.raises(ConfigError, match="exclude each other"):
        config_from_args(_args(tmp_path, "--resume_checkpoint", "a", "--init_checkpoint", "b"))
    with pytest.raises(ConfigError, match="name two backbones"):
        config_from_args(_args(tmp_path, "--model_name_or_path", "a", "--model_path_override", "b"))


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    config = config_from_dict({"training": {"checkpoint_dir": str(tmp_path), "experiment_name": "old"}})
    refuse_to_overwrite(config)
    (tmp_path / "old/checkpoints").mkdir(parents=True)
    (tmp_path / "old/checkpoints/.checkpoint_epoch_1.pth.tar.17.tmp").touch()  # a kill during the first save
    (tmp_path / "old/checkpoints/checkpoint_epoch_1.pth.tar.step_4.shards").mkdir()
    refuse_to_overwrite(config)
    (tmp_path / "old/checkpoints/checkpoint_epoch_1.pth.tar").touch()
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume_checkpoint auto"):
        refuse_to_overwrite(config)


def test_fields_tell_which_settings_are_free():
    assert is_free(VLMConfig, "dtype") and not is_free(VLMConfig, "type")
    assert is_free(ActionHeadConfig(), "dropout_prob") and not is_free(ActionHeadConfig(), "horizon")
    assert is_free(VLMConfig(), "lora.dropout") and not is_free(VLMConfig, "lora.rank")
    assert not is_free(VLMConfig, "fusion.num_latents") and not is_free(VLMConfig, "lora")
    with pytest.raises(KeyError):
        is_free(VLMConfig, "lora.ranks")
    assert ActionHeadConfig().dropout_prob == 0.0 and ActionHeadConfig(dropout_prob=0.5).dropout_prob == 0.5


def test_actions_stay_absolute_by_the_name_of_their_joint():
    head = {"model": {"action_head_config": {"per_action_dim": 3}}}
    names = ["Left_Gripper.pos", "elbow", "gripper_right"]
    data = {"state_dim": 3, "action_mode": "delta", "action_names": names, "absolute_joints": ["gripper"]}
    config = config_from_dict({"data": data, **head})
    assert config.data.absolute_action_dims == (0, 2) and config.data.action_names == tuple(names)
    again = config_from_dict(config_to_dict(config))
    assert again == config
    for change, message in (
        (
            {"absolute_joints": ["finger"]},
            "no action is called 'finger' .names: Left_Gripper.pos, elbow, gripper_right",
        ),
        ({"action_names": []}, "no action is called 'gripper' .names: none: set data.action_names"),
        ({"action_names": ["a"]}, "data.action_names has 1 names, but .*per_action_dim is 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_from_dict({"data": {**data, **change}, **head})
