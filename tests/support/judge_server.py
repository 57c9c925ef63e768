"""A real vLLM server on loopback with a tiny model that can judge, started and killed by tests."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny_models import make_llama, make_tokenizer

MODEL = "tiny-judge"
POSITIONS = 4096
_START_SECONDS = 240.0  # half a minute alone, and several times that on a busy machine


def make_judge(folder: Path) -> Path:
    """A tiny Llama whose next token is often A or B, so that its log-probabilities hold a verdict."""
    make_llama(folder, max_position_embeddings=POSITIONS)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for letter in "AB":
        # Coordinate 0 of the residual stream is about the same for every token (support/tiny_models.py).
        weights["lm_head.weight"][make_tokenizer("chatml").convert_tokens_to_ids(letter), 0] += 4.0
    save_file(weights, file, {"format": "pt"})
    return folder


class JudgeServer:
    """vLLM's OpenAI-compatible server with one model, in a group of processes of its own.

    Args:
        model: folder of the model, which is served as `MODEL`.
        key: that requests must carry.
        log: its output.
    """

    def __init__(self, model: Path, key: str, log: Path) -> None:
        self._model, self._key, self._log = model, key, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Starts it at the same port as before, and waits until it answers."""
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_API_KEY": self._key,
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model)]
        command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        command += ["--dtype", "float32", "--max-model-len", str(POSITIONS), "--max-num-seqs", "8"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self._log.parent
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, "vLLM's server did not start"
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """Kills it with all of its processes, as the end of a machine would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def requests(self) -> int:
        """The chat completions that it has finished since it was started, by its own count."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10).read().decode()
        counts = re.findall(r"^vllm:request_success_total\{.*\} ([\d.]+)$", text, re.MULTILINE)
        assert counts
        return int(sum(map(float, counts)))
