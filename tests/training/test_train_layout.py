"""The processes and the strategy of a training, and how accelerate and DeepSpeed read the files for it."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from dice_py.config.loading import resolve
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import UsageError
from dice_py.training.parallelism import ProcessLayout, lay_out, write_accelerate_config

CPU = ModelConfig(device="cpu", dtype="float32")
AUTO = ModelConfig()
ALL = DevicesConfig()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, of which CUDA_VISIBLE_DEVICES shows three."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab12,0")


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if DeepSpeed were installed."""
    original = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return object() if name == "deepspeed" else original(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def config(**changed: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 24, "per_device_train_batch_size": 2, **changed})


# --- lay_out --------------------------------------------------------------------------------------------------


def test_cpu_is_one_process_unless_configured() -> None:
    assert lay_out(config(), CPU, ALL) == ProcessLayout()
    assert lay_out(config(processes=3), CPU, ALL) == ProcessLayout(3, "ddp")
    assert lay_out(config(processes=3), CPU, None) == ProcessLayout(3, "ddp")


@pytest.mark.usefixtures("gpus")
def test_one_process_per_gpu() -> None:
    assert lay_out(config(), AUTO, ALL) == ProcessLayout(3, "fsdp2", "cuda", ("3", "GPU-ab12", "0"))
    assert lay_out(config(strategy="ddp"), AUTO, ALL).strategy == "ddp"
    assert lay_out(config(lora=LoraConfig()), AUTO, ALL).strategy == "ddp"
    assert lay_out(config(processes=2), AUTO, ALL) == ProcessLayout(2, "fsdp2", "cuda", ("3", "GPU-ab12"))


@pytest.mark.usefixtures("gpus")
def test_gpus_are_those_of_the_config() -> None:
    assert lay_out(config(), AUTO, DevicesConfig(gpus=[2, 1])).gpus == ("0", "GPU-ab12")
    assert lay_out(config(), AUTO, DevicesConfig(gpus=[2])) == ProcessLayout(1, "none", "cuda", ("0",))
    assert lay_out(config(), ModelConfig(device="cuda:1"), ALL) == ProcessLayout(1, "none", "cuda", ("GPU-ab12",))
    with pytest.raises(UsageError, match=r"devices\.gpus names GPU 3, but 3 GPU"):
        lay_out(config(), AUTO, DevicesConfig(gpus=[3]))


@pytest.mark.usefixtures("gpus")
def test_without_devices_auto_is_the_first_gpu() -> None:
    assert lay_out(config(), AUTO, None) == ProcessLayout(device="cuda")
    assert lay_out(config(processes=3), AUTO, None).processes == 3


@pytest.mark.usefixtures("gpus")
def test_as_many_gpus_as_the_batch_divides_among() -> None:
    notes: list[str] = []
    layout = lay_out(config(batch_size=16), AUTO, ALL, lambda event, **fields: notes.append(fields["text"]))
    assert layout.gpus == ("3", "GPU-ab12")
    assert notes == [
        "training uses 2 of 3 GPUs: train.batch_size (16) must be a multiple of "
        "train.per_device_train_batch_size (2) × processes"
    ]
    assert lay_out(config(batch_size=2), AUTO, ALL).processes == 1


@pytest.mark.usefixtures("gpus")
def test_note_that_one_process_does_not_shard() -> None:
    notes: list[str] = []
    layout = lay_out(
        config(strategy="fsdp2"), AUTO, DevicesConfig(gpus=[0]), lambda event, **fields: notes.append(fields["text"])
    )
    assert layout.strategy == "none"
    assert notes == ["training runs in one process, so train.strategy=fsdp2 has nothing to shard"]


@pytest.mark.usefixtures("gpus")
def test_more_processes_than_gpus() -> None:
    with pytest.raises(UsageError, match=r"train\.processes is 4, but training can use 3 GPU\(s\)"):
        lay_out(config(processes=4), AUTO, ALL)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_cpu_does_not_shard(strategy: str) -> None:
    with pytest.raises(
        UsageError, match=rf"train\.strategy is {strategy}, which needs GPUs; on the CPU, set it to ddp"
    ):
        lay_out(config(processes=2, strategy=strategy), CPU, ALL)


@pytest.mark.usefixtures("gpus")
def test_zero3_needs_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else original(name, *rest)
    )
    with pytest.raises(UsageError, match=r"DeepSpeed is not installed; add it with: pip install deepspeed$"):
        lay_out(config(strategy="zero3"), AUTO, ALL)


@pytest.mark.usefixtures("gpus", "deepspeed")
def test_zero3() -> None:
    assert lay_out(config(strategy="zero3"), AUTO, ALL) == ProcessLayout(3, "zero3", "cuda", ("3", "GPU-ab12", "0"))


def test_environment_of_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UsageError, match=r"WORLD_SIZE=4.*run dice without a launcher, unset WORLD_SIZE, and set train\.processes"
    ):
        lay_out(config(), CPU, ALL)


