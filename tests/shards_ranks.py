"""Weights divided over processes by FSDP2: trainer/test_shards.py calls these functions in each process."""

import json
import os
import signal
import tempfile
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers import LATENT, MASKED, N_OF_M, PLAINLY, ROUNDS, SETTINGS, Largest, trainer
from lightning.fabric import Fabric
from lightning.fabric import strategies as fabric_strategies
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed, nn
from torch.distributed._composable.fsdp import fully_shard
from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_module, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import (
    GMP,
    ITOP,
    MEST,
    SET,
    SNFS,
    AutoSparse,
    FixedMask,
    RandomPruning,
    RigL,
    SparsityMonitor,
    TopKAST,
    attach,
)
from lightning_sparse.compat.shards import whole
from lightning_sparse.monitor import operations

EPOCHS, STEPS, BATCH = 3, 3, 12
MOVING = {"update_every": 2, "seed": 3}


def rigl(**options):
    return RigL(0.8, **options)


EVERY = {**SETTINGS, **ROUNDS, **N_OF_M}
#: by name: the method, the kind of module, and what is given to the Trainer
METHODS = {
    **{name: (build, "SGD", {}) for name, build in EVERY.items() if build().needs_whole_weights is None},
    "SWAT": (LATENT["SWAT"], "alike", {}),
    "RigL, AdamW": (rigl, "AdamW", {}),
    "RigL, AdamW foreach": (rigl, "AdamW foreach", {}),
    "RigL, AdamW fused": (rigl, "AdamW fused", {}),
    "RigL, accumulated and clipped": (rigl, "SGD", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "RigL, no gradient": (rigl, "no gradient", {}),
    "RigL, tied": (rigl, "tied", {}),
    "RigL, transposed": (lambda **kw: rigl(include=["net.*.weight"], **kw), "transposed", {}),
    "MEST, soft bound": (lambda **kw: MEST(0.8, soft_bound=True, **kw), "SGD", {}),
    "GMP, by layer": (
        lambda **kw: MASKED["GMP"](scope="layer", initial="magnitude", initial_sparsity=0.3, **kw),
        "SGD",
        {},
    ),
    "DST, AdamW, clipped": (LATENT["DST"], "AdamW", {"gradient_clip_val": 0.1}),
    "DST, layers collapse": (lambda: LATENT["DST"](alpha=0.2, reset_above=0.3, granularity="layer"), "SGD", {}),
    "DST, by weight": (lambda: LATENT["DST"](granularity="weight", threshold_weight_decay=0.1), "SGD", {}),
    "DFBST, AdamW, accumulated": (LATENT["DFBST"], "AdamW", {"accumulate_grad_batches": 2}),
    "STR, AdamW, clipped": (LATENT["STR"], "AdamW", {"gradient_clip_val": 0.1}),
    "AutoSparse, no gradient": (LATENT["AutoSparse"], "no gradient", {}),
    "TopKAST, global, AdamW": (
        lambda **kw: LATENT["TopKAST"](scope="global", power=2, **kw),
        "AdamW",
        {"gradient_clip_val": 0.1},
    ),
    "TopKAST, few, AdamW": (lambda **kw: TopKAST(0.95, 0.9, **kw), "AdamW", {}),  # some rows have none
    "DST, sparsity": (
        lambda: LATENT["DST"](alpha=None, sparsity=0.8, begin_at=0.0, end_at=0.6, min_layer_density=0.1),
        "SGD",
        {},
    ),
    "DFBST, sparsity": (lambda: LATENT["DFBST"](alpha=None, sparsity=0.7), "no gradient", {}),
    "AutoSparse, sparsity": (lambda: AutoSparse(sparsity=0.93, begin_at=0.0), "SGD", {}),  # some rows have none
    "STR, sparsity": (lambda: LATENT["STR"](sparsity=0.8, granularity="neuron"), "AdamW", {}),
    "OptG, tied": (LATENT["OptG"], "tied", {}),
}
#: methods that may have N:M, with N above half of M as well, where not all of a group can be dropped
METHODS |= {
    "RigL, 2:4": (lambda **kw: RigL(0.7, pattern="2:4", **kw), "groups", {}),
    "RigL, 3:4, AdamW": (lambda **kw: RigL(0.5, pattern="3:4", **kw), "groups, AdamW", {}),
    "SET, 2:4": (lambda **kw: SET(0.6, pattern="2:4", **kw), "groups", {}),
    "ITOP, 2:4": (lambda **kw: ITOP(0.5, pattern="2:4", growth="random", **kw), "groups", {}),
    "GMP, 2:4": (lambda **kw: GMP(0.7, pattern="2:4", **kw), "groups", {}),
    "RandomPruning, 1:4": (lambda **kw: RandomPruning(0.75, pattern="1:4", **kw), "groups", {}),
    "RigL, 2:4, magnitude": (lambda **kw: RigL(0.6, pattern="2:4", initial="global_magnitude", **kw), "groups", {}),
}
METHODS |= {
    "RigL, rows": (lambda **kw: RigL(0.6, pattern="row", **kw), "SGD", {}),
    "SET, blocks, AdamW": (lambda **kw: SET(0.6, pattern="block:2x3", **kw), "blocks, AdamW", {}),
    "GGR, blocks": (lambda **kw: MASKED["GGR"](pattern="block:1x3", **kw), "blocks", {}),
    "GMP, blocks": (lambda **kw: GMP(0.6, pattern="block:2x2", **kw), "blocks", {}),
    "ITOP, blocks": (lambda **kw: ITOP(0.6, pattern="block:2x2", **kw), "blocks", {}),
    "MEST, rows": (lambda **kw: MEST(0.6, pattern="row", **kw), "blocks", {}),
}
TRAIN = [name for name, build in MASKED.items() if build().needs_whole_weights is None]
METHODS |= {f"{name}, tensor parallel": (MASKED[name], "tensor parallel", {}) for name in TRAIN}
METHODS |= {
    "RigL, AdamW, tensor parallel": (rigl, "AdamW, tensor parallel", {}),
    "RigL, no gradient, tensor parallel": (rigl, "no gradient, tensor parallel", {}),
    "RigL, AdamW, sequence, tensor parallel": (rigl, "AdamW, sequence, tensor parallel", {}),
    "SNFS, sequence, tensor parallel": (MASKED["SNFS"], "sequence, tensor parallel", {}),
    "RigL, replicas": (rigl, "replicas", {}),
}
#: on four processes: rows divided twice, rows and columns, rows on two processes each
GRID = {
    f"{name}, {kind}": (MASKED[name], kind, {})
    for name, kind in [
        *((name, "tensor and data parallel") for name in ("RigL", "SET", "GGR", "DeepR", "MemoryEfficientDST", "GMP")),
        ("SET", "replicas"),
        ("GGR", "replicas"),
    ]
}
RESUMED = {
    "SNFS": (lambda **kw: SNFS(0.8, **kw), "AdamW", {}),
    "ITOP": (lambda **kw: ITOP(0.8, growth="random", **kw), "SGD", {}),
    "FixedMask": (MASKED["FixedMask"], "SGD", {}),
    "DFBST": (LATENT["DFBST"], "AdamW", {}),
    "STR": (LATENT["STR"], "SGD", {}),
    "TopKAST": (LATENT["TopKAST"], "AdamW", {}),
    "LotteryTicket": (ROUNDS["LotteryTicket"], "AdamW", {}),
    "ACDC": (ROUNDS["ACDC"], "AdamW", {}),
    **{name: METHODS[name] for name in ("RigL, 3:4, AdamW", "GGR, blocks")},
}


#: of each way to divide weights, and to keep thresholds and masks; of each way to go on
MONITORED = {
    *("RigL, AdamW", "DST, by weight", "STR", "TopKAST", "DeepR, tensor parallel", "RigL, transposed"),
    "GMP, by layer",  # some processes drop nothing
    *("SET, tensor and data parallel", "SET, replicas", "ITOP", "DFBST"),
}


class Divided(pl.LightningModule):
    """A regression whose layers are divided over processes; of the last layer, all but one process have no row."""

    def __init__(self, kind="SGD"):
        super().__init__()
        self.kind = kind
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 17), nn.ReLU(), nn.Linear(17, 7), nn.ReLU(), nn.Linear(7, 1)).double()
        if kind == "tied":
            self.net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1)).double()
            self.net[1].weight = self.net[0].weight
        if kind == "transposed":  # each process has some inputs of all outputs
            first = nn.Unflatten(1, (12, 1)), nn.ConvTranspose1d(12, 9, 3), nn.ReLU(), nn.Flatten()
            self.net = nn.Sequential(*first, nn.Linear(27, 1)).double()
        if "groups" in kind:  # of four inputs; a convolution, and a layer of which one process has no row
            first = nn.Unflatten(1, (4, 3)), nn.Conv1d(4, 7, 2), nn.ReLU(), nn.Flatten(), nn.Linear(14, 8), nn.ReLU()
            self.net = nn.Sequential(*first, nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1)).double()
        if kind == "odd":
            self.net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 1)).double()
        if "blocks" in kind:  # of up to two outputs
            first = nn.Unflatten(1, (6, 2)), nn.Conv1d(6, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 12), nn.ReLU()
            self.net = nn.Sequential(*first, nn.Linear(12, 4), nn.Linear(4, 1)).double()
        if kind == "meta":
            self.net.to("meta")

    def configure_model(self):
        strategy = self._trainer and self.trainer.strategy  # none: a checkpoint is loaded
        if not isinstance(strategy, ModelParallelStrategy) or self.kind == "plain":
            return
        if "tensor" in self.kind:
            mesh, last = self.device_mesh["tensor_parallel"], "data" not in self.kind
            divide_by_tensor(self.net, mesh, last, "sequence" in self.kind)
        if "columns" in self.kind:
            mesh = self.device_mesh["tensor_parallel"]
            parallelize_module(self.net, mesh, {"1": RowwiseParallel(input_layouts=Replicate())})
        if "columns" in self.kind or self.kind.endswith("tensor parallel"):
            return
        mesh = self.device_mesh["data_parallel"]
        if self.kind == "replicas":
            mesh = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("replicate", "shard"))
        layers = [layer for layer in self.net if isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d))]
        for layer in (*(layers if self.kind != "tied" else ()), self.net):
            fully_shard(layer, mesh=mesh)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = ((self.net(x).squeeze(1) - y) ** 2).mean()
        return 0 * loss if "no gradient" in self.kind else loss

    def configure_optimizers(self):
        if "AdamW" in self.kind or self.kind == "transposed":
            way = {each: True for each in ("foreach", "fused") if each in self.kind}
            return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.01, **way)
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def divide_by_tensor(net, mesh, last, sequence=False):
    """Divide outputs of the first layer, inputs of the second, unevenly; the last is the same on all, or left out.

    Of a sequence, the second layer is the same on all as well, and each process runs it on some examples.
    """
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
    if sequence:
        del plan["2"]
        distribute_module(net[2], mesh, input_fn=split, output_fn=lambda _, output, mesh: output.full_tensor())
    parallelize_module(net, mesh, plan)
    if last:
        distribute_module(
            net[4],
            mesh,
            input_fn=lambda _, inputs, mesh: DTensor.from_local(inputs[0], mesh, [Replicate()]),
            output_fn=lambda _, output, mesh: output.to_local(),
        )


