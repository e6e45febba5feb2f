"""All that only a GPU shows, in at most six minutes: ``python -m lightning_sparse.bench gpu --device cuda``.

``--device cpu`` runs the same on small networks, to see that it would.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_sparse.bench import blocks, launches, semi_structured, steps, storage
from lightning_sparse.bench.measure import hardware
from lightning_sparse.bench.networks import METHODS, NETWORKS, bare_step, batch_for
from lightning_sparse.compat.lightning import MisconfigurationException

__all__ = ["gpu"]

_BARS = {"rigl": 1.04, "dst": 1.25, "dfbst": 1.4}
_MINUTES = 6
_TESTS = Path(__file__).parents[2] / "tests" / "cuda"


def gpu(arguments: argparse.Namespace) -> None:
    """Print launches, step times beside their bars, graphs, tables of sparse layers, and the tests of GPUs."""
    start = time.monotonic()
    small = arguments.device == "cpu"
    print(hardware(arguments.device))
    launches.launches(_with(arguments, methods="rigl" if small else "rigl,dst,dfbst,autosparse,str,topkast"))
    print("bars: " + ", ".join(f"{name} {bar}" for name, bar in _BARS.items()))
    vgg = {"network": "lenet300", "batch": 2} if small else {"network": "vgg16", "batch": 128}
    steps.overhead(_with(arguments, methods=",".join(_BARS), precision="bf16-mixed", **vgg))
    for name in _BARS:
        for way, run in {"a captured step": _captured, "reduce-overhead": _reduced}.items():
            print(f"{name:18s} {way}: {_outcome(run, arguments, name, vgg['network'])}", flush=True)
    for precision in ("32-true", "bf16-mixed"):
        layers = {"network": "lenet300" if small else "mlp4096", "batch": 2 if small else 128}
        storage.storage(_with(arguments, precision=precision, sparsities=arguments.sparsities or "0.9,0.98", **layers))
        for width in (32,) if small else (4096, 8192):
            sizes = {
                "width": width,
                "batch": 2 if small else 4096,
                "sparsities": arguments.sparsities or "0.8,0.9,0.95",
            }
            blocks.blocks(_with(arguments, precision=precision, **sizes))
    semi_structured.semi_structured(arguments)
    left = 60 * _MINUTES - (time.monotonic() - start)
    _run_tests(max(10.0, left))


def _with(arguments: argparse.Namespace, **options: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), **options})


def _outcome(run: Callable[..., None], arguments: argparse.Namespace, name: str, network: Any) -> str:
    """Say what came of it: it worked, or by which name it was refused."""
    if arguments.device == "cpu":
        return "needs a GPU"
    try:
        run(name, network, arguments.device)
    except MisconfigurationException as refusal:
        return f"refused: {refusal}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "works"


def _captured(name: str, network: str, device: str) -> None:
    """Capture a whole step in a CUDA graph."""
    module = NETWORKS[network][0]().to(device)
    step = bare_step(module, batch_for(network, 16, device), METHODS[name]())
    step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()


def _reduced(name: str, network: str, device: str) -> None:
    """Train a compiled network whose forward and backward passes are CUDA graphs."""
    module = NETWORKS[network][0]().to(device)
    model: Any = torch.compile(module, mode="reduce-overhead")
    step = bare_step(module, batch_for(network, 16, device), METHODS[name](), model)
    for _ in range(5):
        step()
    if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        raise FloatingPointError("weights are not finite")


def _run_tests(seconds: float) -> None:
    """Run the tests that need a GPU, for as long as there is time."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_TESTS)]
    try:
        subprocess.run(command, timeout=seconds, check=False, cwd=_TESTS.parents[1])
    except subprocess.TimeoutExpired:
        print(f"{_TESTS}: stopped after {seconds:.0f} s; run it by itself")
