"""Replaces `accelerate launch` in tests: forks ranks from a process that has imported everything.

    python fork_ranks.py SOCKET                                            the process that forks
    python fork_ranks.py SOCKET --config_file FILE --module NAME ADDRESS   a launcher with accelerate's arguments

accelerate itself interprets the config file. As under torchrun, the other ranks are terminated when one fails, and the
signal that killed a rank is printed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

MODULES = (
    "dice_py.stages.train",
    "dice_py.training.launcher",
    "trl",
    "peft",
    "accelerate.commands.launch",
    "sharded_on_cpu",
)


def serve(path: str) -> None:
    """Forks one training after another. The file `.ready` beside the socket appears after the imports."""
    for module in MODULES:
        importlib.import_module(module)
    importlib.import_module("trl").DPOTrainer  # noqa: B018  lazily imported
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    Path(path + ".ready").touch()
    while True:
        client, _ = server.accept()
        with contextlib.suppress(OSError), client, client.makefile("rw") as lines:  # a launcher may be killed
            request = json.loads(lines.readline())
            lines.write(json.dumps(_training(request)) + "\n")


def _training(request: dict[str, object]) -> dict[str, object]:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env

    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(request["arguments"]))
    environment = prepare_multi_gpu_env(arguments)
    os.environ.clear()
    os.environ.update(before)
    count = arguments.num_processes
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.main_process_port)}
    ranks = {_fork(arguments, environment, rank) for rank in range(count)}
    messages: list[str] = []
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status == 0 or code:
            continue
        code = 1
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            messages.append(f"Signal {number} ({signal.Signals(number).name}) received by PID {pid}")
        time.sleep(0.5)
        for left in ranks:
            os.kill(left, signal.SIGTERM)
    return {"code": code, "messages": messages}


def _fork(arguments: object, environment: dict[str, str], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.clear()
        os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        sys.argv = [arguments.training_script, *arguments.training_script_args]
        if arguments.training_script == "sharded_on_cpu":
            importlib.import_module("sharded_on_cpu").shard_on_cpu()
        importlib.import_module("dice_py.training.launcher").main()
    finally:
        os._exit(70)


def launch(path: str, arguments: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        with client.makefile("rw") as lines:
            lines.write(json.dumps({"arguments": arguments, "environment": dict(os.environ)}) + "\n")
            lines.flush()
            answer = json.loads(lines.readline())
    print(*answer["messages"], sep="\n", flush=True)
    sys.exit(answer["code"])


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        launch(sys.argv[1], sys.argv[2:])
