"""GGUF files as models: what is converted, that it is the same model, and what is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from own_run import Events
from tiny_gguf import make_gguf, make_llama_for_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from dice_py.data import Message
from dice_py.errors import DataError, UsageError
from dice_py.models import gguf
from dice_py.models.gguf import converted_model, find_converted, gguf_file
from dice_py.models.sources import resolve_model
from dice_py.models.tokenization import stop_token_ids
from dice_py.storage.files import read_json

MESSAGES: list[Message] = [{"role": "user", "content": "Name 3 fruits, café & all."}]

CONVERTS = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19),
    reason="this version of transformers is refused for GGUF files",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama_for_gguf(tmp_path_factory.mktemp("llama") / "folder", seed=3)


@pytest.fixture(scope="module")
def tiny(llama: Path) -> Path:
    return make_gguf(llama.parent / "tiny.gguf", llama)


def notes(events: Events) -> list[str]:
    return [fields["text"] for event, fields in events.events if event == "note"]


def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([tokens])).logits[0]


@CONVERTS
def test_a_converted_file_is_the_same_model(tiny: Path, llama: Path, cache_folder: Path) -> None:
    events = Events()
    folder = resolve_model(str(tiny), None, role="--policy", report=events)
    assert folder.parent == cache_folder.resolve() / "gguf"
    (note,) = notes(events)
    assert note.startswith("converting tiny.gguf (llama, ")
    assert "F32, as float32" in note
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, llama))
    rendered, expected = (t.apply_chat_template(MESSAGES, tokenize=False) for t in (ours, theirs))
    assert rendered == expected
    tokens = theirs(expected, add_special_tokens=False)["input_ids"]
    assert ours(expected, add_special_tokens=False)["input_ids"] == tokens
    assert ours.decode(tokens) == theirs.decode(tokens)
    torch.testing.assert_close(logits(folder, tokens), logits(llama, tokens), rtol=1e-5, atol=1e-5)


@CONVERTS
def test_a_file_is_converted_once(
    tiny: Path, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted_model(tiny)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    moved = tmp_path / "another name.gguf"
    moved.write_bytes(tiny.read_bytes())
    monkeypatch.setattr(gguf, "require", None)  # nothing that converts is needed again
    events = Events()
    assert converted_model(moved, events) == folder == find_converted(tiny)
    assert notes(events)[0].endswith(f"was converted before: {folder}")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not list(cache_folder.rglob("*.tmp"))


@CONVERTS
def test_a_conversion_that_was_cut_short_is_done_again(tiny: Path, cache_folder: Path) -> None:
    folder = converted_model(tiny)
    (folder / "gguf.json").unlink()
    left = folder.with_name(f".{folder.name}.1.tmp")
    left.mkdir()
    assert find_converted(tiny) is None
    assert converted_model(tiny) == folder == find_converted(tiny)
    assert not left.exists()


@CONVERTS
def test_quantized_weights_are_dequantized(llama: Path, tmp_path: Path, cache_folder: Path) -> None:
    folder = converted_model(make_gguf(tmp_path / "q8.gguf", llama, quantized=True))
    assert read_json(folder / "gguf.json")["dtype"] == "float32"
    model, exact = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, llama))
    largest = max(weight.abs().max() for weight in exact.parameters())
    differences = [
        (ours - theirs).abs().max() for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True)
    ]
    assert 0.0 < max(differences) < largest / 127  # half a step of the coarsest block, and float16 scales


@CONVERTS
def test_a_token_that_ends_a_turn_stops_a_response(llama: Path, tmp_path: Path, cache_folder: Path) -> None:
    file = make_gguf(tmp_path / "eot.gguf", llama, metadata={"tokenizer.ggml.eot_token_id": 2})
    folder = converted_model(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert stop_token_ids(folder, tokenizer) == sorted({2, tokenizer.eos_token_id})


@CONVERTS
def test_weights_that_are_left_out_are_reported(llama: Path, tmp_path: Path, cache_folder: Path) -> None:
    events = Events()
    converted_model(make_gguf(tmp_path / "scaled.gguf", llama, extra="rope_freqs.weight"), events)
    _, note = notes(events)
    assert note.startswith("scaled.gguf: transformers has no place for 16 of the file's ")


@pytest.mark.parametrize("name", ["folder", "org/model", "org/model-GGUF"])
def test_folders_and_ids_are_no_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert gguf_file(name, "--policy") is None


def test_a_file_without_the_suffix_is_taken_by_its_content(tiny: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-1234"
    blob.symlink_to(tiny)
    assert gguf_file(str(blob), "--policy") == blob


# --- what is refused


def refused(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    page = tmp_path / "model.gguf"
    page.write_text("<html>not found</html>")
    text = refused(DataError, lambda: resolve_model(str(page), None, role="--policy"))
    assert text.startswith(f"--policy: {page} is not a GGUF file: it begins with b'<htm'")
    gone = tmp_path / "gone.gguf"
    text = refused(DataError, lambda: resolve_model(str(gone), None, role="--policy"))
    assert f"{gone} does not exist" in text


def test_a_file_that_cannot_be_read() -> None:
    with pytest.raises(DataError, match=r"--policy: /proc/self/mem cannot be read: Input/output error"):
        gguf_file("/proc/self/mem", "--policy")


def test_a_damaged_file(tiny: Path, tmp_path: Path, cache_folder: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:3000])
    text = refused(DataError, lambda: converted_model(cut))
    assert "may be damaged or incomplete" in text
    assert find_converted(cut) is None


@CONVERTS
def test_an_architecture_that_transformers_does_not_know(llama: Path, tmp_path: Path, cache_folder: Path) -> None:
    file = make_gguf(tmp_path / "other.gguf", llama, architecture="grok")
    text = refused(DataError, lambda: converted_model(file))
    assert "cannot convert it to a decoder; its architecture is 'grok'" in text
    assert not list((cache_folder / "gguf").glob("*/*"))


@CONVERTS
def test_weights_that_the_file_lacks_are_not_made_up(llama: Path, tmp_path: Path, cache_folder: Path) -> None:
    file = make_gguf(tmp_path / "lacking.gguf", llama, leave_out="blk.1.ffn_up.weight")
    text = refused(DataError, lambda: converted_model(file))
    assert "1 of the weights" in text
    assert "model.layers.1.mlp.up_proj.weight" in text


def test_one_part_of_several(llama: Path, tmp_path: Path, cache_folder: Path) -> None:
    file = make_gguf(tmp_path / "part.gguf", llama, metadata={"split.count": 3})
    text = refused(DataError, lambda: converted_model(file))
    assert "one of the 3 parts" in text
    assert "llama-gguf-split --merge" in text


def test_without_the_package_gguf(tiny: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    text = refused(UsageError, lambda: converted_model(tiny))
    assert text == "gguf is not installed; add it with: pip install 'dice-align[train]'"


def test_an_older_transformers(tiny: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "5.18.1" if name == "transformers" else version(name)
    )
    text = refused(UsageError, lambda: converted_model(tiny))
    assert "transformers 5.18.1 does not read" in text
    assert "install transformers 5.19 or newer" in text
    assert find_converted(tiny) is None
