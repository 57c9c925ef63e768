"""Whether two model folders hold the same model, or two that have nothing to do with each other, by their weights.

Models of the same weights give rewards of 0. Models of which one was trained from the other have weights that point in
nearly the same direction; those of two models that were initialized apart do not. Imports no torch, but for
pytorch_model*.bin.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.errors import UsageError
from dice_py.events import Report, no_report
from dice_py.models.bin_weights import bin_records, bin_values
from dice_py.models.identity import MERGED_STAMP, model_identity
from dice_py.models.weight_files import is_old_buffer, read_header, weight_files, without_wrapper
from dice_py.models.weight_records import TensorRecord, tensor_records
from dice_py.storage.integrity import MODEL_STAMP, read_stamp

if TYPE_CHECKING:
    import numpy as np

UNRELATED = 0.2
"""A cosine below it is of models that share no history. By chance it is about 1/√(number of values), below 0.05."""

_SAMPLED_TENSORS, _SAMPLED_VALUES = 16, 4096
_PART = 2**22  # values that are compared at a time
_FLOATS = ("F64", "F32", "BF16", "F16")
_BY_TOKEN = re.compile(r"embed|lm_head|wte|wpe|word_embeddings|output\.weight$")


def check_distinct(policy: Path, reference: Path, *, allowed: bool, report: Report = no_report) -> None:
    """Refuses a policy and a reference with the same weights.

    Args:
        allowed: `score.allow_same_model`; a warning is reported instead, as a note.

    Raises:
        UsageError: the weights are the same, in the same or another sharding, order or float type.
        DataError: a file of weights is incomplete.
    """
    if policy.resolve() == reference.resolve() or have_same_weights(
        policy, reference, rounded=not _is_start(reference, policy)
    ):
        text = f"policy and reference are the same model ({policy} and {reference}), so that every reward is 0"
        if not allowed:
            raise UsageError(
                f"{text}; give as reference the model that the policy's DPO training started from, or ask for it "
                "with --set score.allow_same_model=true"
            )
        report("note", text=f"warning: {text}")


def warn_of_unrelated(policy: Path, reference: Path, report: Report) -> None:
    """Reports a warning, as a note, where policy and reference share no history.

    Raises:
        DataError: a file of weights is incomplete.
    """
    if policy.resolve() == reference.resolve():
        return
    cosine = weights_cosine(policy, reference)
    if cosine is None:
        how = "they have no matrix of the same name and shape"
    elif cosine < UNRELATED:
        how = f"the mean cosine of their weight matrices is {cosine:.2f}, where it is near 1 for a model and its start"
    else:
        return
    report(
        "note",
        text=f"warning: policy and reference seem to share no history: {how}; rewards then measure how the two models "
        "differ, not what the policy's training preferred. The reference is the model that the policy's DPO training "
        "started from",
    )


def have_same_weights(first: Path, second: Path, *, rounded: bool = True) -> bool:
    """True if two folders hold the same values, whatever their sharding, order, names' prefix, float type or padding.

    Args:
        rounded: whether values are the same too that rounding to the other's float type makes the same.
    """
    one, other = _stored(first), _stored(second)
    # As sets, since tied weights may be stored once or twice.
    values = [{_value(each) for each in side.values()} for side in (one, other)]
    if values[0] == values[1]:
        return True
    common = one.keys() & other.keys()
    for side in (one, other):
        kept = {_value(side[name]) for name in common}
        if any(_value(side[name]) not in kept for name in side.keys() - common):
            return False  # not a second copy of tied weights
    if not common or not all(_comparable(name, one[name], other[name]) for name in common):
        return False
    # Stored in another type: equal if one side, rounded to the other's type, is the other.
    return all(
        _equal(one[name], other[name], count, rounded=rounded) for count in (_SAMPLED_VALUES, None) for name in common
    )


def _is_start(reference: Path, policy: Path) -> bool:
    """Whether `dice train` or the merge of an adapter made the policy from the reference.

    Both save an update in float32 that rounding would take away, so that rounded weights say nothing of such a policy.
    """
    starts = [stamp.get("start") for name in (MODEL_STAMP, MERGED_STAMP) if (stamp := read_stamp(policy, name))]
    return any(start is not None and start == model_identity(reference) for start in starts)


def weights_cosine(first: Path, second: Path) -> float | None:
    """The mean cosine of weight matrices of two models, from values in the middle of up to 16 of them.

    Embeddings and heads are left out: models of other histories agree on what is frequent.

    Returns:
        None if no matrix has the same name and shape in both.
    """
    import numpy as np

    one, other = _stored(first), _stored(second)
    names = [name for name in sorted(one.keys() & other.keys()) if _is_matrix(name, one[name], other[name])]
    if not names:
        return None
    step = max(1, len(names) // _SAMPLED_TENSORS)
    cosines = []
    for name in names[::step][:_SAMPLED_TENSORS]:
        a, b = (each[name].values(_SAMPLED_VALUES).astype(np.float64) for each in (one, other))
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        if norm:
            cosines.append(float(a @ b) / norm)
    return sum(cosines) / len(cosines) if cosines else None


@dataclass(frozen=True)
class _Stored:
    """A tensor on disk."""

    file: Path
    name: str
    record: TensorRecord

    def values(self, count: int | None, start: int | None = None) -> np.ndarray:
        """`count` values as f32, from `start` or from the middle; None: all."""
        size = math.prod(self.record.shape)
        count = size if count is None else min(count, size)
        start = (size - count) // 2 if start is None else start
        if self.file.suffix == ".bin":
            return bin_values(self.file, self.name, start, count)
        return _read(self.file, self.name, start, min(count, size - start))


def _stored(folder: Path) -> dict[str, _Stored]:
    """The tensors of a folder, by their names without the prefix of a wrapper; without buffers of older versions."""
    tensors: dict[str, _Stored] = {}
    for file in weight_files(folder):
        records = bin_records(file) if file.suffix == ".bin" else tensor_records(file)
        tensors |= {
            without_wrapper(name): _Stored(file, name, record)
            for name, record in records.items()
            if not is_old_buffer(name)
        }
    return tensors


def _value(stored: _Stored) -> tuple[Any, ...]:
    return tuple(stored.record.shape), stored.record.digest


def _comparable(name: str, one: _Stored, other: _Stored) -> bool:
    """Whether two tensors have one shape, or are embeddings or heads of which one has more rows: padding."""
    shapes = one.record.shape, other.record.shape
    return shapes[0] == shapes[1] or (bool(_BY_TOKEN.search(name)) and shapes[0][1:] == shapes[1][1:])


def _is_matrix(name: str, one: _Stored, other: _Stored) -> bool:
    shape = one.record.shape
    embeds = _BY_TOKEN.search(name)
    floats = one.record.dtype in _FLOATS and other.record.dtype in _FLOATS
    return len(shape) >= 2 and math.prod(shape) >= 256 and other.record.shape == shape and floats and not embeds


def _read(file: Path, name: str, start: int, count: int) -> np.ndarray:
    import numpy as np

    tensor = read_header(file)[name]
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype]
    width = np.dtype(kind).itemsize
    with file.open("rb") as handle:
        handle.seek(tensor.start + start * width)
        raw = np.fromfile(handle, kind, count)
    if tensor.dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def _equal(one: _Stored, other: _Stored, count: int | None, *, rounded: bool) -> bool:
    """Whether two tensors are equal in the rows that both have, maybe up to rounding; `count` values, or all."""
    import numpy as np

    types = one.record.dtype, other.record.dtype
    same_shape = one.record.shape == other.record.shape
    if types[0] == types[1] and same_shape:
        return one.record.digest == other.record.digest
    if not set(types) <= set(_FLOATS):
        return False

    def equal(a: np.ndarray, b: np.ndarray) -> bool:
        if not rounded:
            return np.array_equal(a, b)
        return np.array_equal(_rounded(a, types[1]), b) or np.array_equal(a, _rounded(b, types[0]))

    size = min(math.prod(one.record.shape), math.prod(other.record.shape))  # of the rows that both have
    if count is not None:
        start = (size - min(count, size)) // 2
        return equal(one.values(min(count, size), start), other.values(min(count, size), start))
    parts = ((min(_PART, size - at), at) for at in range(0, size, _PART))
    return all(equal(one.values(length, at), other.values(length, at)) for length, at in parts)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """f32 values rounded to a type, to the nearest and then to even, as f32."""
    import numpy as np

    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values
