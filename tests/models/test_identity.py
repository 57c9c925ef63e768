"""What is the same model, and when its files are read again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broken_models import WEIGHTS, as_bin, change_config, copy_of, in_shards
from safetensors.torch import load_file, save_file

from dice_py.models import weight_records
from dice_py.models.identity import model_identity


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return copy_of(llama, tmp_path)


@pytest.fixture
def large(copy: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> Path:
    """A model whose weights count as large, and were written long ago."""
    monkeypatch.setattr(weight_records, "SMALL", 0)
    monkeypatch.setattr(weight_records, "SETTLED_NS", -(10**18))
    return copy


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files of weights that are read."""
    read: list[str] = []
    real = weight_records.read_header

    def read_header(file: Path) -> object:
        read.append(file.name)
        return real(file)

    monkeypatch.setattr(weight_records, "read_header", read_header)
    return read


def test_names_times_and_logs_are_no_part_of_it(llama: Path, copy: Path) -> None:
    identity = model_identity(llama)
    assert model_identity(copy) == identity
    os.utime(copy / WEIGHTS)
    for name in ("train_log.json", "dice.json", "README.md", "training_args.bin", "packing.json"):
        (copy / name).write_text(str(time.time()))
    renamed = copy.rename(copy.with_name("renamed"))
    assert model_identity(renamed) == identity
    change_config(renamed, _name_or_path="/elsewhere", transformers_version="4.0.0")
    assert model_identity(renamed) == identity


@pytest.mark.parametrize("reverse", [False, True])
def test_another_sharding_or_order_is_the_same_model(llama: Path, copy: Path, reverse: bool) -> None:
    in_shards(copy, reverse)
    assert model_identity(copy) == model_identity(llama)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_each_file_that_counts(llama: Path, copy: Path, name: str) -> None:
    content = (copy / name).read_text()
    (copy / name).write_text(content.replace("{", '{"a": 1, ', 1) if name.endswith("n") else content + " ")
    assert model_identity(copy) != model_identity(llama)


def test_code_counts(llama: Path, copy: Path) -> None:
    (copy / "modeling.py").write_text("")
    assert model_identity(copy) != model_identity(llama)


@pytest.mark.parametrize("binary", [False, True])
def test_a_flipped_bit_is_another_model(copy: Path, binary: bool) -> None:
    file = (as_bin(copy) / "pytorch_model.bin") if binary else copy / WEIGHTS
    identity, times = model_identity(copy), file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_identity(copy) != identity


def test_values_that_change_places(llama: Path, copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, copy / WEIGHTS)
    assert model_identity(copy) != model_identity(llama)


def test_what_is_incomplete_has_an_identity_too(copy: Path) -> None:
    whole = model_identity(copy)
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:1000])
    cut = model_identity(copy)
    (copy / WEIGHTS).unlink()
    assert len({whole, cut, model_identity(copy)}) == 3


def test_weights_are_read_once(large: Path, reads: list[str]) -> None:
    identity = model_identity(large)
    assert model_identity(large) == identity
    weight_records.forget()  # as in another process
    assert model_identity(large) == identity
    assert reads == [WEIGHTS]


def test_a_changed_file_is_read_again(large: Path, reads: list[str]) -> None:
    identity, times = model_identity(large), (large / WEIGHTS).stat()
    content = bytearray((large / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (large / WEIGHTS).write_bytes(content)
    os.utime(large / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `touch -r`, or a copy that keeps times
    assert model_identity(large) != identity
    assert len(reads) == 2


def test_a_file_that_was_just_written_is_not_kept(
    large: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    """Another write within the clock's grain would leave the same times."""
    monkeypatch.setattr(weight_records, "SETTLED_NS", 10**18)
    assert model_identity(large) == model_identity(large)
    assert len(reads) == 2
    assert not (cache_folder / "weights").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stamp": 1}', "null"])
def test_a_damaged_cache_is_no_fault(large: Path, cache_folder: Path, content: str) -> None:
    identity = model_identity(large)
    weight_records.forget()
    for file in (cache_folder / "weights").iterdir():
        file.write_text(content)
    assert model_identity(large) == identity


def test_without_torch(copy: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dice_py.models.identity import model_identity;"
        "print(model_identity(Path(sys.argv[1]))); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, copy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == model_identity(copy)


def test_a_copy_with_the_shell(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, tmp_path / "again", copy_function=shutil.copyfile)
    assert model_identity(tmp_path / "again") == model_identity(copy)
