from typing import Protocol, final

import pyarrow as pa

__all__ = ["MineSummary", "addresses", "mine", "sample"]

class _ArrowStream(Protocol):
    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...

@final
class MineSummary:
    @property
    def alpha(self) -> float | None: ...
    @property
    def alpha_low(self) -> float | None: ...
    @property
    def alpha_high(self) -> float | None: ...
    @property
    def mean_length_gap_before(self) -> float: ...
    @property
    def mean_length_gap_after(self) -> float: ...
    @property
    def curve_alpha(self) -> list[float]: ...
    @property
    def curve_gap(self) -> list[float]: ...
    @property
    def dropped(self) -> list[tuple[str, int]]: ...
    @property
    def dropped_prompts(self) -> list[tuple[str, int]]: ...
    @property
    def prompts(self) -> int: ...
    @property
    def rows(self) -> int: ...

def mine(
    stream: _ArrowStream,
    *,
    debias: str,
    alpha: float | None,
    min_responses: int,
    min_length: int | None,
    max_length: int | None,
    buckets: int,
    bucket_scale: bool,
) -> tuple[pa.RecordBatch, MineSummary]: ...
def addresses(stream: _ArrowStream) -> list[tuple[int, int, int]]: ...
def sample(
    offline: _ArrowStream,
    exclude: _ArrowStream,
    *,
    count: int,
    seed: int,
    stream: int,
) -> tuple[pa.RecordBatch, int]: ...
