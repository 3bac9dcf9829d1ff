#!/usr/bin/env python3
"""Measures the block beside PyTorch, zentorch and OpenVINO, as README.md in this folder explains."""

import argparse
import array
import contextlib
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "peers"
RUN = TARGET / "run"  # tensors and results of a case, logs, caches of compilers; created anew by each run

SHAPES = {"small": (512, 1376), "1b": (2048, 8192), "8b": (4096, 14336)}  # hidden_size H, intermediate_size I
ROWS = [1, 2, 4, 8, 16, 128, 512]
DTYPES = ["bf16", "f32", "f16"]
VENVS = {  # the virtual environment of each system
    "reference": "openvino",
    "torch-eager": "torch",
    "torch-compile": "torch",
    "torch-max-autotune": "torch",
    "zentorch": "zentorch",
    "openvino": "openvino",
}
PEERS = [system for system in VENVS if system != "reference"]
LIMITS = {"f32": 1e-4, "f16": 2e-3, "bf16": 2e-2}  # a system with a larger relative error is skipped
COLUMNS = ["dtype", "shape", "rows", "system", "ms", "min_ms", "ours_ms", "ratio", "rel_error"]


def options():
    def among(known):
        def parse(text):
            names = text.split(",")
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {', '.join(unknown)}")
            return names

        return parse

    def systems(text):
        return [name for name in text.split(",") if name.startswith("ours-") or among(PEERS)(name)]

    def numbers(text):
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--systems", type=systems, default=",".join(PEERS),
                        help="peers; `ours-KERNEL` is this crate with that kernel forced, beside the one it chooses")
    parser.add_argument("--shapes", type=among(SHAPES), default="small,1b,8b")
    parser.add_argument("--rows", type=numbers, default=",".join(map(str, ROWS)))
    parser.add_argument("--dtypes", type=among(DTYPES), default="bf16,f32")
    parser.add_argument("--train", action="store_true",
                        help="forward and backward with gradients of x and the weights; `ours-plain` is candle")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1,
                        help="number of times a case is restarted in new processes, with all rounds each time")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-busy", type=float, default=0.05,
                        help="share of the cores that other processes may use before a sample")
    parser.add_argument("--patience", type=float, default=10, help="minutes to wait for an idle machine")
    parser.add_argument("--record", metavar="MACHINE/NAME",
                        help="write benches/record/MACHINE/NAME-peers.csv and .txt, with --train NAME-train")
    return parser.parse_args()


# Prerequisites: virtual environments and the worker of this crate.


def venv_python(name):
    return TARGET / name / "bin" / "python"


def install(name):
    """Creates the virtual environment with exactly the packages of its requirements file."""
    requirements, installed = HERE / f"requirements-{name}.txt", TARGET / name / "installed.txt"
    if installed.exists() and installed.read_text() == requirements.read_text():
        return
    print(f"installing {TARGET / name}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", TARGET / name], check=True)
    pip = [venv_python(name), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--requirement", requirements], check=True)
    shutil.copy(requirements, installed)


def build(kind="--bench", name="peers"):
    """Builds an executable of this crate, by default worker.rs, and returns its path."""
    # The profile of benchmarks compiles candle at level 3.
    command = ["cargo", "build", "--profile", "bench", kind, name, "--message-format=json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for message in map(json.loads, output.splitlines()):
        if message.get("executable") and message["target"]["name"] == name:
            return message["executable"]
    sys.exit(f"expected cargo to report an executable of {kind} {name}, found none")


# Workers.


class Failure(Exception):
    """A worker has answered `error REASON` or has ended."""


class Worker:
    """A system in a process of its own, which sleeps until it receives a line."""

    def __init__(self, system, binary, threads):
        self.system = system
        ours = system.startswith("ours")
        command = [binary, "serve"] if ours else [venv_python(VENVS[system]), HERE / "worker.py", system, str(threads)]
        self.log = RUN / f"{system}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=RUN, env=environment(system, threads), text=True, bufsize=1,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def ask(self, *words):
        """Sends a line and returns the words of the answer after `ok`."""
        try:
            self.process.stdin.write(" ".join(map(str, words)) + "\n")
            answer = self.process.stdout.readline().strip()
        except BrokenPipeError:
            answer = ""
        status, _, rest = answer.partition(" ")
        if status != "ok":
            raise Failure(rest or f"the process ended with {self.process.wait()}, see {self.log}")
        return rest

    def time(self, seconds):
        """-> median and minimum of the seconds per call"""
        median, least, _ = self.ask("time", seconds).split()
        return float(median), float(least)

    def close(self):
        self.process.kill()
        self.process.communicate()


def environment(system, threads):
    """All threads for every system, and compiler caches in RUN.

    How idle threads wait (OMP_WAIT_POLICY, KMP_BLOCKTIME) keeps each system's default.
    """
    kernel = {"CANDLE_SWIGLU_KERNEL": system.removeprefix("ours-")} if system.startswith("ours-") else {}
    names = ["OMP_NUM_THREADS", "RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(RUN / system), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return os.environ | dict.fromkeys(names, str(threads)) | caches | kernel


def machine_facts(worker):
    worker.process.stdin.write("facts\n")
    return "".join(iter(worker.process.stdout.readline, "\n"))


# An idle machine.


def busy_share(seconds):
    """Returns the share of the time of all cores that was not idle."""

    def times():
        words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, words)
        return idle + iowait, user + nice + system + idle + iowait + irq + softirq + steal

    idle, total = times()
    time.sleep(seconds)
    later_idle, later_total = times()
    return 1 - (later_idle - idle) / max(1, later_total - total)


def wait_idle(args):
    """Waits until the machine is idle.

    In this pause the spinning threads of the previous system fall asleep.
    """
    end = time.monotonic() + 60 * args.patience
    told = False
    while (busy := busy_share(0.3)) > args.max_busy:
        if time.monotonic() > end:
            sys.exit(f"other processes kept the machine busy for {args.patience:g} minutes ({busy:.0%} now)")
        if not told and time.monotonic() > end - 60 * args.patience + 5:
            print(f"waiting for an idle machine ({busy:.0%} busy)", file=sys.stderr)
            told = True


# Measuring.


def relative_error(system, count):
    """Returns rms(y - reference) / rms(reference) over the first `count` numbers of both."""
    expected, found = (array.array("d", (RUN / f"y-{name}.f64").read_bytes())[:count] for name in ("reference", system))
    if len(found) != count:
        raise Failure(f"expected {count} numbers, found {len(found)}")
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(expected, found)) / math.fsum(a * a for a in expected))


