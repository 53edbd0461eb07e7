"""Parts that benchmarks share: calls timed in turn, the memory of a call, and a CSV with the origin of its numbers."""

import csv
import os
import platform
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


# The list of defenses, `methods.py`, is shared with the tests.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
RESULTS = Path(__file__).parent / "results"
# Enough for a median whose quartiles say something.
ROUNDS = 7
QUICK_ROUNDS = 2


def parse_args(description: str) -> Namespace:
    """The two flags that every benchmark has; ends the program where the device is not there.

    Returns:
        `device`, `quick`, and what they decide: `rounds` and `results`, the folder for CSVs.
    """
    parser = ArgumentParser(description=description.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that all works; results go to outputs/benchmarks"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device on this machine, so the GPU rows cannot be measured here.")
    args.rounds = QUICK_ROUNDS if args.quick else ROUNDS
    args.results = Path("outputs/benchmarks") if args.quick else RESULTS
    return args


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_in_turn(calls: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each round. A round makes one call of each, so that what slows the machine down for a
    while slows all of them. Warm them up before."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def statistics(seconds: Mapping[str, Sequence[float]], name: str, over: Sequence[str]) -> dict[str, Any]:
    """The columns on time of one variant.

    Args:
        seconds: name → its time in each round.
        name: of the variant.
        over: the variants whose times, added up, its own is compared with.

    Returns:
        Median and quartiles in seconds; `ratio`, of the medians; and the quartiles of the rounds' own ratios.
    """
    own, whole = np.array(seconds[name]), np.sum([seconds[other] for other in over], axis=0)
    ratios = np.quantile(own / whole, (0.25, 0.75))
    low, middle, high = np.quantile(own, (0.25, 0.5, 0.75))
    columns = {"seconds": middle, "q1": low, "q3": high}
    columns["ratio"] = middle / sum(np.median(seconds[other]) for other in over)
    columns |= {"ratio_q1": ratios[0], "ratio_q3": ratios[1]}
    return {
        "rounds": len(own),
        **{key: f"{value:.4g}" for key, value in columns.items()},
        "ratio_to": " + ".join(over),
    }


def peak_memory(call: Callable[[], None], device: str) -> int:
    """The most bytes in tensors during a call beyond those before it, as torch's allocator counts them.

    Not the process's resident memory: that also holds what malloc keeps, and on CPU the scratch space of the BLAS
    library.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(np.cumsum([0, *sizes])))


def environment(device: str) -> dict[str, Any]:
    """The columns that say where and with what a row was measured."""
    processor = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    packages = {name: version(name) for name in ("torch", "trl", "transformers", "peft", "trl_emguard")}
    # `make bench` has glibc keep its memory; without, every large block is touched anew, which costs a third of a
    # step.
    keeps = os.environ.get("MALLOC_MMAP_MAX_") == "0"
    return {
        "device": device,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "malloc": "keeps memory" if keeps else "default",
        "date": date.today().isoformat(),
        **packages,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows → {path}", flush=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
