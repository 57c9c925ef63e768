"""Extrapolates a training: θ₁ + α·(θ₁ − θ₀), of the weights θ₀ before it and θ₁ after it.

ExPO (Zheng et al., arXiv 2404.16792): a training that moved the weights a little way is carried on in the
same direction, without any gradient. α = 0 gives the weights after the training, α = −1 those before it.

Weights are read and written in parts of a million values, so neither model is ever in memory. The files are those
of the model after the training, shard by shard, with the same names, shapes and dtypes. Sums are in float32, or in
float64 where a weight is stored in it. Buffers and integers are not trained, and are copied.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.bin_weights import bin_records, bin_tensors
from dice_py.models.checkpoint import described_model
from dice_py.models.rounding import Change, ChangeSum
from dice_py.models.weight_files import (
    STORED_BYTES,
    first_few,
    is_old_buffer,
    read_header,
    weight_files,
    without_wrapper,
)
from dice_py.models.weight_names import is_of_another_part
from dice_py.models.weight_records import TensorRecord, stored_parts, tensor_records

if TYPE_CHECKING:
    import torch

PART = 2**20
"""Values of each of the two models in memory at a time."""
_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class NotFiniteError(DataError):
    """An extrapolated weight is NaN or infinite (exit code 3): α is too large for the weights' dtype."""


@dataclass(frozen=True)
class StoredWeight:
    """A tensor in a file of a model's weights."""

    file: Path
    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]

    @property
    def record(self) -> TensorRecord:
        """What a pass over its values found. A file's result is kept in the cache."""
        records = bin_records(self.file) if self.file.suffix == ".bin" else tensor_records(self.file)
        return records[self.name]

    def parts(self) -> Iterator[torch.Tensor]:
        """Its bytes in order, (bytes of up to `PART` values,) uint8.

        Raises:
            DataError: the file ends too early.
        """
        import torch

        size = PART * STORED_BYTES[self.dtype]
        if self.file.suffix == ".bin":
            tensor = bin_tensors(self.file, "cpu")[self.name].detach().flatten()
            for part in tensor.split(PART):
                yield part.contiguous().view(torch.uint8)
            return
        tensor_at = read_header(self.file)[self.name]
        with self.file.open("rb") as handle:
            for part in stored_parts(handle, self.file, self.name, tensor_at, size):
                yield torch.from_numpy(part)


@dataclass(frozen=True)
class Extrapolation:
    """Which weight of START goes into which of AFTER, file by file."""

    start: Path
    after: Path
    files: dict[Path, list[tuple[StoredWeight, StoredWeight | None]]]
    """For each file of AFTER its tensors, in the order of their values, with START's; None: the tensor is copied."""

    @property
    def copied(self) -> int:
        """The number of tensors that are copied at every α: buffers and integers."""
        return sum(source is None for pairs in self.files.values() for _, source in pairs)

    @property
    def tensors(self) -> int:
        """The number of tensors."""
        return sum(len(pairs) for pairs in self.files.values())