def make(dtype, shape, rows, binary, args):
    """Writes the tensors of all cases of a dtype and shape, and the f64 result of all rows."""
    ours, reference = Worker("ours", binary, args.threads), Worker("reference", binary, args.threads)
    try:
        ours.ask("make", dtype, *SHAPES[shape], rows)
        reference.ask("load", rows, *training(args))
    finally:
        ours.close()
        reference.close()


def training(args):
    return ["train"] if args.train else []


def start(system, case, binary, args, notes):
    """-> a loaded worker and its error, or None and a note if the system cannot run the case"""
    dtype, shape, rows = case
    worker = Worker(system, binary, args.threads)
    try:
        notes[system] = worker.ask("load", rows, *training(args))
        error = relative_error("ours" if system.startswith("ours") else system, rows * SHAPES[shape][0])
        if not error < LIMITS[dtype]:
            raise Failure(f"wrong result: relative error {error:.1e}")
        return worker, error
    except Failure as failure:
        worker.close()
        if system == "ours":
            raise
        notes[f"{system} {dtype} {shape} {rows}"] = f"skipped: {failure}"
        print(f"{dtype} {shape} {rows} {system} skipped: {failure}", file=sys.stderr)
    return None


def measure(case, binary, args, notes):
    """-> rows of the table: ours, then each peer and its time divided by our time just before"""
    turns, errors = {system: [] for system in ["ours", *args.systems]}, {}
    for _ in range(args.processes):
        with contextlib.ExitStack() as stack:
            workers = {}
            for system in turns:
                if started := start(system, case, binary, args, notes):
                    workers[system], errors[system] = started
                    stack.callback(workers[system].close)
            ours = workers.pop("ours")
            for _ in range(args.rounds):
                for system, peer in workers.items():
                    pair = []
                    for worker in (ours, peer):
                        wait_idle(args)
                        pair.append(worker.time(args.seconds))
                    turns["ours"].append((pair[0], pair[0]))
                    turns[system].append(pair)
    return [row(case, system, turns[system], errors[system]) for system in turns if turns[system]]


def row(case, system, pairs, error):
    """A row of the table.

    `pairs` holds (median, minimum) seconds per call of ours and of the system beside it.
    """
    median = statistics.median
    return dict(zip(COLUMNS, [
        *case,
        system,
        f"{1e3 * median(theirs for _, (theirs, _) in pairs):.5g}",
        f"{1e3 * min(least for _, (_, least) in pairs):.5g}",
        f"{1e3 * median(ours for (ours, _), _ in pairs):.5g}",
        f"{median(theirs / ours for (ours, _), (theirs, _) in pairs):.3f}",
        f"{error:.2e}",
    ]))


def show(rows):
    """Prints one line per row and marks the best peer."""
    peers = [row for row in rows if not row["system"].startswith("ours")]
    best = min(peers, key=lambda row: float(row["ratio"]), default=None)
    for row in rows:
        print(line(row.values()), "<- best peer" if row is best else "", flush=True)


def line(words):
    widths = [5, 6, 5, 19, 10, 10, 10, 8, 10]
    return " ".join(f"{word:>{width}}" for word, width in zip(words, widths))


def write(args, table, facts, notes):
    path = ROOT / "benches" / "record" / f"{args.record}-{'train' if args.train else 'peers'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    with open(f"{path}.txt", "w") as file:
        file.write(facts + "".join(f"{name}: {note}\n" for name, note in notes.items()))


def main():
    args = options()
    for name in dict.fromkeys(["openvino", *(VENVS[s] for s in args.systems if s in VENVS)]):
        install(name)
    binary = build()
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    worker = Worker("ours", binary, args.threads)
    facts = machine_facts(worker)
    worker.close()
    table, notes = [], {"options": " ".join(sys.argv[1:])}
    print(facts, line(COLUMNS), sep="")
    wait_idle(args)
    for dtype in args.dtypes:
        for shape in args.shapes:
            make(dtype, shape, max(args.rows), binary, args)
            for rows in args.rows:
                results = measure((dtype, shape, rows), binary, args, notes)
                show(results)
                table += results
                if args.record:
                    write(args, table, facts, notes)
    for name, note in notes.items():
        print(f"{name}: {note}")
    (RUN / "case.safetensors").unlink()


if __name__ == "__main__":
    main()
