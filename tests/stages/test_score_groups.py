"""The scoring stage over two processes: the files of one process, and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tiny_stage import BETA, KEYS, Stage

from dice_py.config.shared import DevicesConfig
from dice_py.errors import DataError
from dice_py.storage.parquet import parquet_key, parquet_meta

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_folder", "release_models")]

TWO = DevicesConfig(cpu_processes=2)


@pytest.fixture
def run(llama: Path, other: Path, tmp_path: Path) -> Stage:
    return Stage(llama, other, tmp_path)


def test_two_processes_give_the_files_of_one(run: Stage, tmp_path: Path) -> None:
    """Shards of this policy and of another: the gate, and a pass of each model over the groups."""
    here = tmp_path / "here"
    run(out=here)
    want = [pl.read_parquet(here / file.name) for file in run.files]
    run.came_with(want[0]["logp"].to_list(), [None] * 4)
    made = run(devices=TWO, sampled=(True, False))
    assert made.gate is not None
    assert (made.gate["passed"], made.gate["responses"]) == (True, 4)
    assert made.files == [*run.files, run.out / "gate.json"]
    for file, expected, key in zip(run.files, want, KEYS, strict=True):
        scores = pl.read_parquet(file)
        assert scores.schema == expected.schema
        np.testing.assert_allclose(scores.to_numpy(), expected.to_numpy(), atol=1e-4)
        assert parquet_key(file) == key
        assert parquet_meta(file)["beta"] == BETA
    assert set(run.of("group", "status")) == {"started"}
    assert sorted(run.of("throughput", "model")) == ["policy", "reference", "reference"]
    assert run.of("progress", "done")[-1] == run.of("progress", "total")[-1] == 2 * 9
    left = {file.name for file in run.out.iterdir() if file.suffix != ".log"}
    assert left == {"gate.json", *(file.name for file in run.files)}


@pytest.mark.long
def test_error_of_a_shard_comes_from_its_process(run: Stage) -> None:
    run.frames[1] = pl.DataFrame({"prompt_token_ids": [[7]], "token_ids": [[999]]}, schema=run.frames[1].schema)
    run.write()
    with pytest.raises(DataError, match="the token id 999 in row 0, which is outside the model's vocabulary"):
        run(devices=TWO)
    assert set(run.of("group", "status")) == {"started"}
    assert not any(file.exists() for file in run.files)
