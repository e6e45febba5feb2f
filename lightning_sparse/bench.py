"""Benchmarks: ratios measured in one run, sparse and dense in turn, so that a change of the machine's speed cancels.

``python -m lightning_sparse.bench overhead`` times a bare training step with each method against a dense one,
``... trainer`` the same in a Lightning Trainer, ``... compile`` compiled by inductor against eager; ``... hooks`` shows
the cost of Lightning's hooks alone, ``... memory`` the peak memory, ``... update`` the time in which methods of prune
and grow move connections (``--storages masked,sparse``), ``... ranking`` that of GGR's allocation among layers alone,
``... storage`` time and memory of truly sparse layers, ``... traffic`` what two processes send in a step,
``... monitor`` the share of SparsityMonitor in the time of an epoch.
``--help`` lists the options.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset

from lightning_sparse import (
    DFBST,
    DSR,
    DST,
    GGR,
    ITOP,
    MEST,
    SET,
    SNFS,
    STR,
    AutoSparse,
    DeepR,
    MemoryEfficientDST,
    RigL,
    SparsityMonitor,
    kernels,
    sampling,
)
from lightning_sparse._lightning import PACKAGE, Callback, DDPStrategy, LightningModule, Trainer
from lightning_sparse.callback import SparseCallback
from lightning_sparse.distributions import budget, share
from lightning_sparse.layers import choose
from lightning_sparse.masked import MaskedWeight
from lightning_sparse.methods import ggr
from lightning_sparse.models import VGG16, LeNet300, ResNet18
from lightning_sparse.process import peak_memory, resident_memory
from lightning_sparse.prune_and_grow import PruneAndGrow
from lightning_sparse.storage import make_sparse_
from lightning_sparse.storage.backends import backend
from lightning_sparse.storage.training import Capture, SparseWeight

__all__ = ["main"]

_NEVER = 10**12
METHODS: dict[str, Callable[..., SparseCallback]] = {
    "dst": lambda: DST(alpha=5e-4),
    "dfbst": lambda: DFBST(alpha=5e-4, beta=0.01),
    "autosparse": lambda: AutoSparse(alpha=0.75, init_threshold=-5.0),
    "str": lambda: STR(init_threshold=-5.0),
    "deepr": lambda: DeepR(sparsity=0.9),
}
for _method in (
    SET,
    RigL,
    SNFS,
    DSR,
    ITOP,
    MEST,
    GGR,
    MemoryEfficientDST,
):  # connections move when the benchmark says so
    METHODS[_method.__name__.lower()] = partial(_method, sparsity=0.9, update_every=_NEVER)


def mlp4096() -> nn.Module:
    """Three layers of 4096 x 4096."""
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet300": (LeNet300, (1, 28, 28)),
    "vgg16": (VGG16, (3, 32, 32)),
    "mlp4096": (mlp4096, (4096,)),
    "resnet18": (ResNet18, (3, 32, 32)),
}


def stepper(
    network: str, method: str | None, batch: int, device: str, compiled: bool = False
) -> tuple[Callable[[], None], nn.Module]:
    """Return a function that takes one step of training (SGD with momentum and weight decay), and the module."""
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    module = build().to(device)
    model = torch.compile(module) if compiled else module
    x, y = torch.randn(batch, *shape, device=device), torch.randint(10, (batch,), device=device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    callback = METHODS[method]() if method else None
    if callback is not None:
        callback.attach([choice for choice in choose(module) if choice.reason is None], [optimizer], False)

    def step() -> None:
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if callback is None:
            optimizer.step()
            return
        callback.before_step(optimizer, 1.0, 1.0)
        callback.enter_step(optimizer)
        optimizer.step()
        callback.after_step(optimizer)

    return step, module


def _seconds(step: Callable[[], None], count: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def overhead(arguments: argparse.Namespace) -> None:
    """Print, for each method, its step time over the dense one: median and range over rounds of A and B in turn."""
    device = arguments.device
    methods = arguments.methods.split(",")
    print(f"{arguments.network}, batch {arguments.batch}, {_hardware(device)}")
    steps = {name: stepper(arguments.network, name, arguments.batch, device)[0] for name in methods}
    dense, _ = stepper(arguments.network, None, arguments.batch, device)
    once = _seconds(dense, 3, device)
    count = max(1, int(arguments.seconds / once))
    for step in steps.values():
        _seconds(step, max(3, count // 10), device)
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    base = []
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            before, sparse, after = _seconds(dense, count, device), _seconds(step, count, device), 0.0
            after = _seconds(dense, count, device)
            base.append((before + after) / 2)
            ratios[name].append(2 * sparse / (before + after))
    print(f"dense step: {statistics.median(base) * 1e3:.3f} ms (median of {len(base)} rounds of {count} steps)")
    for name, values in ratios.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:10s} step time / dense: {middle:.3f}  ({low:.3f} to {high:.3f})", flush=True)


def compiled(arguments: argparse.Namespace) -> None:
    """Train with torch.compile (inductor) and without: print how far weights are apart, and the ratio of step times."""
    print(f"{arguments.network}, batch {arguments.batch}, torch.compile, {_hardware(arguments.device)}")
    for name in arguments.methods.split(","):
        fast, ours = stepper(arguments.network, name, arguments.batch, arguments.device, compiled=True)
        slow, theirs = stepper(arguments.network, name, arguments.batch, arguments.device)
        for step in (fast, slow):
            for _ in range(20):
                step()
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        apart = max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)
        times = [(_seconds(fast, 20, arguments.device), _seconds(slow, 20, arguments.device)) for _ in range(5)]
        ratio = statistics.median(quick / eager for quick, eager in times)
        print(f"{name:10s} apart after 20 steps: {apart:.1e} relative; compiled / eager step: {ratio:.3f}", flush=True)


def memory(arguments: argparse.Namespace) -> None:
    """Print each method's peak memory over the dense one's; each is measured in a process of its own."""
    print(f"{arguments.network}, batch {arguments.batch}, {_hardware(arguments.device)}")
    own = [sys.executable, "-m", "lightning_sparse.bench", "peak", "--network", arguments.network]
    own += ["--batch", str(arguments.batch), "--device", arguments.device, "--threads", str(arguments.threads)]

    def peak(method: str) -> tuple[float, float]:
        printed = subprocess.run([*own, "--methods", method], check=True, capture_output=True, text=True).stdout
        before, after = map(float, printed.split())
        return before, after

    idle, dense = peak("none")
    print(f"dense peak: {dense:.0f} MB, of which {idle:.0f} MB are the process before the network is made")
    for name in arguments.methods.split(","):
        base, sparse = peak(name)
        ratio = (sparse - base) / (dense - idle)
        print(f"{name:10s} peak / dense: {sparse / dense:.3f}; without the process's own {base:.0f} MB: {ratio:.3f}")


def peak(arguments: argparse.Namespace) -> None:
    """Print this process's memory in MB before the network is made, and its peak after five steps."""
    method = None if arguments.methods == "none" else arguments.methods
    stepper("lenet300", method, 1, arguments.device)[0]()  # loads and compiles what is needed
    on_cpu = arguments.device == "cpu"
    before = resident_memory() if on_cpu else torch.cuda.memory_allocated()
    step, _ = stepper(arguments.network, method, arguments.batch, arguments.device)
    for _ in range(5):
        step()
    after = peak_memory() if on_cpu else torch.cuda.max_memory_allocated()
    print(before / 1e6, after / 1e6)


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network whose linear layers and convolutions have no values yet."""
    with torch.device("meta"):
        module = build()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            layer.to_empty(device="cpu").reset_parameters()
    return module


def _move(callback: PruneAndGrow, weights: Sequence[MaskedWeight]) -> None:
    callback.update(weights, 0.3, 1.0)


def _rank(callback: PruneAndGrow, weights: Sequence[MaskedWeight]) -> None:
    ggr.ranking(weights, share(0.1, sum(weight.active for weight in weights)), [0] * len(weights))


def _mover(
    arguments: argparse.Namespace,
    method: str,
    storage: str,
    sparsity: float,
    device: str,
    move: Callable[[PruneAndGrow, Sequence[MaskedWeight]], None] = _move,
) -> Callable[[], float]:
    """Return a function that takes a step in which connections move, and returns the seconds that ``move`` takes."""
    torch.manual_seed(0)
    build, shape = NETWORKS[arguments.network]
    callback = METHODS[method](sparsity=sparsity, **({"storage": storage} if storage != "masked" else {}))
    if not isinstance(callback, PruneAndGrow) or type(callback).update is PruneAndGrow.update:
        raise ValueError(f"--methods: an update of {method} cannot be measured by itself.")
    if storage == "sparse":
        module = _on_meta(build)
        choices = [choice for choice in choose(module) if choice.reason is None]
        layers = [module.get_submodule(choice.name.rpartition(".")[0]) for choice in choices]
        callback.initial_masks([SparseWeight(c.name, c.shape, layer) for c, layer in zip(choices, layers, strict=True)])
    else:
        module = build().to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    callback.attach([choice for choice in choose(module) if choice.reason is None], [optimizer], False)
    (pool,) = callback._pools.values()
    x = torch.randn(arguments.batch, *shape, device=device)

    def step() -> float:
        optimizer.zero_grad()
        capture = Capture(pool.weights, torch.Tensor.detach)
        module(x).square().mean().backward()
        start = time.perf_counter()
        with torch.no_grad():
            move(callback, pool.weights)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        capture.close()
        callback.before_step(optimizer, 1.0, 1.0)
        optimizer.step()
        callback.after_step(optimizer)
        return seconds

    return step


def ranking(arguments: argparse.Namespace) -> None:
    """Print how long GGR takes to find which layers get a tenth of the connections: the first update's share."""
    print(f"{arguments.network}, {_hardware(arguments.device)}")
    for sparsity in (arguments.sparsities or "0.9").split(","):
        step = _mover(arguments, "ggr", "masked", float(sparsity), arguments.device, _rank)
        times = [1e3 * step() for _ in range(arguments.rounds)]
        print(
            f"{sparsity} ranking: {statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f})", flush=True
        )


