"""Work in separate processes that can be killed. They are forked, so none of them repeats the imports."""

import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
import transformers.modeling_utils
import transformers.trainer_utils
from private import forget_accelerate
from transformers import TrainerState


BEGUN = "begun"


class Group:
    """One process, or several ranks, that do the same work in a process group of their own.

    Args:
        folder: folder for `out-RANK.txt`, and for the file `begun` once the work has begun.
        work: function, called as `work(rank)`.
        ranks: number of ranks; gloo joins more than one.
    """

    def __init__(self, folder: Path, work: Callable[[int], Any], ranks: int = 1):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        (folder / BEGUN).unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids: list[int] = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                self._run(work, rank, ranks, port)
            self.pids.append(pid)
        self._status: dict[int, int] = {}

    def _run(self, work: Callable[[int], Any], rank: int, ranks: int, port: int) -> None:
        code = 1
        try:
            output = os.open(self.folder / f"out-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w") for _ in range(2))
            logging.basicConfig(force=True, stream=sys.stderr)  # pytest would capture the log
            forget_accelerate(with_ranks=True)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # only the parent continues with pytest

    def alive(self) -> list[int]:
        for pid in self.pids:
            if pid not in self._status:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._status[pid] = status
        return [pid for pid in self.pids if pid not in self._status]

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.output())
            time.sleep(0.005)

    def wait_begun(self) -> None:
        self.wait_for(lambda: (self.folder / BEGUN).exists() or len(self.alive()) < len(self.pids))

    def kill(self, ranks: list[int] | None = None) -> None:
        for rank, pid in enumerate(self.pids):
            if (ranks is None or rank in ranks) and pid in self.alive():
                os.kill(pid, signal.SIGKILL)
                self._status[pid] = os.waitpid(pid, 0)[1]

    def finish(self) -> None:
        """Wait for the end, and require success."""
        self.wait_for(lambda: not self.alive())
        assert self.codes() == [0] * len(self.pids), self.output()

    def wait_killed(self) -> bool:
        """Wait until a process is dead, kill the others as a launcher does, and say whether any was killed."""
        self.wait_for(lambda: len(self.alive()) < len(self.pids))
        time.sleep(0.1)
        self.kill()
        return -signal.SIGKILL in self.codes()

    def codes(self) -> list[int]:
        return [os.waitstatus_to_exitcode(self._status[pid]) for pid in self.pids]

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-6000:] for path in sorted(self.folder.glob("out-*.txt")))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_at_write(number: int, seed: int = 0) -> list[str]:
    """Kill this process while it writes for the `number`-th time, counted from 1: the file is cut to a random share
    of its bytes.

    The writes of a checkpoint count: weights, pickles, Trainer's state, files that replace another (before and after),
    and every deletion of an old checkpoint.

    Returns:
        List of the writes, which grows while they happen.
    """
    writes: list[str] = []
    rng = random.Random(seed)

    def count(name: str) -> bool:
        writes.append(name)
        return len(writes) == number

    def patch(module: Any, name: str, path_at: int) -> None:
        original = getattr(module, name)

        def write(*args, **kwargs):
            original(*args, **kwargs)
            if count(name):
                os.truncate(args[path_at], int(os.path.getsize(args[path_at]) * rng.random()))
                die()

        setattr(module, name, write)

    patch(torch, "save", 1)
    patch(peft.peft_model, "safe_save_file", 1)
    patch(transformers.modeling_utils, "safe_save_file", 1)
    patch(TrainerState, "save_to_json", 1)
    replace, rmtree = Path.replace, shutil.rmtree

    def replace_or_die(self, target):
        if count("before replace"):
            die()
        replace(self, target)
        if count("after replace"):
            die()

    def remove_or_die(path, *args, **kwargs):
        if "checkpoint-" in os.path.basename(path) and count("rmtree"):
            _lose_files(Path(path), rng)
            die()
        rmtree(path, *args, **kwargs)

    Path.replace = replace_or_die  # type: ignore[method-assign,assignment]
    transformers.trainer_utils.shutil = _With(shutil, rmtree=remove_or_die)  # type: ignore[attr-defined]
    return writes


def _lose_files(folder: Path, rng: random.Random) -> None:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for file in rng.sample(files, rng.randint(1, len(files) - 1)):
        file.unlink()


class _With:
    """Module with some names replaced."""

    def __init__(self, module: Any, **names: Any):
        self.__dict__.update(vars(module), **names)
