"""SparsityMonitor: writes the record of a run, sparse or dense, to its loggers and to ``sparsity.json``."""

import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.accounting.flops import Average, Flops, dense_flops, inference, training
from lightning_sparse.accounting.masks import Explored, churn, spread
from lightning_sparse.accounting.memory import peak_memory, stored_bytes
from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.compat.lightning import Callback, LightningModule, Trainer, check_trainer, rank_zero_warn
from lightning_sparse.layers.selection import choose
from lightning_sparse.monitor import run_file
from lightning_sparse.monitor.clock import Clock
from lightning_sparse.monitor.figures import draw, painters
from lightning_sparse.monitor.layer import COUNTS, Layer, picture
from lightning_sparse.monitor.record import batch_size, described, metrics, scalars
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.trainer.probe import probing

__all__ = ["SparsityMonitor"]


class SparsityMonitor(Callback):
    """Logs density, theoretical operations, bytes, memory, time and the life of the masks; warns of collapsing layers.

    It stands beside any sparse callbacks, in any order, or alone in a dense run, whose densities are 1. Once an epoch
    it logs through ``pl_module.log`` and writes ``sparsity.json`` into the log directory. Training is the same bit for
    bit with it and without it.

    Args:
        every_n_batches: masks that may change at any step are looked at after every so many batches, the others
            whenever connections have moved, and all at the end of an epoch: the average of training operations and
            the exploration rate are made of these looks.
        collapse_below: warn of a layer whose density falls below this, in [0, 1]; None: of one with fewer weights than
            output neurons. Of layers without any weight the methods warn themselves.
        flops: count operations, by one pass forward and backward of a copy of the module on the first batch.
        figures: draw densities and masks for TensorBoard at the end of each epoch (extra ``report``).

    Raises:
        ValueError: an argument is out of range.
        ModuleNotFoundError: ``figures`` without matplotlib.

    Example:
        >>> from lightning_sparse import DST, SparsityMonitor
        >>> callbacks = [DST(alpha=5e-4), SparsityMonitor()]
    """

    def __init__(
        self, every_n_batches: int = 200, collapse_below: float | None = None, flops: bool = True, figures: bool = False
    ) -> None:
        checks.integer(1, "Looks cost time: 200 is a good start.", every_n_batches=every_n_batches)
        if collapse_below is not None:
            checks.fraction("None warns of fewer weights than output neurons.", collapse_below=collapse_below)
        if figures:
            extra("matplotlib", "report")
        self.every_n_batches = every_n_batches
        self.collapse_below = collapse_below
        self.flops = flops
        self.figures = figures
        self._restored = False
        self._forget()

    def _forget(self) -> None:
        """Begin a run."""
        self._methods: list[SparseCallback] = []
        self._layers: list[Layer] = []
        self._flops: dict[str, Flops] = {}
        self._file: Path | None = None
        self._head: dict[str, Any] = {}
        self._pictures: dict[str, Any] = {}
        self._low: set[str] = set()
        self._begun = time.monotonic()
        # kept in checkpoints
        self._started = run_file.now()
        self._earlier = 0.0  # seconds that the run took before it was resumed
        self._from_step: int | None = None
        self._epochs: dict[int, str] = {}  # records as JSON
        self._training = Average()
        self._updates = Average()
        self._explored = Explored()
        self._epoch_bits: dict[str, Tensor] = {}  # masks at the end of the epoch before
        # of the epoch
        self._latest: dict[str, Any] | None = None
        self._clock = Clock()
        # of the latest look at the masks
        self._batches = 0  # since then
        self._step = 0
        self._bits: dict[str, Tensor] = {}
        self._connections: list[tuple[SparseCallback, dict[str, Tensor]]] = []  # of methods that tell
        self._density: dict[str, float] = {}
        self._gradient_density: dict[str, float] = {}

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        check_trainer(trainer, self)
        if stage == "fit":
            self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the methods and the place of the file."""
        self._methods = [c for c in trainer.callbacks if isinstance(c, SparseCallback)]  # type: ignore[attr-defined]
        folder = trainer.log_dir or trainer.default_root_dir  # asks all processes
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._file = Path(folder, run_file.FILE)
        if self._from_step is None:
            self._from_step = self._step = trainer.global_step
        if self.figures and not painters(trainer):
            rank_zero_warn("SparsityMonitor(figures=True) draws for loggers that take figures, such as TensorBoard's.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what was logged at the end of the last epoch after this callback had its turn."""
        self._close(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock; before the first step, when every method has its masks, describe the run."""
        if not self._head:
            self._begin(trainer, pl_module, batch)
        self._clock.start(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; look at the masks now and then, and when connections have moved."""
        self._clock.stop()
        self._batches += 1
        moved = self._moved() if self._connections else []
        if moved or (self._batches >= self.every_n_batches and len(self._connections) < len(self._methods)):
            self._look(trainer, pl_module, moved)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write."""
        if not self._head:
            return
        self._close(trainer)
        self._look(trainer, pl_module, self._moved(), draw=True)
        self._latest = self._record(trainer, pl_module)
        self._latest["metrics"] = metrics(trainer)
        self._epoch_bits, self._updates, self._clock = self._bits, Average(), Clock()
        pl_module.log("density/model", self._latest["density"], logger=False, prog_bar=True, sync_dist=True)
        # straight to the loggers: the bookkeeping of `log` costs about a millisecond a name
        values = {"epoch": trainer.current_epoch, **scalars(self._latest)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        if self.figures and trainer.is_global_zero:
            densities = {layer.name: self._density.get(layer.name, 1.0) for layer in self._layers}
            for painter in painters(trainer):
                for name, figure in draw(densities, self._pictures).items():
                    painter.add_figure(f"monitor/{name}", figure, global_step=trainer.global_step)
        self._write("running")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what was logged last."""
        self._close(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that the run has finished."""
        self._write("finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write how the run ended, without asking other processes, which may not have ended."""
        interrupted = isinstance(exception, KeyboardInterrupt) or type(exception).__name__ == "SIGTERMException"
        self._write("interrupted" if interrupted else "failed")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the methods."""
        if stage == "fit":
            self._methods, self._layers, self._connections = [], [], []

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return averages, explored connections as bits, and the epochs so far: tensors and plain values only."""
        return {
            "started": self._started,
            "wall_time_s": self._wall_time(),
            "from_step": self._from_step or 0,
            "epochs": {str(epoch): text for epoch, text in self._all_epochs().items()},
            "training": vars(self._training).copy(),
            "updates": vars(self._updates).copy(),
            "explored": self._explored.state_dict(),
            "epoch_bits": dict(self._epoch_bits),
            "look": {
                "step": self._step,
                "density": dict(self._density),
                "gradient_density": dict(self._gradient_density),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an earlier run."""
        self._started, self._earlier = state_dict["started"], state_dict["wall_time_s"]
        self._from_step = state_dict["from_step"]
        self._epochs = {int(epoch): text for epoch, text in state_dict["epochs"].items()}
        self._training, self._updates = Average(**state_dict["training"]), Average(**state_dict["updates"])
        self._explored.load_state_dict(state_dict["explored"])
        self._epoch_bits = {name: bits.cpu() for name, bits in state_dict["epoch_bits"].items()}
        look = state_dict["look"]
        self._step, self._density = look["step"], dict(look["density"])
        self._gradient_density = dict(look["gradient_density"])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the Trainer's part and what ties the callback to a fit."""
        state = {**self.__dict__, "_methods": [], "_layers": [], "_connections": [], "_clock": Clock()}
        for attached in ("log", "log_dict"):  # the module's methods, which the Trainer gives its callbacks
            state.pop(attached, None)
        return state

    # ------------------------------------------------------------------ the run

    def _begin(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Describe the run, and look at the masks it begins with."""
        self._flops = trainer.strategy.broadcast(self._count(trainer, module, batch) if self.flops else {})
        self._find_layers(module)
        self._keep_fitting()
        examples = batch_size(batch)
        self._head = {
            "method": described(self._methods),
            "module": f"{type(module).__module__}.{type(module).__qualname__}",
            "seed": run_file.seed(),
            "from_step": self._from_step,
            "versions": run_file.versions(),
            "hardware": run_file.hardware(trainer),
            "flops_of": None if not self._flops else "batch" if examples is None else "example",
            **self._sizes(module, examples),
        }
        self._look(trainer, module, [])
        if not self._epoch_bits:
            self._epoch_bits = self._bits
        self._write("running")

    def _count(self, trainer: Trainer, module: LightningModule, batch: Any) -> dict[str, Flops]:
        """Count the operations of a step on this batch, on a copy of the module; nothing if that cannot be done."""
        reason = "it optimizes manually"
        if module.automatic_optimization:
            try:
                with probing(trainer, module, []) as probe:
                    return dense_flops(probe.module, lambda: probe.loss(copy.deepcopy(batch), 0))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        rank_zero_warn(
            f"SparsityMonitor could not count the operations of {type(module).__name__} on a copy of it ({reason}): "
            "it reports densities, time and memory alone. SparsityMonitor(flops=False) does so without a warning."
        )
        return {}

    def _find_layers(self, module: LightningModule) -> None:
        """List the selected weights: those that the methods have, in a dense run those that they would choose."""
        choices = {choice.name: choice for choice in choose(module)}
        owners: dict[str, SparseCallback | None] = {}
        for method in self._methods:
            owners |= dict.fromkeys(method.layer_density, method)
        if not self._methods:
            owners = dict.fromkeys(name for name, choice in choices.items() if choice.reason is None)
        self._layers = [
            Layer(
                name,
                choice.shape,
                int(getattr(module.get_submodule(name.rpartition(".")[0]), "groups", 1)),
                choice.transposed_groups,
                owners[name],
            )
            for name, choice in choices.items()
            if name in owners
        ]

    def _sizes(self, module: LightningModule, examples: int | None) -> dict[str, Any]:
        """Return what the file says of the weights."""
        parameters = sum(math.prod(choice.shape) for choice in choose(module))

        def of_one(operations: int) -> int | None:
            return round(operations / (examples or 1)) if self._flops else None

        layers = []
        for layer in self._layers:
            flops = self._flops.get(layer.name, Flops())
            counts = {f"dense_{pass_}_flops": of_one(count) for pass_, count in vars(flops).items()}
            sizes = {"size": layer.size, "neurons": layer.neurons, "inputs": layer.inputs}
            layers.append({"name": layer.name, "shape": list(layer.shape), **sizes, **counts})
        return {
            "layers": layers,
            "other_parameters": parameters - sum(layer.size for layer in self._layers),
            "dense_forward_flops": of_one(round(inference(self._flops, {}))),
            "dense_training_flops": of_one(round(training(self._flops, {}, {}))),
        }

    def _keep_fitting(self) -> None:
        """Forget what a checkpoint has of weights that are others now, or that train dense."""
        sizes = {layer.name: layer.size for layer in self._layers if layer.method is not None}
        fits = {name for name, size in self._explored.sizes.items() if sizes.get(name) == size}
        if dense := sorted(self._density.keys() - sizes.keys()):
            rank_zero_warn(
                f"In the run of the checkpoint {', '.join(dense)} trained sparse. No method holds them now: they train "
                "dense from here on. Give the Trainer the callback of that run to keep them sparse."
            )
        self._density = {name: density for name, density in self._density.items() if name in fits}
        self._gradient_density = {name: share for name, share in self._gradient_density.items() if name in fits}
        self._explored.keep(fits)
        self._epoch_bits = {name: bits for name, bits in self._epoch_bits.items() if name in fits}

    # ------------------------------------------------------------------ looks at the masks

    def _moved(self) -> list[SparseCallback]:
        """Return the methods that have moved connections since the last look, as far as they tell."""
        return [
            method
            for method, before in self._connections
            if any(connections is not before.get(name) for name, connections in method.connections.items())
        ]

    @torch.no_grad()
    def _look(
        self, trainer: Trainer, module: LightningModule, moved: Sequence[SparseCallback], draw: bool = False
    ) -> None:
        """Account for the steps since the last look, and see what the masks are now; ``draw`` them, too."""
        self._account(trainer.global_step - self._step, moved)
        self._step, self._batches = trainer.global_step, 0
        gradients: dict[str, float] = {}
        for method in self._methods:
            gradients |= method.layer_gradient_density
        if not gradients.keys() <= self._gradient_density.keys():  # at first, and when weights join the training
            self._find_layers(module)
        before, self._bits = self._bits, {}
        self._gradient_density = gradients
        self._connections = [(method, held) for method in self._methods if (held := method.connections)]
        for layer in self._layers:
            if layer.method is None and layer.name in self._pictures:
                continue  # dense, and drawn
            mask = layer.mask()
            if layer.method is not None:
                self._see(layer, mask)
            if draw:
                self._pictures[layer.name] = picture(layer, mask)
        changed = [layer.name for layer in self._layers if layer.method in moved and layer.name in before]
        if changed:
            self._updates.add(churn({n: before[n] for n in changed}, {n: self._bits[n] for n in changed}))

    def _see(self, layer: Layer, mask: Tensor) -> None:
        """Take up one mask, and warn if the layer is collapsing."""
        name, active = layer.name, int(torch.count_nonzero(mask))
        self._density[name] = active / layer.size
        self._bits[name] = self._explored.add(name, mask)
        share = self.collapse_below
        low = active < layer.neurons if share is None else active < share * layer.size
        if low and active and name not in self._low:  # the methods themselves warn of layers without any weight
            rule = f"fewer than its {layer.neurons} output neurons" if share is None else f"a density below {share:g}"
            rank_zero_warn(
                f"{name} is collapsing: {active} of its {layer.size} weights are left after step {self._step}, {rule}. "
                "Keep it denser: a weaker regulariser or lower sparsity, min_layer_density, or exclude."
            )
        self._low = self._low | {name} if low else self._low - {name}

    def _account(self, steps: int, moved: Sequence[SparseCallback]) -> None:
        """Add the operations of the steps since the last look, which had the densities found then."""
        if not self._flops or steps <= 0:
            return
        dense = training(self._flops, {}, {})
        growing = [method for method in moved if method.dense_gradient_to_move]
        if growing:  # the latest of the steps
            full = {layer.name: 1.0 for layer in self._layers if layer.method in growing}
            gradients = {**self._gradient_density, **full}
            self._training.add(training(self._flops, self._density, gradients) / dense)
        rest = steps - bool(growing)
        self._training.add(training(self._flops, self._density, self._gradient_density) / dense, rest)

    # ------------------------------------------------------------------ the epoch

    def _record(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return what the file says of the epoch that ends."""
        step_time, peak = self._measured(trainer, module)
        sizes = {layer.name: layer.size for layer in self._layers}
        layers = {
            layer.name: {
                "density": self._density.get(layer.name, 1.0),
                "backward_density": self._gradient_density.get(layer.name, 1.0),
                **{key: self._pictures[layer.name][key] for key in COUNTS},
            }
            for layer in self._layers
        }

        def whole(key: str) -> float:
            total: float = sum(layers[name][key] * size for name, size in sizes.items())
            return total / max(sum(sizes.values()), 1)

        def counted(key: str, totals: Sequence[int]) -> float:
            return float(sum(layer[key] for layer in layers.values())) / max(sum(totals), 1)

        dense = inference(self._flops, {})
        sparse = bool(self._methods)
        known = {name: self._epoch_bits[name] for name in self._bits if name in self._epoch_bits}
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "density": whole("density"),
            "backward_density": whole("backward_density"),
            "layers": layers,
            "empty_neurons": counted("empty_neurons", [layer.neurons for layer in self._layers]),
            "empty_inputs": counted("empty_inputs", [layer.inputs for layer in self._layers]),
            "shrunk_size": counted("shrunk_size", list(sizes.values())),
            "inference_flops": inference(self._flops, self._density) / dense if dense else None,
            "training_flops": self._training.mean if self._training.count else None,
            "step_time_s": step_time,
            "peak_memory_bytes": peak,
            "churn": churn(known, {name: self._bits[name] for name in known}) if sparse else None,
            "churn_per_update": self._updates.mean if self._updates.count else None,
            "exploration": self._explored.rate(sizes) if sparse else None,
            "thresholds": self._thresholds(),
            "bytes": stored_bytes(module, trainer.optimizers, [method.held for method in self._methods]),
        }

    def _measured(self, trainer: Trainer, module: LightningModule) -> tuple[float | None, int | None]:
        """Return the median time of a step and the peak memory: of several processes, the largest."""
        kind = module.device.type
        peak = peak_memory() if kind == "cpu" else math.nan
        if kind == "cuda":
            peak = torch.cuda.max_memory_allocated(module.device)
        seconds = self._clock.median
        values = [math.nan if seconds is None else seconds, float(peak)]
        if trainer.world_size > 1:
            both = torch.tensor(values, dtype=torch.float64, device=module.device)
            values = trainer.strategy.reduce(both, reduce_op="max").tolist()
        seconds, peak = values
        return None if math.isnan(seconds) else seconds, None if math.isnan(peak) else round(peak)

    def _thresholds(self) -> dict[str, Any]:
        """Return statistics of what ``|W|`` is compared with in each layer, where a method has thresholds."""
        levels = {name: tau for method in self._methods for name, tau in method.levels.items()}
        return {name: spread(tau) for name, tau in levels.items() if bool(tau.isfinite().all())}

    def _close(self, trainer: Trainer) -> None:
        """Complete the record of the latest epoch by its metrics, which other callbacks may have logged later."""
        if self._latest is not None:
            self._latest["metrics"] = metrics(trainer)
            self._epochs = self._all_epochs()
            self._latest = None

    def _all_epochs(self) -> dict[int, str]:
        """Return the records of all epochs as JSON."""
        if self._latest is None:
            return self._epochs
        return {**self._epochs, self._latest["epoch"]: json.dumps(self._latest, allow_nan=False)}

    # ------------------------------------------------------------------ the file

    def _wall_time(self) -> float:
        return self._earlier + time.monotonic() - self._begun

    def _write(self, status: str) -> None:
        """Write the file; a run goes on if that fails."""
        if self._file is None:
            return
        head = {
            "format": run_file.FORMAT,
            "status": status,
            "started": self._started,
            "updated": run_file.now(),
            "wall_time_s": round(self._wall_time(), 3),
            **self._head,
        }
        # records and pictures are JSON already, so that a long history costs little each time
        epochs = ", ".join(self._all_epochs().values())
        masks = ", ".join(f"{json.dumps(name)}: {picture['json']}" for name, picture in self._pictures.items())
        text = json.dumps(head, default=str)[:-1] + f', "epochs": [{epochs}], "masks": {{{masks}}}}}\n'
        try:
            run_file.write(self._file, text)
        except OSError as error:
            rank_zero_warn(f"SparsityMonitor cannot write {self._file}: {error}. The run goes on without the file.")
            self._file = None