def update(arguments: argparse.Namespace) -> None:
    """Print how long an update of the connections takes, beside a dense step of the same run, and the peak memory."""
    print(f"{arguments.network}, batch {arguments.batch}, {_hardware(arguments.device)}")
    dense, _ = stepper(arguments.network, None, arguments.batch, arguments.device)
    print(f"dense step: {1e3 * _seconds(dense, 2, arguments.device):.0f} ms")
    del dense
    own = [sys.executable, "-m", "lightning_sparse.bench", "moved", "--network", arguments.network]
    own += ["--batch", str(arguments.batch), "--device", arguments.device, "--threads", str(arguments.threads)]
    for sparsity in (arguments.sparsities or "0.9").split(","):
        for name in arguments.methods.split(","):
            for kind in arguments.storages.split(","):
                step = _mover(arguments, name, kind, float(sparsity), arguments.device)
                times = [1e3 * step() for _ in range(arguments.rounds)]
                del step
                command = [*own, "--methods", name, "--storages", kind, "--sparsities", sparsity]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                before, after = map(float, printed.split())
                print(
                    f"{sparsity} {name:5s} {kind:6s} update: {statistics.median(times):.0f} ms "
                    f"({min(times):.0f} to {max(times):.0f}); peak {after - before:.0f} MB above the process's own",
                    flush=True,
                )


