"""Trainings in processes of their own, some at a time: kept when they have finished, resumed when they have not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from lightning_sparse.compare.results import history

__all__ = ["Run", "say", "terminated_as_interrupted", "train"]

#: seconds that a training has to end by itself when it is told to
GRACE = 10.0


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: what it is, in one line.
        folder: what it writes goes there: ``run.yaml``, ``log.txt``, ``version_N`` of every attempt, ``finished``.
        recipe: the configuration.
        changes: what is set over the recipe's.
        options: of ``lightning-sparse fit``, which come last.
    """

    name: str
    folder: Path
    recipe: Path
    changes: dict[str, Any]
    options: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the training has come to its end."""
        return self._mark.exists()

    @property
    def log(self) -> Path:
        """What the training printed."""
        return self.folder / "log.txt"

    @property
    def last_words(self) -> str:
        """The end of the log, on lines of their own: of a traceback its message, three lines at most."""
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        message = list(takewhile(lambda line: not line[0].isspace(), reversed(lines[-3:]))) or lines[-1:]
        return "".join(f"\n        {line.strip()}" for line in reversed(message))

    @property
    def epochs(self) -> int:
        """Number of epochs that have been logged so far."""
        try:
            return len(history(self.folder))
        except (ValueError, TypeError):  # a line is being written
            return 0

    def start(self, threads: int, checkpoint: Path | None) -> "subprocess.Popen[bytes]":
        """Start the training, or go on with it; write its configuration, ``run.yaml``, which can also be run by hand.

        Args:
            threads: of the process.
            checkpoint: where to go on; None: from the start, without what earlier attempts have left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        logger = {
            "class_path": "lightning_sparse.monitor.csv_log.EpochCSVLogger",
            "init_args": {"save_dir": str(self.folder), "name": ""},  # a version_N for each attempt
        }
        trainer = {**self.changes.get("trainer", {}), "logger": logger, "enable_progress_bar": False}
        file = self.folder / "run.yaml"
        text = yaml.safe_dump({**self.changes, "trainer": trainer}, sort_keys=False)
        file.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "lightning_sparse", "fit", f"--config={self.recipe}", f"--config={file}"]
        command += [*self.options]
        if checkpoint is not None:
            command.append(f"--ckpt_path={checkpoint}")
        else:
            for attempt in self.folder.glob("version_*"):
                shutil.rmtree(attempt)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with self.log.open("ab") as log:
            # a session of its own: Ctrl-C in the terminal reaches the caller alone, who then stops its trainings once
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def finish(self) -> None:
        """Note that the training has come to its end."""
        self._mark.write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z\n"), encoding="utf-8")

    def checkpoint(self) -> Path | None:
        """Return the latest checkpoint if it can be loaded."""
        found = sorted(self.folder.glob("version_*/checkpoints/*.ckpt"), key=lambda file: file.stat().st_mtime)
        if not found:
            return None
        try:
            torch.load(found[-1], map_location="cpu")
        except Exception:  # whatever is wrong with the file, the training can start again
            return None
        return found[-1]

    @property
    def _mark(self) -> Path:
        return self.folder / "finished"


def train(
    runs: Sequence[Run],
    jobs: int,
    threads: int,
    epochs: int | None,
    say: Callable[[str], None],
    finished: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Train what has not finished, showing progress on standard error; return the runs that failed.

    If this is interrupted, what is running is stopped, and the next call goes on with it.

    Args:
        runs: all of them, also those that have finished.
        jobs: number of trainings at the same time.
        threads: of each training.
        epochs: of each training; None: not known.
        say: prints a line.
        finished: is told of each run that has finished now.
    """
    waiting = deque(run for run in runs if not run.finished)
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs have finished before")
    active: dict[str, tuple[Run, subprocess.Popen[bytes], float]] = {}
    failed: list[Run] = []
    unit = epochs or 1
    done = unit * (len(runs) - len(waiting))
    before = {run.name: min(run.epochs, unit) for run in waiting} if epochs else {}
    bar = tqdm(
        total=unit * len(runs),
        initial=done + sum(before.values()),
        unit="epoch" if epochs else "run",
        file=sys.stderr,
        dynamic_ncols=True,
        smoothing=0,  # the average rate: runs have slow beginnings
        disable=None,  # if it is no terminal
    )
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.popleft()
                checkpoint = run.checkpoint()
                say(f"{'go on' if checkpoint else 'start':7} {run.name}")
                active[run.name] = run, run.start(threads, checkpoint), time.monotonic()
            time.sleep(0.3)
            for name, (run, process, since) in list(active.items()):
                code = process.poll()
                if code is None:
                    continue
                del active[name]
                before.pop(name, None)
                done += unit
                if code == 0:
                    run.finish()
                    say(f"done    {name} ({time.monotonic() - since:.0f} s)")
                    finished(run)
                else:
                    failed.append(run)
                    say(f"FAILED  {name} (exit status {code}): see {run.log}{run.last_words}")
            if not bar.disable:
                now = {name: run.epochs for name, (run, _, _) in active.items()}
                if epochs:
                    before.update((name, min(count, unit)) for name, count in now.items())
                bar.update(done + sum(before.values()) - bar.n)
                running = ", ".join(f"{name} (epoch {count})" for name, count in now.items())
                bar.set_postfix_str(f"{done // unit}/{len(runs)} runs; {running}")
    finally:
        _stop(process for _, process, _ in active.values())
        bar.close()
    return failed


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and a closed terminal do what Ctrl-C does: no training is to outlive this process."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.signal(getattr(signal, name), interrupt) for name in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """Print a line on standard error, above the progress bar."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def _stop(processes: "Iterable[subprocess.Popen[bytes]]") -> None:
    """Ask trainings to end, wait, and kill those that have not, with the processes that they started."""
    processes = list(processes)
    try:
        for process in processes:
            process.terminate()
        until = time.monotonic() + GRACE
        for process in processes:
            process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
                process.wait()