def split(_, inputs, mesh):
    """Give each process some of the examples that all have, as sequence parallelism does with tokens."""
    return DTensor.from_local(inputs[0], mesh, [Replicate()]).redistribute(placements=[Shard(0)])


class Stops(pl.Callback):
    """Ends the fit with this epoch, and writes a checkpoint."""

    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == self.epoch

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def batches(rank, world):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 12, generator=generator, dtype=torch.float64)
    y = x[:, :3].prod(1) + x[:, 3:6].sum(1).sin()
    return DataLoader(TensorDataset(x[rank::world], y[rank::world]), BATCH // world)  # which make up global batches


def start(callbacks, world, full=True, tensor=1, **options):
    if world:
        strategy = ModelParallelStrategy(world // tensor, tensor, save_distributed_checkpoint=not full)
        options |= {"strategy": strategy, "devices": world}
    return trainer(callbacks, **{"max_epochs": EPOCHS, "use_distributed_sampler": False, **options})


def train(name, rank=0, world=0, saves=None, epoch=None, resumes=None, full=True):
    """Train in ``world`` processes, each of which holds some rows, or in one that holds all (0); some are monitored."""
    build, kind, options = {**METHODS, **GRID, **RESUMED}[name]
    tensor = 2 if world and "tensor" in kind else 1
    callback, module = build(**{key: value for key, value in MOVING.items() if key in build().arguments}), Divided(kind)
    monitor = SparsityMonitor(every_n_batches=3, flops=False)
    more = [*([Stops(saves, epoch)] if saves else []), *([monitor] if name in MONITORED else [])]
    folder = tempfile.TemporaryDirectory()
    run = start([callback, *more], world, full, tensor, default_root_dir=folder.name, **options)
    data = batches(0, 1) if kind == "alike" else batches(rank // tensor, max(world, 1) // tensor)
    run.fit(module, data, ckpt_path=resumes, **(PLAINLY if resumes else {}))
    return {
        "masks": {name: whole(mask) for name, mask in callback.masks.items()},
        "counts": callback.layer_count,
        "metrics": callback.extra_metrics,
        "thresholds": {name: whole(t) for name, t in callback.effective_thresholds.items()},
        "latents": {name: whole(W) for name, W in getattr(callback, "latents", {}).items()},
        "parameters": {name: whole(p.detach()) for name, p in module.named_parameters()},
        "moments": moments(run.optimizers[0], module),
        "seen": seen(Path(folder.name, "sparsity.json")),
    }


def seen(path):
    """Return what a monitor has written, but for times and memory; only the first process writes."""
    if not path.exists():
        return None
    file, varies = json.loads(path.read_text()), ("step_time_s", "peak_memory_bytes", "bytes", "thresholds")
    epochs = [{key: value for key, value in epoch.items() if key not in varies} for epoch in file["epochs"]]
    return {"epochs": epochs, "masks": file["masks"], "layers": file["layers"]}, levels(file["epochs"])


def levels(epochs):
    """Return the statistics of thresholds, one number after the other."""
    statistics = [found for epoch in epochs for found in epoch["thresholds"].values()]
    return [x for each in statistics for x in (each["mean"], *each["counts"], *each["edges"])]


def moments(optimizer, module):
    """Return what Adam keeps of the weights that a method makes sparse, of all processes."""
    states = {name: optimizer.state[p] for name, p in module.named_parameters() if p.ndim > 1}
    return {(name, key): whole(x) for name, state in states.items() for key, x in state.items() if "exp_avg" in key}


def looped(rank, world, stops=(), fabric=None, dtype=torch.float64):
    """Train with AdamW in a loop of its own, or of Fabric; ``stops``: after which steps it begins anew."""
    module, state = Divided("AdamW"), None
    net = module.net.to(dtype)
    if fabric:
        net = fabric.setup(net)
        optimizer = fabric.setup_optimizers(module.configure_optimizers())
    else:
        net = divided(net) if world else net
        optimizer = module.configure_optimizers()
    loader = [(x.to(dtype), y.to(dtype)) for x, y in batches(rank, max(world, 1))]
    done, all_batches = 0, EPOCHS * loader
    for stop in (*stops, len(all_batches)):
        sparse = attach(rigl(**MOVING), net, optimizer, steps=len(all_batches), steps_per_epoch=STEPS)
        if state is not None:
            sparse.load_state_dict(state)
        with sparse:
            for x, y in all_batches[done:stop]:
                optimizer.zero_grad()
                loss = ((net(x).squeeze(1) - y) ** 2).mean()
                (fabric.backward if fabric else torch.Tensor.backward)(loss)
                optimizer.step()
            state, done = sparse.state_dict(), stop
    return {
        "masks": {f"net.{name}": whole(mask) for name, mask in sparse.masks.items()},
        "counts": {f"net.{name}": count for name, count in sparse.method.layer_count.items()},
        "metrics": sparse.method.extra_metrics,
        "thresholds": {},
        "latents": {},
        "parameters": {name: whole(p.detach()) for name, p in module.named_parameters()},
        "moments": moments(optimizer, module),
        "seen": None,
    }


def divided(net, mesh=None):
    """Divide the layers over all processes, or those that hold other batches."""
    for layer in (net[0], net[2], net[4], net):
        fully_shard(layer, mesh=mesh and mesh["data_parallel"])
    return net


def with_fabric(rank, world):
    """Train in a loop of Fabric, whose strategy divides the weights."""
    strategy = fabric_strategies.ModelParallelStrategy(divided, world, 1)
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
    fabric.launch()
    return looped(rank, world, fabric=fabric, dtype=torch.float32)  # it takes no other


# ---------------------------------------------------------------------- what each process does


def run_all(folder, methods):
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    results = {name: train(name, rank, world) for name in methods}
    if world == 2:
        results |= {"again": again(rank, folder), "largest": largest(rank), "mixed": mixed(rank)}
        results |= {"watched": watched(rank, world)}
        results |= {"bytes": sent(), "bytes, columns": sent("columns", tensor=2)}
        results |= {"bytes, drawn": sent("columns", tensor=2, build=SET)}
        results |= {"bytes, AdamW": sent("AdamW, columns", tensor=2)}
        results |= {"warned": warned(rank), "latent step": latent_step(rank), "loop refused": loop_refused()}
        results |= {"refused": refused(RigL(0.8, **MOVING), world, "plain")}
        results |= {"rows": refused(RigL(0.6, pattern="row", **MOVING), world, "tensor parallel", tensor=2)}
        results |= {"cut": refused(RigL(0.6, pattern="block:2x2", **MOVING), world, "odd")}
        results |= {"other rows": refused(LATENT["TopKAST"](include=["net.*.weight"]), world, "transposed")}
        results |= {"looped": looped(rank, world), "looped, in two": looped(rank, world, stops=(5,))}
        results |= {"with Fabric": with_fabric(rank, world), "in float32": looped(rank, world, dtype=torch.float32)}
    if world == 4:
        results |= {"refused": refused(RigL(0.8, **MOVING), world, "tensor parallel", tensor=2)}
    finish(folder / f"{world}.pt", results)


def run_resumed(folder, before, epoch):
    """Go on from where ``before`` processes have stopped, if any have, and stop after an epoch."""
    rank, world, results = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), {}
    for name in RESUMED:
        for full in (True, False):
            saves, resumes = (folder / f"{name}-{full}-{ranks}.ckpt" for ranks in (world, before))
            results[name, full] = train(name, rank, world, saves, epoch, resumes if before else None, full)
    finish(folder / f"resumed-{world}.pt", results)


class Dies(pl.Callback):
    """Kills one process in the second epoch: in the middle of a move of ``method``; without one, before a step."""

    def __init__(self, path, rank, method=None):
        self.path, self.rank, self.method = path, rank, method

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)
        if self.rank == 1 and self.method:
            self.method.grow = self.die

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.rank == 1 and not self.method and trainer.current_epoch:
            self.die()

    def die(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


def run_killed(folder):
    """Note how a process ends when another is killed, without a method and with one."""
    rank = int(os.environ["LOCAL_RANK"])
    method = rigl(**MOVING) if folder.name == "RigL" else None
    callbacks = [Dies(folder / "last.ckpt", rank, method), *([method] if method else [])]
    try:
        start(callbacks, 2).fit(Divided(), batches(rank, 2))
    except RuntimeError:
        (folder / "error.txt").write_text(traceback.format_exc())


def finish(path, results):
    if distributed.get_rank() == 0:
        torch.save(results, path)
    distributed.destroy_process_group()  # without it gloo's threads now and then abort the exit


def again(rank, folder):
    """Train a module twice with one callback, then another from a file of its masks; return those after each fit."""
    callback, module, masks = RandomPruning(0.8), Divided(), []
    for _ in range(2):
        start(callback, 2, max_epochs=1).fit(module, batches(rank, 2))
        module.configure_model = lambda: None  # it is divided
        masks.append({name: whole(mask) for name, mask in callback.masks.items()})
    callback.save_masks(folder / "masks.safetensors")
    other = FixedMask(initial=folder / "masks.safetensors")
    start(other, 2, max_epochs=1).fit(Divided(), batches(rank, 2))
    return [*masks, {name: whole(mask) for name, mask in other.masks.items()}]


def sent(kind="SGD", tensor=1, build=RigL, widths=(16, 128)):
    """Return how many bytes a process hands over in a move, of RigL or another, for square layers of these widths."""
    found, all_reduce = {}, distributed.all_reduce
    for width in widths:
        callback, module = build(0.8, update_every=1, exclude=["net.0.*", "net.2.*"]), Divided(kind)
        module.net = nn.Sequential(nn.Linear(12, width), nn.Linear(width, width), nn.Linear(width, 1))
        counted, moves, move = [], [], callback.move

        def count(x, counted=counted, **options):
            counted.append(x.nbytes)
            return all_reduce(x, **options)

        def moved(*arguments, counted=counted, moves=moves, move=move):
            before = sum(counted)
            move(*arguments)
            moves.append(sum(counted) - before)

        distributed.all_reduce = count
        callback.move = moved
        x = torch.randn(24, 12)
        start(callback, 2, tensor=tensor, max_epochs=1).fit(module, DataLoader(TensorDataset(x, x[:, 0]), 6))
        found[width] = moves
    distributed.all_reduce = all_reduce
    return found


class _Looks(RigL):
    """Notes the largest tensor that is made while a fit starts and connections move."""

    def on_fit_start(self, trainer, pl_module):
        with Largest() as self.seen:
            super().on_fit_start(trainer, pl_module)

    def move(self, *arguments):
        with Largest() as seen:
            super().move(*arguments)
        self.seen.size = max(self.seen.size, seen.size)


def largest(rank):
    """Return the number of elements of the largest tensor that a fit makes, with 128 x 256 of a weight here."""
    callback, module = _Looks(0.8, update_every=1, exclude=["net.0.*", "net.2.*"]), Divided()
    module.net = nn.Sequential(nn.Linear(12, 256), nn.Linear(256, 256), nn.Linear(256, 1))
    x = torch.randn(24, 12)
    start(callback, 2, max_epochs=1).fit(module, DataLoader(TensorDataset(x, x[:, 0]), 6))
    return callback.seen.size


def mixed(rank):
    """Train in bfloat16; return the numbers of connections, and how many values are not 0."""
    callback, module = RigL(0.8, **MOVING), Divided()
    module.net = module.net.float()
    x = torch.randn(24, 12)
    start(callback, 2, precision="bf16-mixed").fit(module, DataLoader(TensorDataset(x, x[:, 0]), 6))
    weights = dict(module.named_parameters())
    return callback.layer_count, {name: int((whole(weights[name]) != 0).sum()) for name in callback.masks}


def watched(rank, world):
    """Return what a monitor writes of a dense run, and what it tells."""
    told = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "rank_zero_info", told.append)
        start(SparsityMonitor(), world, max_epochs=1, default_root_dir=folder).fit(Divided(), batches(rank, world or 1))
        path = Path(folder, "sparsity.json")
        return (json.loads(path.read_text()) if path.exists() else None), told


def warned(rank):
    """Return the warnings of a module that is initialised once it is divided."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(RigL(0.8, **MOVING), 2, max_epochs=1).fit(Divided("meta"), batches(rank, 2))
    return [str(warning.message) for warning in caught]


class _Gradients(pl.Callback):
    """Keeps the gradients that an update is made with, whole; stands behind the method."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.whole = {name: whole(p.grad) for name, p in pl_module.named_parameters()}


def latent_step(rank):
    """Return latent weights after one update, and what the optimizer makes of them by themselves."""
    callback, gradients, module = LATENT["OptG"](), _Gradients(), Divided("AdamW")
    start([callback, gradients], 2, max_epochs=1, limit_train_batches=1).fit(module, batches(rank, 2))
    plain = {name: p for name, p in Divided("AdamW").named_parameters() if name in callback.latents}
    for name, p in plain.items():
        p.grad = gradients.whole[name]
    torch.optim.AdamW(plain.values(), 0.01, weight_decay=0.01).step()
    return {name: whole(W) for name, W in callback.latents.items()}, {n: p.detach() for n, p in plain.items()}


def loop_refused():
    """Return why a method with latent weights cannot train DTensors in a loop of its own."""
    module = nn.Sequential(nn.Linear(8, 4))
    fully_shard(module)
    try:
        attach(SETTINGS["STR"](), module, torch.optim.SGD(module.parameters(), 0.1), steps=3).__enter__()
    except MisconfigurationException as error:
        return str(error)


def refused(callback, world, kind, tensor=1):
    """Return why weights that are divided in this way cannot be trained."""
    try:
        start(callback, world, tensor=tensor).fit(Divided(kind), batches(0, 2))
    except MisconfigurationException as error:
        return str(error)