def plan_extrapolation(start: Path, after: Path, models: ModelConfig) -> Extrapolation:
    """Finds START's weight for each of AFTER's. No values are read, but of weights that one of the two ties.

    A head that START ties to its embeddings, and AFTER does not, starts from the embeddings.

    Args:
        start, after: folders that `check_checkpoint` accepts.
        models: whether code of the models may run.

    Raises:
        DataError: a weight that only one of the two has, or that has another shape; or AFTER ties two weights that
            differ in START.
    """
    held, files = _stored(start), _stored(after)
    sources = {without_wrapper(weight.name): weight for weights in held.values() for weight in weights}
    ours = {without_wrapper(weight.name): weight for weights in files.values() for weight in weights}
    tied, buffers = _ties_and_buffers(after, models)
    tied_in_start, buffers_of_start = _ties_and_buffers(start, models)

    def source_of(name: str) -> StoredWeight | None:
        return next((sources[each] for each in (name, *_partners(name, tied_in_start)) if each in sources), None)

    pairs: dict[Path, list[tuple[StoredWeight, StoredWeight | None]]] = {}
    lacking = []
    for file, weights in files.items():
        pairs[file] = []
        for weight in weights:
            name = without_wrapper(weight.name)
            is_copied = weight.dtype not in _FLOATS or name in buffers or is_old_buffer(weight.name)
            source = None if is_copied else source_of(name)
            if source is None and not is_copied and not is_of_another_part(after, weight.name):
                lacking.append(weight.name)
            if source is not None:
                _check_pair(weight, source, after, start)
            pairs[file].append((weight, source))
    _refuse_one_sided(lacking, after, start)
    unknown = [
        weight.name
        for name, weight in sources.items()
        if name not in ours and not _partners(name, tied) & ours.keys() and name not in buffers_of_start
    ]
    _refuse_one_sided([name for name in unknown if not is_of_another_part(start, name)], start, after)
    for name, other in tied.items():
        _check_tied(source_of(name), source_of(other), start, after)
    return Extrapolation(start, after, pairs)


def _stored(folder: Path) -> dict[Path, list[StoredWeight]]:
    """The tensors of each file of weights."""
    files: dict[Path, list[StoredWeight]] = {}
    for file in weight_files(folder):
        if file.suffix == ".bin":
            found = [(name, each.dtype, tuple(each.shape)) for name, each in bin_records(file).items()]
        else:
            found = [(name, each.dtype, each.shape) for name, each in read_header(file).items()]
        files[file] = [StoredWeight(file, *each) for each in found]
    return files


def _ties_and_buffers(folder: Path, models: ModelConfig) -> tuple[dict[str, str], set[str]]:
    """The names that a model ties to others, with those; and the names of its buffers."""
    model = described_model(folder, models)
    tied = {without_wrapper(name): without_wrapper(other) for name, other in model.all_tied_weights_keys.items()}
    return tied, {without_wrapper(name) for name, _ in model.named_buffers()}


def _partners(name: str, tied: dict[str, str]) -> set[str]:
    """The other names of a weight."""
    root = tied.get(name, name)
    return {root, *(each for each, other in tied.items() if other == root)} - {name}


def _refuse_one_sided(names: list[str], has: Path, lacks: Path) -> None:
    if names:
        raise DataError(
            f"{has} has {len(names)} weights that {lacks} lacks ({first_few(names)}), so that the change of these is "
            "not known; give the model that the training started from, and the one that it ended with"
        )


def _check_pair(weight: StoredWeight, source: StoredWeight, after: Path, start: Path) -> None:
    if weight.shape != source.shape:
        raise DataError(
            f"{weight.name} has the shape {list(weight.shape)} in {after} and {list(source.shape)} in {start}; give "
            "the model that the training started from, with the same shapes (and as many rows of tokens)"
        )
    if source.dtype not in _FLOATS:
        raise DataError(f"{source.name} is stored as {source.dtype} in {start}; give a model of floating-point weights")


def _check_tied(one: StoredWeight | None, other: StoredWeight | None, start: Path, after: Path) -> None:
    """Refuses two weights that AFTER holds as one tensor: one tensor has one start."""
    if one is None or other is None or one == other:
        return
    values = [(each.dtype, each.record.digest) for each in (one, other)]
    if values[0] != values[1]:
        raise DataError(
            f"{one.name} and {other.name} are two weights in {start}, and one (tie_word_embeddings) in {after}, so "
            "that its change is not known; give the model that the training started from, or two that are tied alike"
        )


