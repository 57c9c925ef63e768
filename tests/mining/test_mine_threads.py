"""The miner beside other threads: the same pairs, and the interpreter is released."""

from __future__ import annotations

import sys
import threading
import time

from mine_data import frame

import dice_py
from dice_py import mine_pairs
from dice_py.config.mining import MiningOptions
from dice_py.mining.options import native_keywords


def test_threads_agree() -> None:
    data = frame(prompts=2000)
    expected = mine_pairs(data)
    results: list[dice_py.MinedPairs] = []
    threads = [threading.Thread(target=lambda: results.append(mine_pairs(data))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(mined.pairs.equals(expected.pairs) and mined.alpha == expected.alpha for mined in results)


def test_other_threads_run_meanwhile() -> None:
    """The interpreter is released: another thread runs while Rust works.

    With a switch interval of a minute, it only runs when the interpreter is released.
    """
    stream = (
        frame(prompts=400_000).select(prompt="prompt_id", reward="reward", length="response_tokens").to_struct("rows")
    )
    options = native_keywords(MiningOptions())
    turns, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            turns[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    thread = threading.Thread(target=count)
    try:
        thread.start()
        most = 0
        for _ in range(20):
            before = turns[0]
            dice_py._native.mine(stream, options)
            most = max(most, turns[0] - before)
            if most > 100:
                break
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert most > 100
