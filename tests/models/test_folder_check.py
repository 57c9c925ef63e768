"""Model folders that their small files and headers show to be incomplete or quantized, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from broken_models import WEIGHTS, as_bin, change_config, copy_of, in_shards

from dice_py.errors import DataError
from dice_py.models.folder_check import check_model_folder
from dice_py.models.sources import resolve_model
from dice_py.models.weight_files import first_few, read_header, weight_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 4976698672\n"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return copy_of(llama, tmp_path)


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        resolve_model(str(folder), None, role="--policy")
    assert str(caught.value).startswith("--policy: ")
    return str(caught.value)


def test_a_complete_model(copy: Path) -> None:
    check_model_folder(copy, role="--policy")
    in_shards(copy)
    check_model_folder(copy, role="--policy")
    assert resolve_model(str(copy), None, role="--policy") == copy.resolve()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs(copy: Path, name: str) -> None:
    (copy / name).write_text(POINTER)
    said = refusal(copy)
    assert str(copy / name) in said
    assert "git-lfs" in said


def test_a_pointer_in_place_of_a_shard(copy: Path) -> None:
    shard = in_shards(copy)[1]
    shard.write_text(POINTER)
    assert f"{shard} is a git-lfs pointer" in refusal(copy)


def test_a_pointer_in_place_of_a_binary_file(copy: Path) -> None:
    (as_bin(copy) / "pytorch_model.bin").write_text(POINTER)
    assert "pytorch_model.bin is a git-lfs pointer" in refusal(copy)


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 0.5, -1])
@pytest.mark.parametrize("name", [WEIGHTS, "shard"])
def test_weights_that_are_cut_off(copy: Path, kept: float, name: str) -> None:
    file = in_shards(copy)[1] if name == "shard" else copy / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept) if kept == 0.5 else int(kept)])
    assert str(file) in refusal(copy)


@pytest.mark.parametrize("kept", [0, 1000])
def test_a_binary_file_that_is_cut_off(copy: Path, kept: int) -> None:
    file = as_bin(copy) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in refusal(copy)


def test_bytes_after_the_weights(copy: Path) -> None:
    with (copy / WEIGHTS).open("ab") as handle:
        handle.write(b"\0")
    assert f"{copy / WEIGHTS} is damaged" in refusal(copy)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
        [],
        7,
    ],
)
def test_headers_that_lie(copy: Path, entry: Any) -> None:
    header = json.dumps({"w": entry}).encode()
    (copy / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert f"{copy / WEIGHTS} is not a complete safetensors file" in refusal(copy)


def test_a_missing_shard(copy: Path) -> None:
    in_shards(copy)[1].unlink()
    said = refusal(copy)
    assert "lacks 1 of the 2 files of weights" in said
    assert "model-00002-of-00002.safetensors" in said


@pytest.mark.parametrize("content", ['{"weight_map": {', "[]", "{}", '{"weight_map": []}', POINTER])
def test_an_index_that_is_none(copy: Path, content: str) -> None:
    in_shards(copy)
    (copy / INDEX).write_text(content)
    assert f"{copy / INDEX} is not a complete index of weights" in refusal(copy)


def test_an_index_of_other_tensors(copy: Path) -> None:
    first, _ = in_shards(copy)
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.absent.weight"] = first.name
    (copy / INDEX).write_text(json.dumps(index))
    assert f"{first} lacks 1 of the tensors that {INDEX} places there (model.absent.weight)" in refusal(copy)


def test_an_index_that_names_files_elsewhere(copy: Path) -> None:
    in_shards(copy)
    (copy / INDEX).write_text(json.dumps({"weight_map": {"w": "../other.safetensors"}}))
    assert "outside of its folder" in refusal(copy)


def test_shards_without_an_index(copy: Path) -> None:
    in_shards(copy)
    (copy / INDEX).unlink()
    assert "what belongs to the model is not known" in refusal(copy)


def test_weights_twice(copy: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    in_shards(copy)
    (copy / WEIGHTS).write_bytes(whole)
    assert "holds weights twice" in refusal(copy)


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "lla', "[1]", "null", '"llama"', "\udcff", "[" * 5000])
def test_a_config_that_is_no_object(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content, errors="surrogateescape")
    assert f"{copy / 'config.json'} " in refusal(copy)


@pytest.mark.parametrize("kind", [None, 7, ["llama"]])
def test_no_model_type(copy: Path, kind: Any) -> None:
    assert "config.json has no model_type" in refusal(change_config(copy, model_type=kind))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "no method is named"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {}}, "quantized"),
        ({"compression_config": {"format": "int-quantized"}}, "quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}}, "bitsandbytes"),
    ],
)
def test_quantized_configs(copy: Path, changes: dict[str, Any], word: str) -> None:
    said = refusal(change_config(copy, **changes))
    assert "quantized model" in said
    assert word in said


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantized_folders(copy: Path, name: str) -> None:
    (copy / name).write_text("{}")
    assert f"{name}: a quantized model" in refusal(copy)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I32"])
def test_quantized_weights(copy: Path, dtype: str) -> None:
    width = 4 if dtype == "I32" else 1
    entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * width]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": entry}).encode()
    (copy / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4 * width)
    assert f"up_proj.weight is stored as {dtype}: a quantized model" in refusal(copy)


def test_a_folder_in_place_of_a_file(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).mkdir()
    assert WEIGHTS in refusal(copy)


def test_headers_are_read_in_the_order_of_the_file(copy: Path) -> None:
    (file,) = weight_files(copy)
    tensors = list(read_header(file).values())
    assert [one.end for one in tensors[:-1]] == [one.start for one in tensors[1:]]
    assert tensors[-1].end == file.stat().st_size


def test_first_few() -> None:
    assert first_few(["a"]) == "a"
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.parametrize("inside", ["checkpoint-500", "snapshots/0f3a", "final/adapter_config.json"])
def test_a_folder_around_a_model(copy: Path, tmp_path: Path, inside: str) -> None:
    """A trainer's output folder, or a model's folder in the hub's cache."""
    outer = tmp_path / "outer"
    outer.mkdir()
    assert refusal(outer).endswith("Hugging Face layout")
    folder = outer / inside.removesuffix("/adapter_config.json")
    folder.parent.mkdir(exist_ok=True)
    copy.rename(folder)
    if inside.endswith(".json"):
        (folder / "config.json").rename(outer / inside)
    assert refusal(outer).endswith(f"; give one that it holds: {folder.relative_to(outer)}")


