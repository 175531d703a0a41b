"""LoRA, quantized bases, checkpoints without frozen weights, truncated language models."""

from __future__ import annotations

import sys

import pytest
import torch

from model.adapters import base_fingerprint, is_adapted, merge_adapters, trained_state
from model.checkpointing import require_same_architecture, state_to_save
from model.tiny.paligemma import make_tiny_paligemma
from model.vla_model import VLAModel
from tests.conftest import TINY
from tests.policies import act, checkpoint_of, make_batch, make_policy, policy_config
from utils.checkpoint import CheckpointError
from utils.config_utils import ConfigError, config_to_dict


@pytest.fixture
def make(tmp_path, tiny_paligemma_dir):
    def policy_and_config(vlm: dict | None = None, **changes):
        config = policy_config(tiny_paligemma_dir, tmp_path, model={"vlm_config": vlm or {}}, **changes)
        return make_policy(config), config

    return policy_and_config


def train(policy: VLAModel, steps: int = 3) -> list[float]:
    """A few real updates, so that adapters and the gates of the head are no longer zero."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = policy(make_batch()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def predict(policy: VLAModel) -> torch.Tensor:
    return act(policy.eval(), make_batch(), 3)


def test_lora_starts_as_the_base_and_only_adapters_and_head_train(make):
    plain, _ = make()
    policy, _ = make({"lora": {"rank": 4}})
    torch.testing.assert_close(
        policy.eval().encode(make_batch()).tokens_BLE, plain.eval().encode(make_batch()).tokens_BLE
    )
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    language = {name for name in trained if "language_model" in name}
    assert language and all(".lora_" in name for name in language)
    assert any("vision_tower" in name for name in trained) and any(name.startswith("action_head") for name in trained)
    kinds = {name.split(".lora_")[0].rsplit(".")[-1] for name in language}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_without_lora_no_name_changes(make):
    plain, _ = make()
    names = set(plain.state_dict())
    adapted, _ = make({"lora": {"targets": ["q_proj"], "vision": True}})
    renamed = {name.replace(".base_layer", "") for name in adapted.state_dict() if ".lora_" not in name}
    assert renamed == names and not any("base_layer" in name for name in names)


def test_adapters_of_both_towers_and_chosen_targets(make):
    policy, _ = make({"lora": {"rank": 2, "targets": ["q_proj", "v_proj"], "vision": True}})
    adapted = {name for name, module in policy.named_modules() if is_adapted(module)}
    assert {name.rsplit(".")[-1] for name in adapted} == {"q_proj", "v_proj"}
    assert len([n for n in adapted if "vision_tower" in n]) == len([n for n in adapted if "language_model" in n]) == 4


def test_a_frozen_bfloat16_base_keeps_float32_adapters(make):
    policy, _ = make({"lora": {"rank": 4}, "dtype": "bfloat16"})
    for name, parameter in policy.backbone.backbone.language_model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
        assert parameter.requires_grad == (".lora_" in name)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    train(policy)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_roundtrip(make, quantization, dtype):
    policy, config = make({"lora": {"rank": 4}, "quantization": quantization, "dtype": dtype})
    train(policy)
    again = VLAModel.from_checkpoint(checkpoint_of(policy, config))
    assert torch.equal(predict(policy), predict(again))
    for (name, a), b in zip(policy.state_dict().items(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert train(again.train()) == train(policy.train()), "training goes on alike"


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_merging_keeps_predictions(make, quantization):
    policy, config = make({"lora": {"rank": 4, "vision": True}, "quantization": quantization})
    train(policy, 6)
    wanted = predict(policy)
    count = merge_adapters(policy)
    plain, _ = make()
    assert policy.state_dict().keys() == plain.state_dict().keys() and count == 2 * 7 + 2 * 6
    # 8-bit layers also quantize their inputs, which a merged layer does not.
    torch.testing.assert_close(predict(policy), wanted, atol=0.05 if quantization == "8bit" else 1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_base_is_small_close_and_learns(make, quantization):
    plain, _ = make()
    policy, _ = make({"lora": {"rank": 4}, "quantization": quantization})
    a, b = (p.eval().encode(make_batch()).tokens_BLE for p in (plain, policy))
    assert 1e-4 < (a - b).abs().mean() / a.abs().mean() < (0.05 if quantization == "8bit" else 0.5)
    linear = policy.backbone.backbone.language_model.layers[0].mlp.up_proj.base_layer
    numbers = linear.in_features * linear.out_features
    assert linear.weight.element_size() * linear.weight.numel() == numbers // (1 if quantization == "8bit" else 2)
    losses = train(policy.train(), 12)
    assert losses[-1] < losses[0]


def test_adapters_alone_are_small_and_complete(make):
    policy, config = make({"lora": {"rank": 2}, "freeze_vision_tower": True}, training={"save_adapters_only": True})
    train(policy)
    whole, small = state_to_save(policy, False), state_to_save(policy, True)
    assert small["base"] == {**whole["base"], "included": False}
    assert small["base"]["name_or_path"] == config.model.vlm_config.model_name_or_path
    frozen = [name for name, parameter in policy.named_parameters() if not parameter.requires_grad]
    assert whole["model"].keys() - small["model"].keys() == set(frozen)
    checkpoint = {**checkpoint_of(policy, config), **small}
    again = VLAModel.from_checkpoint(checkpoint)
    assert torch.equal(predict(again), predict(policy))
    assert state_to_save(again, True)["base"] == small["base"]

    checkpoint["model"] = dict(list(small["model"].items())[1:])
    with pytest.raises(CheckpointError, match="is missing"):
        VLAModel.from_checkpoint(checkpoint)


def test_adapters_on_another_base_are_refused(make, tmp_path):
    policy, config = make({"lora": {"rank": 2}})
    checkpoint = {**checkpoint_of(policy, config), **state_to_save(policy, True)}
    make_tiny_paligemma(tmp_path / "other", **TINY, seed=1)
    checkpoint["config"]["model"]["vlm_config"]["model_name_or_path"] = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match="adapters trained on .*fingerprint.* name the right base"):
        VLAModel.from_checkpoint(checkpoint)


def test_quantized_weights_of_another_format_are_refused(make):
    policy, config = make({"lora": {"rank": 2}, "quantization": "4bit"})
    checkpoint = checkpoint_of(policy, config)
    key = next(key for key in checkpoint["model"] if ".quant_state." in key)
    checkpoint["model"][key] = checkpoint["model"][key].flip(0)
    with pytest.raises(CheckpointError, match=r"quantized as .* give the model\.vlm_config\.dtype"):
        VLAModel.from_checkpoint(checkpoint)


def test_adapters_go_on_top_of_a_plain_checkpoint(make):
    plain, config = make()
    train(plain)
    checkpoint = checkpoint_of(plain, config)
    _, lora = make({"lora": {"rank": 2}, "quantization": "none"})
    require_same_architecture(checkpoint["config"], lora, "plain.pth.tar")
    policy = VLAModel.from_checkpoint(checkpoint, lora)
    torch.testing.assert_close(predict(policy), predict(plain))
    assert state_to_save(policy)["base"]["name_or_path"] is None
    _, small = make({"lora": {"rank": 2}}, training={"save_adapters_only": True})
    with pytest.raises(ConfigError, match="save_adapters_only needs frozen weights that a later run can read"):
        VLAModel.from_checkpoint(checkpoint, small)


def test_architectures_that_differ_in_adapters(make):
    _, config = make({"lora": {"rank": 2}})
    saved = config_to_dict(config)
    _, wider = make({"lora": {"rank": 4, "dropout": 0.5}})
    with pytest.raises(ConfigError, match=r"model\.vlm_config\.lora\.rank: checkpoint 2, config 4; make them agree"):
        require_same_architecture(saved, wider, "c")
    _, plain = make()
    with pytest.raises(ConfigError, match=r"lora\.rank: checkpoint 2, config None.*merge_lora\.py"):
        require_same_architecture(saved, plain, "c")


def test_fingerprints_tell_bases_apart(make):
    policy, _ = make({"lora": {}})
    first = base_fingerprint(policy.backbone)
    train(policy)
    assert base_fingerprint(policy.backbone) == first, "adapters do not count"
    with torch.no_grad():
        policy.backbone.backbone.language_model.norm.weight[0] += 1
    assert base_fingerprint(policy.backbone) != first
    assert not any("base_layer" in name for name in trained_state(policy))


def test_refusals(make, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"lora\.targets: no linear layer 'q_prj' in the language part; did you mean q_"
    ):
        make({"lora": {"targets": ["q_prj"]}})
    with pytest.raises(ConfigError, match="neither language nor vision"):
        make({"lora": {"language": False}})
    with pytest.raises(ConfigError, match="quantization is 4bit, but nothing is frozen"):
        make({"quantization": "4bit"})
    with pytest.raises(ConfigError, match=r"lora\.rank is 0; it must be positive"):
        make({"lora": {"rank": 0}})
    with pytest.raises(ConfigError, match=r"lora\.dropout is 1\.0; give a number in \[0, 1\)"):
        make({"lora": {"dropout": 1.0}})
    for package, vlm in (("peft", {"lora": {}}), ("bitsandbytes", {"lora": {}, "quantization": "8bit"})):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"needs the {package} package: pip install {package}"):
            make(vlm)
        monkeypatch.delitem(sys.modules, package)


@pytest.mark.parametrize("version", [1, 2])
def test_the_first_layers_alone(tmp_path, tiny_paligemma_dir, tiny_paligemma2_dir, version):
    directory = tiny_paligemma_dir if version == 1 else tiny_paligemma2_dir
    config = policy_config(directory, tmp_path, model={"vlm_config": {"num_language_layers": 1}})
    policy, whole = make_policy(config), make_policy(policy_config(directory, tmp_path))
    assert len(policy.backbone.backbone.language_model.layers) == 1
    whole.backbone.backbone.language_model.layers = whole.backbone.backbone.language_model.layers[:1]
    whole.backbone.backbone.language_model.config.num_hidden_layers = 1
    assert torch.equal(policy.eval().encode(make_batch()).tokens_BLE, whole.eval().encode(make_batch()).tokens_BLE)

    checkpoint = checkpoint_of(policy, config)
    assert checkpoint["backbone_config"]["text_config"]["num_hidden_layers"] == 1
    assert torch.equal(predict(VLAModel.from_checkpoint(checkpoint)), predict(policy))
    with pytest.raises(ConfigError, match="num_language_layers is 5, but the language model has 2 layers; give 1 to 2"):
        make_policy(policy_config(directory, tmp_path, model={"vlm_config": {"num_language_layers": 5}}))
    with pytest.raises(ConfigError, match=r"num_language_layers is 0; it must be positive"):
        policy_config(directory, tmp_path, model={"vlm_config": {"num_language_layers": 0}})


def test_damaged_directories_are_still_found_when_truncated(tmp_path, tiny_paligemma_dir):
    """Only the layers that are cut off may be left over."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "odd"
    directory.mkdir()
    for path in tiny_paligemma_dir.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    weights = load_file(directory / "model.safetensors")
    name = next(key for key in weights if "vision_tower" in key and ".layers.1." in key)
    weights[name.replace(".layers.1.", ".layers.7.")] = weights[name].clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="have the unknown .*vision_tower"):
        make_policy(policy_config(directory, tmp_path, model={"vlm_config": {"num_language_layers": 1}}))


def test_a_relative_base_is_found_from_another_folder(tmp_path, tiny_paligemma_dir, monkeypatch):
    """`model_name_or_path: weight/base` names nothing where the policy is served from: the folder of training does."""
    (tmp_path / "weight").mkdir()
    (tmp_path / "weight/base").symlink_to(tiny_paligemma_dir)
    monkeypatch.chdir(tmp_path)
    vlm = {"model_name_or_path": "weight/base", "lora": {"rank": 2}}
    config = policy_config(tmp_path, tmp_path, model={"vlm_config": vlm}, training={"save_adapters_only": True})
    policy = make_policy(config)
    checkpoint = {**checkpoint_of(policy, config), **state_to_save(policy, True)}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = VLAModel.from_checkpoint(checkpoint)
    assert torch.equal(predict(again), predict(policy))
    assert state_to_save(again, True)["base"]["folders"] == checkpoint["base"]["folders"]
    del checkpoint["base"]["folders"]  # as earlier versions wrote it
    with pytest.raises(ConfigError, match="weight/base"):
        VLAModel.from_checkpoint(checkpoint)