def moved(arguments: argparse.Namespace) -> None:
    """Print this process's memory in MB before a network is made, and its peak after three updates of connections."""
    name, kind, device = arguments.methods, arguments.storages, arguments.device
    sparsity = float(arguments.sparsities)
    _mover(argparse.Namespace(network="lenet300", batch=1), name, kind, sparsity, device)()  # loads what is needed
    before = resident_memory() if device == "cpu" else torch.cuda.memory_allocated()
    step = _mover(arguments, name, kind, sparsity, device)
    for _ in range(3):
        step()
    after = peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated()
    print(before / 1e6, after / 1e6)


def _stored(arguments: argparse.Namespace, storage: str, sparsity: float) -> Callable[[], None]:
    """Return a function that takes one step of training of a network whose weights are stored so."""
    torch.manual_seed(0)
    build, shape = NETWORKS[arguments.network]
    if storage == "sparse":
        module = _on_meta(build)
        for layer in list(module.modules()):
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                size = layer.weight.numel()
                make_sparse_(layer, sampling.distinct(budget(sparsity, size), size, torch.default_generator))
    else:
        module = build()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    callback = None
    if storage == "masked":
        callback = SET(sparsity, distribution="uniform", update_every=_NEVER)
        callback.attach([choice for choice in choose(module) if choice.reason is None], [optimizer], False)
    x, y = torch.randn(arguments.batch, *shape), torch.randint(10, (arguments.batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
        if callback is not None:
            callback.before_step(optimizer, 1.0, 1.0)
            callback.enter_step(optimizer)
        optimizer.step()
        if callback is not None:
            callback.after_step(optimizer)

    return step


def storage(arguments: argparse.Namespace) -> None:
    """Print step time and peak memory with masks and with sparse layers over those of dense training."""
    print(f"{arguments.network}, batch {arguments.batch}, {_hardware('cpu')}, {backend(torch.zeros(1)).__name__}")
    own = [sys.executable, "-m", "lightning_sparse.bench", "stored", "--network", arguments.network]
    own += ["--batch", str(arguments.batch), "--threads", str(arguments.threads)]

    def peak_above(kind: str, sparsity: float) -> float:
        command = [*own, "--methods", kind, "--sparsities", str(sparsity)]
        before, after = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        return after - before

    memory = peak_above("dense", 0.0)
    print(f"dense: peak {memory:.0f} MB above the process's own memory")
    print("sparsity  step time / dense: masked  sparse (range)           peak memory / dense: masked  sparse")
    for sparsity in map(float, (arguments.sparsities or "0.9,0.95,0.98,0.99,0.995").split(",")):
        dense = _stored(arguments, "dense", 0.0)
        steps = {kind: _stored(arguments, kind, sparsity) for kind in ("masked", "sparse")}
        for step in (dense, *steps.values()):
            step()
        count = {kind: max(1, int(arguments.seconds / _seconds(step, 1, "cpu"))) for kind, step in steps.items()}
        ratios: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(arguments.rounds):
            for kind, step in steps.items():
                before, ours = _seconds(dense, 1, "cpu"), _seconds(step, count[kind], "cpu")
                ratios[kind].append(2 * ours / (before + _seconds(dense, 1, "cpu")))
        times = {kind: statistics.median(values) for kind, values in ratios.items()}
        low, high = min(ratios["sparse"]), max(ratios["sparse"])
        peaks = {kind: peak_above(kind, sparsity) / memory for kind in steps}
        print(
            f"{sparsity:<8g}  {times['masked']:25.3f}  {times['sparse']:6.3f} ({low:.3f} to {high:.3f})"
            f"  {peaks['masked']:27.3f}  {peaks['sparse']:6.3f}",
            flush=True,
        )


def stored(arguments: argparse.Namespace) -> None:
    """Print this process's memory in MB before a network is made and its peak after five steps."""
    kind, sparsity = arguments.methods, float(arguments.sparsities)
    small = argparse.Namespace(network="lenet300", batch=1)
    _stored(small, kind, sparsity)()  # loads and compiles what is needed
    before = resident_memory()
    step = _stored(arguments, kind, sparsity)
    for _ in range(5):
        step()
    print(before / 1e6, peak_memory() / 1e6)


class _Idle(SparseCallback):
    """A method that does nothing: what remains is what Lightning's hooks cost."""

    masks: dict[str, Tensor] = {}  # noqa: RUF012

    def attach(self, choices: object, optimizers: object, resumed: bool) -> None:
        """Nothing, as all verbs here."""

    def attach_more(self, choices: object, optimizer: object) -> None:
        pass

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        pass

    def before_step(self, optimizer: object, share: float, scale: float) -> None:
        pass

    def enter_step(self, optimizer: object) -> None:
        pass

    def after_step(self, optimizer: object) -> None:
        pass

    def leave_step(self) -> None:
        pass


class _Plain(LightningModule):
    """A network as a LightningModule, with nothing logged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class _Repeated(Dataset[list[Tensor]]):
    """One batch, handed out ``count`` times."""

    def __init__(self, batch: list[Tensor], count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.batch


def _fit(
    network: nn.Module, batch: list[Tensor], steps: int, callbacks: list[Callback], logger: Any = False, **options: Any
) -> float:
    """Return the seconds of a step in a Trainer that does nothing else."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    start = time.perf_counter()
    trainer.fit(_Plain(network), DataLoader(_Repeated(batch, steps), batch_size=None))
    return (time.perf_counter() - start) / steps


def hooks(arguments: argparse.Namespace) -> None:
    """Print what a step costs more in a Trainer with a callback that has all hooks but does no arithmetic."""
    batch = [torch.randn(1, 2), torch.zeros(1, dtype=torch.long)]

    def fit(callbacks: list[Callback]) -> float:
        return 1e6 * _fit(nn.Linear(2, 2), batch, 2000, callbacks)

    print(f"a step of a 2 x 2 layer in a Trainer, {_hardware('cpu')}")
    fit([_Idle()])
    pairs = [(fit([]), fit([_Idle()])) for _ in range(arguments.rounds)]
    extra = [hooked - bare for bare, hooked in pairs]
    bare = statistics.median(bare for bare, _ in pairs)
    print(f"hooks: +{statistics.median(extra):.0f} us a step ({min(extra):.0f} to {max(extra):.0f}) on {bare:.0f}")


class Traffic(Callback):
    """Counts the bytes that a process hands over to be averaged or summed in each step: by DDP and by callbacks.

    Args:
        path: file to which the first process writes the list when the training ends; default: none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        #: bytes of each optimizer step
        self.steps: list[int] = []
        self._bytes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to DDP and to ``torch.distributed.all_reduce``."""
        self._all_reduce = distributed.all_reduce
        distributed.all_reduce = self._counted
        model: Any = trainer.strategy.model
        model.register_comm_hook(None, lambda state, bucket: self._averaged(bucket))  # DDP reads annotations

    def on_before_zero_grad(self, *args: Any) -> None:
        """Begin a step."""
        if self._bytes:
            self.steps.append(self._bytes)
        self._bytes = 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no longer."""
        self.on_before_zero_grad()
        distributed.all_reduce = self._all_reduce
        if self.path is not None and trainer.is_global_zero:
            torch.save(self.steps, self.path)

    def _counted(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._bytes += tensor.nbytes
        return self._all_reduce(tensor, *args, **kwargs)

    def _averaged(self, bucket: Any) -> torch.futures.Future[Tensor]:
        self._bytes += bucket.buffer().nbytes
        sent: Any = self._all_reduce(bucket.buffer(), async_op=True)
        averaged: torch.futures.Future[Tensor] = sent.get_future().then(
            lambda future: future.value()[0].div_(distributed.get_world_size())
        )
        return averaged


def traffic(arguments: argparse.Namespace) -> None:
    """Print the bytes that each of two processes (gloo) hands over in a step, dense and with ``storage="sparse"``."""
    build, shape = NETWORKS[arguments.network]
    batch = [torch.randn(arguments.batch, *shape), torch.randint(10, (arguments.batch,))]

    def sent(callbacks: list[Callback]) -> list[int]:
        with TemporaryDirectory() as folder:
            strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
            traffic = Traffic(Path(folder) / "steps")
            _fit(build(), batch, 6, [*callbacks, traffic], strategy=strategy, devices=2, use_distributed_sampler=False)
            steps: list[int] = torch.load(Path(folder) / "steps")
        return steps

    dense = min(sent([]))
    print(f"{arguments.network}, two processes, torch {torch.__version__}; bytes of a step, over those of a dense one")
    print(f"dense: {dense}")
    options: dict[str, Any] = {"distribution": "uniform", "update_every": 3, "stop_at": 1.0}
    for sparsity in map(float, (arguments.sparsities or "0.9,0.98").split(",")):
        for method in (SET, MemoryEfficientDST):
            steps = sent([method(sparsity, storage="sparse", **options)])
            print(
                f"{sparsity:<8g}  {method.__name__:20s}{min(steps):12d} ({min(steps) / dense:.4f}); "
                f"when connections move {max(steps):12d} ({max(steps) / dense:.4f})",
                flush=True,
            )


def trainer(arguments: argparse.Namespace) -> None:
    """Print, for each method, the time of a step in a Trainer over that of the same Trainer without a callback."""
    build, shape = NETWORKS[arguments.network]
    batch = [torch.randn(arguments.batch, *shape), torch.randint(10, (arguments.batch,))]
    steps = max(5, int(arguments.seconds / _fit(build(), batch, 5, [])))

    def fit(callbacks: list[Callback]) -> float:
        return 1e3 * _fit(build(), batch, steps, callbacks)

    print(f"{arguments.network}, batch {arguments.batch}, in a Trainer, {_hardware('cpu')}")
    for name in arguments.methods.split(","):
        fit([METHODS[name]()])
        triples = [(fit([]), fit([METHODS[name]()]), fit([])) for _ in range(arguments.rounds)]
        ratios = [2 * sparse / (before + after) for before, sparse, after in triples]
        dense = statistics.median(before for before, _, _ in triples)
        print(
            f"{name:10s} step time / dense: {statistics.median(ratios):.3f} "
            f" ({min(ratios):.3f} to {max(ratios):.3f}); dense step {dense:.3f} ms",
            flush=True,
        )


class _TimedMonitor(SparsityMonitor):
    """Adds up the time that its own hooks take."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, float] = {}
        for name in ("batch_start", "batch_end", "epoch_end", "start", "end"):
            setattr(self, f"on_train_{name}", partial(self._timed, name, getattr(self, f"on_train_{name}")))

    def _timed(self, name: str, hook: Callable[..., None], *args: Any) -> None:
        first = name == "batch_start" and not self._head
        start = time.perf_counter()
        hook(*args)
        key = "begin" if first else name
        self.spent[key] = self.spent.get(key, 0.0) + time.perf_counter() - start


def monitor(arguments: argparse.Namespace) -> None:
    """Print the share of SparsityMonitor's hooks in the time of an epoch in a Trainer that logs."""
    build, shape = NETWORKS[arguments.network]
    batch = [torch.randn(arguments.batch, *shape), torch.randint(10, (arguments.batch,))]
    CSVLogger = import_module(f"{PACKAGE}.loggers").CSVLogger
    print(f"{arguments.network}, batch {arguments.batch}, {arguments.steps} steps an epoch, {_hardware('cpu')}")
    for name in arguments.methods.split(","):
        ratios, spent = [], []
        for _ in range(arguments.rounds + 1):  # the first warms up
            timed = _TimedMonitor()
            callbacks: list[Callback] = [timed] if name == "none" else [METHODS[name](), timed]
            with TemporaryDirectory() as folder:
                start = time.perf_counter()
                _fit(build(), batch, arguments.steps, callbacks, CSVLogger(folder))
                whole = time.perf_counter() - start
            rest = whole - sum(timed.spent.values())
            once = timed.spent["begin"]
            ratios.append((whole - once) / rest)
            spent.append({**timed.spent, "step": rest})
        parts = {key: 1e3 * statistics.median(row[key] for row in spent[1:]) for key in spent[0]}
        steps = arguments.steps
        print(
            f"{name:10s} time with the monitor / without: {statistics.median(ratios[1:]):.4f} "
            f"({min(ratios[1:]):.4f} to {max(ratios[1:]):.4f}); "
            f"before the first step {parts['begin']:.0f} ms more; an epoch's end {parts['epoch_end']:.1f} ms, "
            f"a step {1e3 * (parts['batch_start'] + parts['batch_end']) / steps:.1f} us "
            f"of {1e3 * parts['step'] / steps:.0f}",
            flush=True,
        )


def _hardware(device: str) -> str:
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    backend = kernels.for_tensors(torch.zeros(1, 1), torch.zeros(1, 1)).__name__.rsplit(".", 1)[1]
    return f"{torch.get_num_threads()} CPU thread(s), {backend}, torch {torch.__version__}"


def main(arguments: list[str] | None = None) -> None:
    """Run a benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m lightning_sparse.bench", description=__doc__)
    benchmarks = {
        "overhead": overhead,
        "memory": memory,
        "update": update,
        "ranking": ranking,
        "compile": compiled,
        "trainer": trainer,
        "hooks": hooks,
        "monitor": monitor,
        "peak": peak,
        "storage": storage,
        "stored": stored,
        "moved": moved,
        "traffic": traffic,
    }
    parser.add_argument("benchmark", choices=benchmarks)
    parser.add_argument("--network", choices=NETWORKS, default="lenet300")
    parser.add_argument("--methods", default="dst,dfbst,autosparse,str", help="separated by commas")
    parser.add_argument("--sparsities", help="for storage, update and traffic, separated by commas")
    parser.add_argument("--storages", default="masked", help="for update, separated by commas")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=938, help="of an epoch, for monitor; default: MNIST's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="how long one turn takes, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    benchmarks[parsed.benchmark](parsed)


if __name__ == "__main__":
    main()
