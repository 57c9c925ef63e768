"""Tries an installed wheel without extras: mining in Python and on the command line, and the sentence of `dice run`.

Run by the Python of an environment that has the wheel, in a folder that holds no sources of the project.
"""

import json
import pathlib
import subprocess
import sys

import polars as pl

import dice_py

DICE = str(pathlib.Path(sys.executable).with_name("dice"))


def main() -> None:
    rows = [(p, 0.1 * ((7 * p + 3 * r) % 10) + 0.05 * r, 5 + r) for p in range(20) for r in range(4)]
    frame = pl.DataFrame(rows, schema=["prompt_id", "reward", "response_tokens"], orient="row")
    mined = frame.pipe(dice_py.mine_pairs)
    frame.write_parquet("scored.parquet")
    command = [DICE, "mine", "scored.parquet", "--out", "pairs.parquet", "--json"]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert told["pairs"] == mined.pairs.height > 0, told
    refused = subprocess.run([DICE, "run"], stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 2, refused
    assert "pip install 'dice-align[train]'" in refused.stderr, refused
    print(f"dice-align {dice_py.__version__} at {dice_py.__file__}: {mined.pairs.height} pairs")


if __name__ == "__main__":
    main()
