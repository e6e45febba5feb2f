"""Programs that tests start: what they find around them, and how long they may take.

No program hangs for ever, and none is too slow on a machine that is busy with other things: ``PATIENCE`` is many times
what each takes alone, and pytest's own ``--timeout`` is above it.
"""

import functools
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import torch
from helpers import free_port

TESTS = Path(__file__).parent
PATIENCE = 500  # seconds


def environment(**more):
    """Variables of a program that imports what stands in ``tests``."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def run_python(*arguments, **variables):
    """Run Python to its end, which must be a good one; return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_fresh(function, *arguments):
    """Return what a function returns in a process that has done nothing but the imports, which take seconds."""
    (result,) = _run_fresh([{}], function, arguments)
    return result


def run_fresh_ranks(function, world, *arguments, may_die=False):
    """Call it in ``world`` processes that differ in nothing but their rank; ``may_die``: some may kill themselves."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    _run_fresh([{**shared, "LOCAL_RANK": str(rank)} for rank in range(world)], function, arguments, may_die)


def started(command, stdout, env, **_):
    """Stand for ``subprocess.Popen`` of ``python -m lightning_sparse ...``: such a process runs the command."""
    assert command[1:3] == ["-m", "lightning_sparse"]
    process = _start(_run_command, command[3:], stdout.name, env)
    return SimpleNamespace(
        poll=lambda: process.exitcode,
        send_signal=functools.partial(os.kill, process.pid),
        terminate=process.terminate,
        wait=process.join,
    )


def _run_command(arguments, log, variables):
    from lightning_sparse import cli

    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv = ["lightning-sparse", *arguments]
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    cli.main(arguments)


def _run_fresh(variables, function, arguments, may_die=False):
    processes, results = [], []
    try:
        for own in variables:
            result, sender = multiprocessing.Pipe(duplex=False)
            processes.append(_start(_call, sender, own, function, arguments))
            sender.close()
            results.append(result)
        waiting, returned = set(results), {}
        while waiting:  # whichever fails first: the others would wait for it
            ready = connection.wait(waiting, PATIENCE)
            assert ready, f"not done after {PATIENCE} seconds"
            for result in ready:
                failure, returned[result] = _received(result, may_die)
                assert not failure, failure
                waiting.remove(result)
        return [returned[result] for result in results]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _start(function, *arguments):
    """Start a process from a server that has the imports behind it (``preloaded.py``)."""
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]  # for the server, which starts at the first call
    try:
        process = fresh.Process(target=function, args=arguments)
        process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return process


def _received(result, may_die):
    try:
        return result.recv()
    except EOFError:
        return "" if may_die else "a process died", None


_end_group = torch.distributed.destroy_process_group


def _end_group_of_torch_2_4():
    """Let gloo's threads drop their tensors, for which they need the interpreter; the end of a group keeps it."""
    time.sleep(0.1)
    _end_group()


def _call(sender, variables, function, arguments):
    os.environ.update(variables)
    torch.set_num_threads(1)
    if torch.__version__.startswith("2.4."):
        torch.distributed.destroy_process_group = _end_group_of_torch_2_4
    try:
        returned = function(*arguments)
    except BaseException:
        sender.send((traceback.format_exc(), None))
    else:
        sender.send(("", returned))
