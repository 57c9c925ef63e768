"""How long the pair browser takes for a key on a page of 2,000 pairs: `make bench-report`, about a minute.

Makes the pairs of random words, with K candidates and credit of each token, writes their page, and opens it in
Chromium. Each key is pressed many times. Measured are the milliseconds until the page has handled it, and until the
next frame is drawn, which waits up to 17 ms for the screen; and those of the processor, which other work on the machine
changes less. Prints a table and writes results/report_keys.json.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from shapes import machine

from dice_py.reporting.inspect_page import write_inspect_page
from dice_py.storage.files import write_json
from dice_py.storage.schemas import INSPECTED_PAIRS

HERE = Path(__file__).resolve().parent
VOCABULARY = 2000

WAYS = {
    # What is measured: [what is done before, key, target, times].
    "j, next pair": ["", "j", "body", 60],
    "k, previous pair": ["", "k", "body", 60],
    "f, flag": ["", "f", "body", 20],
    "d, difference on or off": ["", "d", "body", 20],
    "j with the difference on": ["d", "j", "body", 60],
    "c, credit on or off": ["d", "c", "body", 20],
    "j with credit on": ["c", "j", "body", 60],
    "Page Down in the list": ["c", "PageDown", "#pair-list", 60],
    "End and Home in the list": ["", "End Home", "#pair-list", 20],
    "a letter in the field": ["", "", "#find-text", 40],
}

MEASURE = """async ([before, keys, target, times]) => {
    const drawn = () => new Promise((resolve) => requestAnimationFrame(() => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = resolve;
        port2.postMessage(0);
    }));
    const press = (key, node) => node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    if (before) press(before, document.body);
    const node = document.querySelector(target);
    const words = "some words of a prompt or of an answer that";
    const found = [];
    for (let i = 0; i < times; i++) {
        await drawn();
        const began = performance.now();
        if (keys) press(keys.split(" ")[i % keys.split(" ").length], node);
        else {
            node.value = words.slice(0, i % words.length);
            node.dispatchEvent(new Event("input", { bubbles: true }));
        }
        const handled = performance.now() - began;
        await drawn();
        found.push([handled, performance.now() - began]);
    }
    return found;
}"""


def made_pairs(count: int, candidates: int, words: int, seed: int) -> pl.DataFrame:
    """Pairs whose candidates are random words of a long-tailed number, one token a word."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(VOCABULARY)]

    def candidate(sample: int) -> dict[str, Any]:
        text = " ".join(draw.choices(vocabulary, k=max(5, int(draw.lognormvariate(0, 0.5) * words))))
        tokens = [" " + word for word in text.split(" ")]
        tokens[0] = tokens[0][1:]
        logps = [-draw.expovariate(0.7) for _ in tokens]
        credit = [
            {"text": token, "logp": logp, "ref_logp": logp - 10 * part, "credit": part}
            for token, logp, part in zip(tokens, logps, [draw.gauss(0, 0.1) for _ in tokens], strict=True)
        ]
        reward = sum(token["credit"] for token in credit)
        made = {"sample_id": sample, "response": text, "reward": reward, "response_tokens": len(tokens)}
        return made | {"credit": credit}

    def pair(number: int) -> dict[str, Any]:
        ranked = sorted((candidate(i) for i in range(candidates)), key=lambda each: -float(each["reward"]))
        row: dict[str, Any] = {
            "pair_id": f"r01-mined-{number}",
            "round": 1,
            "source": "mined",
            "prompt": [{"role": "user", "content": " ".join(draw.choices(vocabulary, k=60))}],
            "margin": ranked[0]["reward"] - ranked[-1]["reward"],
            "labels": None,
            "candidates": [
                {
                    **{name: value for name, value in each.items() if name != "credit"},
                    "penalized_reward": each["reward"],
                    "finish_reason": "stop",
                    "role": {0: "chosen", candidates - 1: "rejected"}.get(place),
                }
                for place, each in enumerate(ranked)
            ],
        }
        for side, each in (("chosen", ranked[0]), ("rejected", ranked[-1])):
            row |= {
                side: [{"role": "assistant", "content": each["response"]}],
                f"{side}_tokens": each["response_tokens"],
                f"{side}_finish_reason": "stop",
                f"{side}_reward": each["reward"],
                f"{side}_penalized_reward": each["reward"],
                f"{side}_credit": each["credit"],
            }
        return row

    return pl.DataFrame([pair(number) for number in range(count)], schema=INSPECTED_PAIRS)


def measured(page: Path, executable: str) -> dict[str, Any]:
    """Milliseconds of each way, and of opening the page."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=arguments)
        window = browser.new_page(viewport={"width": 1400, "height": 900})
        began = time.perf_counter()
        window.goto(page.as_uri())
        window.locator("#pair-name").wait_for()
        opened = time.perf_counter() - began
        devtools = window.context.new_cdp_session(window)
        devtools.send("Performance.enable")

        def processor() -> float:
            """Seconds of the processor that the page's process has used."""
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            return float(next(each["value"] for each in metrics if each["name"] == "ProcessTime"))

        ways, processors = {}, {}
        for name, way in WAYS.items():
            began = processor()
            ways[name] = window.evaluate(MEASURE, way)
            processors[name] = 1000 * (processor() - began) / len(ways[name])
        version = browser.version
        browser.close()
    rows = {
        name: {
            "presses": len(found),
            "handled_median_ms": statistics.median(handled for handled, _ in found),
            "handled_worst_ms": max(handled for handled, _ in found),
            "drawn_median_ms": statistics.median(drawn for _, drawn in found),
            "drawn_worst_ms": max(drawn for _, drawn in found),
            "processor_mean_ms": processors[name],
        }
        for name, found in ways.items()
    }
    return {"chromium": version, "open_seconds": opened, "keys": rows}


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    console = Console()
    heads = ("key", "handled, median", "worst", "drawn, median", "worst", "processor, mean")
    table = Table(*heads, title="milliseconds", box=None)
    for name, row in result["keys"].items():
        names = ("handled_median", "handled_worst", "drawn_median", "drawn_worst", "processor_mean")
        figures = [f"{name}_ms" for name in names]
        table.add_row(name, *(f"{row[figure]:.0f}" for figure in figures))
    console.print(table)
    console.print(
        f"{result['pairs']:,} pairs, {result['bytes'] / 1e6:.1f} MB, written in {result['write_seconds']:.1f} s and "
        f"opened in {result['open_seconds']:.1f} s by Chromium {result['chromium']}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=8, help="of each pair")
    parser.add_argument("--words", type=int, default=200, help="median of a response")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM") or shutil.which("chromium"))
    parser.add_argument("--out", type=Path, default=HERE / "results/report_keys.json")
    given = parser.parse_args(arguments)
    if given.chromium is None:
        parser.error("Chromium is not installed (Debian: apt-get install chromium); --chromium names another")
    with tempfile.TemporaryDirectory() as folder:
        frame = made_pairs(given.pairs, given.candidates, given.words, given.seed)
        began = time.perf_counter()
        page = write_inspect_page(frame, Path(folder) / "page.html", title="Pairs", facts=[])
        seconds = time.perf_counter() - began
        result = {
            "pairs": frame.height,
            "candidates": given.candidates,
            "words": given.words,
            "machine": machine(),
            "bytes": page.stat().st_size,
            "write_seconds": seconds,
            **measured(page, given.chromium),
        }
    show(result)
    write_json(given.out, result)


if __name__ == "__main__":
    main()