# --- the config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["train.batch_size=32", "train.per_device_train_batch_size=4", "train.processes=3"],
            r"batch_size \(32\) must be a multiple of per_device_train_batch_size × processes \(4 × 3\)",
        ),
        (["train.accelerate_config=a.yaml", "train.processes=2"], "leave out processes and strategy"),
        (["train.lora.r=2", "train.strategy=fsdp2"], "set strategy=ddp"),
        (["train.strategy=fsdp"], "'auto', 'ddp', 'fsdp2' or 'zero3'"),
        (["train.processes=0"], "train.processes"),
    ],
)
def test_settings_that_are_rejected(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve([], settings)


def test_how_the_work_is_spread_is_not_in_keys() -> None:
    one, other = config(), config(processes=3, strategy="ddp")
    assert one.key_fields() == other.key_fields() == config(accelerate_config="a.yaml").key_fields()
    assert one.key_fields() != config(learning_rate=1.0).key_fields()
    assert set(one.key_dump()) - set(one.key_fields()) == {"processes", "strategy", "accelerate_config"}


# --- the user's own file --------------------------------------------------------------------------------------


def own(folder: Path, text: str) -> TrainConfig:
    file = folder / "own.yaml"
    file.write_text(text, encoding="utf-8")
    return config(accelerate_config=str(file))


def test_own_file_is_used_as_it_is(tmp_path: Path) -> None:
    settings = own(tmp_path, "num_processes: 2\n")
    layout = lay_out(settings, CPU, ALL)
    assert layout == ProcessLayout(2, "own", own=tmp_path / "own.yaml")
    assert write_accelerate_config(layout, settings, tmp_path / "out") == tmp_path / "own.yaml"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixed_precision: bf16\n", "has no num_processes; use a file that `accelerate config` wrote"),
        ("- 1\n", "must hold a mapping"),
        ("num_processes: '2'\n", "has no num_processes"),
        ("a: [\n", "is not valid YAML"),
        ("num_processes: 8\nnum_machines: 2\n", "is for several machines, but training runs on one"),
        (
            "num_processes: 5\n",
            r"must be a multiple of train\.per_device_train_batch_size × num_processes of .*own\.yaml \(2 × 5",
        ),
    ],
)
def test_own_file_that_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lay_out(own(tmp_path, text), CPU, ALL)


def test_own_file_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=r"train\.accelerate_config: /nowhere\.yaml: config file .* does not exist"):
        lay_out(config(accelerate_config="/nowhere.yaml"), CPU, ALL)


@pytest.mark.usefixtures("gpus")
def test_own_file_for_more_gpus(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is for 4 processes, but training can use 3 GPU"):
        lay_out(own(tmp_path, "num_processes: 4\n"), AUTO, ALL)


# --- checkpoints ----------------------------------------------------------------------------------------------


def test_layouts_that_can_resume_from_each_other(tmp_path: Path) -> None:
    assert ProcessLayout().checkpoints == ProcessLayout(4, "ddp", "cuda").checkpoints  # not sharded
    sharded = [ProcessLayout(n, strategy, "cuda").checkpoints for strategy in ("fsdp2", "zero3") for n in (2, 4)]
    mine, yours = tmp_path / "a.yaml", tmp_path / "b.yaml"
    mine.write_text("num_processes: 2")
    yours.write_text("num_processes: 4")
    owned = [ProcessLayout(2, "own", own=file).checkpoints for file in (mine, yours)]
    assert len({ProcessLayout().checkpoints, *sharded, *owned}) == 7


# --- what accelerate reads ------------------------------------------------------------------------------------


def launcher_arguments(file: Path) -> Any:
    """The arguments of `accelerate launch`, after it has read the file."""
    command = ["--config_file", str(file), "--module", "dice_py.training.launcher", "ADDRESS"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    return arguments


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp2_as_accelerate_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    layout = ProcessLayout(4, "fsdp2", "cuda")
    file = write_accelerate_config(layout, config(gradient_checkpointing=checkpointing), tmp_path)
    assert file == tmp_path / "accelerate.yaml"
    assert load_config_from_file(str(file)).distributed_type == DistributedType.FSDP
    arguments = launcher_arguments(file)
    assert arguments.use_fsdp
    assert arguments.num_processes == 4
    environment = prepare_multi_gpu_env(arguments)
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is checkpointing
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # none


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ddp_as_accelerate_reads_it(tmp_path: Path, device: Any) -> None:
    arguments = launcher_arguments(write_accelerate_config(ProcessLayout(2, "ddp", device), config(), tmp_path))
    assert arguments.multi_gpu  # starts several processes, on the CPU too
    assert not arguments.use_fsdp
    assert not arguments.use_deepspeed
    assert prepare_multi_gpu_env(arguments)["ACCELERATE_MIXED_PRECISION"] == "no"  # model.dtype decides
    assert arguments.main_process_port != 0  # a free one was found


def test_zero3_as_accelerate_reads_it(tmp_path: Path) -> None:
    file = write_accelerate_config(ProcessLayout(2, "zero3", "cuda"), config(), tmp_path)
    assert load_config_from_file(str(file)).distributed_type == DistributedType.DEEPSPEED
    arguments = launcher_arguments(file)
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ",".join(yaml.safe_load(file.read_text())["deepspeed_config"])
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"
    assert Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]) == tmp_path / "zero3.json"


def test_zero3_as_transformers_fills_it_in(tmp_path: Path) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig  # needs no DeepSpeed

    write_accelerate_config(ProcessLayout(2, "zero3", "cuda"), config(), tmp_path)
    text = json.loads((tmp_path / "zero3.json").read_text())
    read = HfDeepSpeedConfig(str(tmp_path / "zero3.json"))
    assert read.is_zero3()
    assert not read.is_offload()
    assert text["zero_optimization"]["overlap_comm"] is True
    # The whole 16-bit model is gathered where it is saved; without it `accelerator.get_state_dict` refuses.
    assert read.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True
    for name in ("bf16.enabled", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert read.get_value(name) == "auto"