def write_extrapolated(
    plan: Extrapolation, folder: Path, alpha: float, report: Report = no_report, *, stage: str = "extrapolation"
) -> Change:
    """Writes θ₁ + α·(θ₁ − θ₀) into a folder as safetensors, with AFTER's sharding; pytorch_model*.bin is converted.

    Args:
        folder: is there. Files of the same names are replaced.
        alpha: a finite number.
        report: receives a `progress` event for each tensor, as of `stage`.

    Returns:
        The change α·(θ₁ − θ₀), and what rounding to AFTER's dtypes leaves of it.

    Raises:
        UsageError: α is not finite.
        NotFiniteError: a weight would be NaN or infinite.
    """
    if not math.isfinite(alpha):
        raise UsageError(f"alpha is {alpha}; give a finite number, such as 0.3")
    change, done = ChangeSum(), 0
    names = _names_out(list(plan.files))
    for file, pairs in plan.files.items():
        header, ordered = _header(file, pairs)
        with (folder / names[file]).open("wb") as handle:
            handle.write(header)
            for weight, source in ordered:
                _write_weight(handle, weight, source if alpha else None, alpha, change)
                done += 1
                report("progress", stage=stage, done=done, total=plan.tensors, unit="tensors")
    if len(plan.files) > 1 or _WHOLE not in names.values():
        _write_index(plan, folder, names)
    return change.total()


def _names_out(files: list[Path]) -> dict[Path, str]:
    """The names of the files that are written: those of AFTER, or those of transformers for pytorch_model*.bin."""
    if files[0].suffix == ".safetensors":
        return {file: file.name for file in files}
    if len(files) == 1:
        return {files[0]: _WHOLE}
    return {file: f"model-{at:05d}-of-{len(files):05d}.safetensors" for at, file in enumerate(files, start=1)}


def _header(
    file: Path, pairs: list[tuple[StoredWeight, StoredWeight | None]]
) -> tuple[bytes, list[tuple[StoredWeight, StoredWeight | None]]]:
    """The header of a safetensors file with these tensors, and the tensors in the order of their values."""
    if file.suffix == ".safetensors":
        with file.open("rb") as handle:
            length = handle.read(8)
            return length + handle.read(struct.unpack("<Q", length)[0]), pairs
    # As safetensors does it: wide types first, so that all values are aligned.
    ordered = sorted(pairs, key=lambda pair: (-STORED_BYTES[pair[0].dtype], pair[0].name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for weight, _ in ordered:
        end = at + math.prod(weight.shape) * STORED_BYTES[weight.dtype]
        entries[weight.name] = {"dtype": weight.dtype, "shape": list(weight.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, ordered


def _write_weight(
    handle: BinaryIO, weight: StoredWeight, source: StoredWeight | None, alpha: float, change: ChangeSum
) -> None:
    """Writes a weight part by part. Without a source it is copied."""
    import torch

    if source is None:
        for part in weight.parts():
            handle.write(part.numpy().data)
        return
    dtype, dtype_of_start = (getattr(torch, _FLOATS[each.dtype]) for each in (weight, source))
    precise = torch.float64 if torch.float64 in (dtype, dtype_of_start) else torch.float32
    for part, part_of_start in zip(weight.parts(), source.parts(), strict=True):
        after = part.view(dtype).to(precise)
        result = after + alpha * (after - part_of_start.view(dtype_of_start).to(precise))
        stored = result.to(dtype)
        if not bool(stored.isfinite().all()):
            raise NotFiniteError(
                f"{weight.name} would be NaN or infinite in {str(dtype).removeprefix('torch.')} at alpha {alpha:g}; "
                "lower alpha"
            )
        change.add(after, result, dtype)
        handle.write(stored.view(torch.uint8).numpy().data)


def _write_index(plan: Extrapolation, folder: Path, names: dict[Path, str]) -> None:
    """The index that transformers finds the shards by."""
    weights = {weight.name: names[file] for file, pairs in plan.files.items() for weight, _ in pairs}
    size = sum(
        math.prod(weight.shape) * STORED_BYTES[weight.dtype] for pairs in plan.files.values() for weight, _ in pairs
    )
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weights.items()))}
    (folder / _INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
