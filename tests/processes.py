"""Programs that tests start: what they find around them, and how long they may take.

No program hangs for ever, and none is too slow on a machine that is busy with other things: ``PATIENCE`` is many times
what each takes alone, and pytest's own ``--timeout`` is above it.
"""

import multiprocessing
import os
import subprocess
import sys
import traceback
from multiprocessing import connection
from pathlib import Path

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
    """Call a function in a process that has imported ``helpers``, which takes seconds, and done nothing else."""
    _run_fresh([{}], function, arguments)


def run_fresh_ranks(function, world, *arguments, may_die=False):
    """The same in ``world`` processes that differ in nothing but their rank; ``may_die``: some may kill themselves."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    _run_fresh([{**shared, "LOCAL_RANK": str(rank)} for rank in range(world)], function, arguments, may_die)


def _run_fresh(variables, function, arguments, may_die=False):
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["helpers"])
    processes, results = [], []
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]  # for the server, which starts at the first call
    try:
        for own in variables:
            result, sender = fresh.Pipe(duplex=False)
            processes.append(fresh.Process(target=_call, args=(sender, own, function, arguments)))
            processes[-1].start()
            sender.close()
            results.append(result)
        while results:  # whichever fails first: the others would wait for it
            ready = connection.wait(results, PATIENCE)
            assert ready, f"not done after {PATIENCE} seconds"
            for result in ready:
                failure = _received(result, may_die)
                assert not failure, failure
                results.remove(result)
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        for process in processes:
            process.kill()
            process.join()


def _received(result, may_die):
    try:
        return result.recv()
    except EOFError:
        return "" if may_die else "a process died"


def _call(sender, variables, function, arguments):
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        sender.send(traceback.format_exc())
    else:
        sender.send("")
