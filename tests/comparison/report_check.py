"""Look at a comparison's report in a real browser, at two widths, light and dark: `make report-check`.

It fails on an error in the console, a request to anything but the file itself, and a page that is wider than its
window. Screenshots are written for people to look at. Without a REPORT it looks at one with made-up figures, in which
every part of the page is there.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from browser import NAMES, Browser, find_browser
from figures import HOSTILE, INFO, results, row

from trl_emguard.comparison.page import write_page
from trl_emguard.comparison.plan import BENIGN_TASK
from trl_emguard.comparison.report import make_report
from trl_emguard.comparison.runs import Trained


WIDTHS = {"phone": 390, "desktop": 1280}
SCHEMES = ("light", "dark")
SURPLUS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report_check.py", description=__doc__, formatter_class=raw)
    parser.add_argument("report", nargs="?", type=Path, help="a report.html (default: one with made-up figures)")
    parser.add_argument("--output", type=Path, default=Path("outputs/report-check"), help="folder of the screenshots")
    args = parser.parse_args(argv)
    path = find_browser()
    if path is None:
        print(
            f"No browser was found ({', '.join(NAMES)}): install one, as `apt-get install chromium`.", file=sys.stderr
        )
        return 1
    if args.report is not None and not args.report.is_file():
        print(f"{args.report} is no file: name a report.html.", file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    problems = check(path, args.report or write_sample(args.output), args.output)
    print("\n".join(problems) or f"No problem was found. Screenshots: {args.output}")
    return bool(problems)


def check(browser: str, report: Path, folder: Path) -> list[str]:
    """Return what is wrong with a page in any window, and write a screenshot of each."""
    problems = []
    with Browser(browser) as window:
        for name, width in WIDTHS.items():
            for scheme in SCHEMES:
                window.open(report, width, scheme)
                window.screenshot(folder / f"{name}-{scheme}.png")
                found = errors(window.events) + requests(window.events, report.resolve().as_uri())
                surplus = window.evaluate(SURPLUS)
                if surplus > 0:
                    found.append(f"the page is {surplus} pixels wider than the window")
                problems += [f"{name}, {width} pixels, {scheme}: {problem}" for problem in found]
    return problems


def errors(events: list[dict[str, Any]]) -> list[str]:
    """Return the errors of a page's console."""
    found = []
    for event in events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            found.append(f"exception: {params['exceptionDetails']['text']}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            found.append(f"console: {[argument.get('value') for argument in params['args']]}")
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            found.append(f"console: {params['entry']['text']}")
    return found


def requests(events: list[dict[str, Any]], page: str) -> list[str]:
    """Return the requests of a page but the one for itself."""
    asked = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
    return [f"request: {url[:200]}" for url in asked if url != page]


def write_sample(folder: Path) -> Path:
    """Write a report in which every part of the page is there, with long and hostile texts."""
    long = "interleave++,kl interleave_fraction=0.2 kl_coef=" + "1" * 40
    names = ["none", long, HOSTILE, "steering steering_coef=2.0", "steering steering_coef=2.0 random_vector", "ema"]
    cost = {"seconds_per_step": 1.5, "peak_memory": 2**31}
    trained = [Trained(name, "kl", seed, "x", **cost) for name in names for seed in (0, 1)]
    trained = [replace(run, is_baseline=run.name == "ema", is_random="random" in run.name) for run in trained]
    trained += [Trained(f"kl {c}", "kl", 0, "x", is_defended=True, coefficient=c) for c in (0.1, 1.0, 10.0)]
    rows = []
    for i, run in enumerate(trained):
        values = {("general", "margin"): -0.1 * i, ("in_domain", "nll"): 0.05 * i - 1, ("general", "base_nll"): 0.2}
        values |= {("general", "nll"): -0.3, (BENIGN_TASK, "nll"): -2.0}
        values |= {(BENIGN_TASK, "exact_match"): 0.4, (BENIGN_TASK, "ordinary_answer"): 0.1}
        rows += [row(run.key, set, metric, value) for (set, metric), value in values.items()]
        rows += [row(run.key, "general", "margin", 0.1, family=family) for family in ("neutral_system", "inoculation")]
    sample = {
        "set": "general",
        "family": "plain",
        "question": "1",
        "answer": f"{HOSTILE} {'word' * 200}",
        "repetition": 0.5,
    }
    samples = [{"model": run.key, **sample} for run in trained[4:7]]
    failed = Trained("broken", "ldifs", 0, None, f"{HOSTILE} its log: /a/{'long/' * 40}log.txt")
    benign = [replace(run, is_defended=True) for run in trained if not (run.is_baseline or run.is_random)]
    found = results(rows, samples)
    found.notes.append("in_domain behind inoculation: " + "reason " * 30)
    info = INFO | {"command": "trl-emguard compare --config " + "folder/" * 40, "note": "Figures are made up."}
    return write_page(make_report([*trained, failed], found, [*benign, failed]), folder, info)


if __name__ == "__main__":
    sys.exit(main())