@pytest.mark.parametrize("name", ["m" * 300, f"{'m' * 300}.gguf", f"./{'m' * 5000}"])
def test_a_name_that_is_too_long_for_a_file(name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be a path \(File name too long\); give a shorter one"):
        resolve_model(name, None, role="--policy")


def test_numbers_that_json_does_not_have(copy: Path) -> None:
    file = copy / "config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "rms_norm_eps": float("nan")}))
    assert f"{file} is not complete JSON (it has the number NaN)" in refusal(copy)
    file.write_text(json.dumps({**whole, "time_step_limit": [0.0, float("inf")]}))  # as Mamba 2's has it
    check_model_folder(copy, role="--policy")


@pytest.mark.parametrize("gone", ["config.json", WEIGHTS, "generation_config.json", "tokenizer.json", "*"])
def test_a_copy_of_a_cache_whose_links_lead_nowhere(copy: Path, gone: str) -> None:
    blobs, folder = copy.parent / "blobs", copy.parent / "snapshots" / "0f3a"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(copy.iterdir())):
        file.rename(blobs / f"{number}")
        (folder / file.name).symlink_to(f"../../blobs/{number}")
    check_model_folder(folder, role="--policy")
    for file in folder.glob(gone):
        file.resolve().unlink()
    said = refusal(folder)
    assert f"{folder}: " in said
    assert "to what is not there (../../blobs/" in said
    assert "(cp -rL)" in said


def test_a_link_to_nothing_that_is_not_read(copy: Path) -> None:
    for name in ("README.md", "pytorch_model.bin", "optimizer.pt"):
        (copy / name).symlink_to("../../blobs/0f3a")
    check_model_folder(copy, role="--policy")


def test_an_index_without_metadata(copy: Path) -> None:
    in_shards(copy)
    content = json.loads((copy / INDEX).read_text())
    del content["metadata"]
    (copy / INDEX).write_text(json.dumps(content))
    assert 'has no object "metadata", without which transformers loads no weights: add one, {}' in refusal(copy)
