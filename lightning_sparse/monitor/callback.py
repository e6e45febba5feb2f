"""SparsityMonitor: writes the record of a run, sparse or dense, to its loggers and to ``sparsity.json``."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_sparse.accounting.memory import stored_bytes
from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.compat.lightning import (
    Callback,
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from lightning_sparse.compat.lightning_private import steps_logged
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.monitor import record, run_file
from lightning_sparse.monitor.clock import Clock
from lightning_sparse.monitor.cost import highest
from lightning_sparse.monitor.figures import draw, painters
from lightning_sparse.monitor.history import History
from lightning_sparse.monitor.looks import Looks
from lightning_sparse.monitor.operations import Operations, counted
from lightning_sparse.trainer import divided_states
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.trainer.shards import divides_weights

__all__ = ["SparsityMonitor"]


class SparsityMonitor(Callback):
    """Logs density, theoretical operations, bytes, memory, time and the life of the masks; warns of collapsing layers.

    Use it beside any sparse callbacks, in any order, or in a dense run, whose densities are 1. Once an epoch
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
        log_layers: log values of single layers, too; ``sparsity.json`` has them in any case.

    Raises:
        ValueError: an argument is out of range.
        ModuleNotFoundError: ``figures`` without matplotlib.

    Example:
        >>> from lightning_sparse import DST, SparsityMonitor
        >>> callbacks = [DST(alpha=5e-4), SparsityMonitor()]
    """

    def __init__(
        self,
        every_n_batches: int = 200,
        collapse_below: float | None = None,
        flops: bool = True,
        figures: bool = False,
        log_layers: bool = True,
    ) -> None:
        checks.integer(1, "Looks cost time: 200 is a good start.", every_n_batches=every_n_batches)
        if collapse_below is not None:
            checks.fraction("None warns of fewer weights than output neurons.", collapse_below=collapse_below)
        checks.flag(flops=flops)
        checks.flag(figures=figures)
        checks.flag(log_layers=log_layers)
        if figures:
            extra("matplotlib", "report")
        self.every_n_batches = every_n_batches
        self.collapse_below = collapse_below
        self.flops = flops
        self.figures = figures
        self.log_layers = log_layers
        self._forget()

    def _forget(self) -> None:
        """Begin a run."""
        self._file = run_file.RunFile()
        self._looks = Looks(self.collapse_below)
        self._operations = Operations()
        self._history = History()
        self._clock = Clock()
        self._from_step: int | None = None

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the methods and the place of the file."""
        self._looks.methods = [c for c in trainer.callbacks if isinstance(c, SparseCallback)]  # type: ignore[attr-defined]
        folder = trainer.log_dir or trainer.default_root_dir  # asks all processes
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._file.path = Path(folder, run_file.FILE)
        if self._from_step is None:
            self._from_step = self._looks.step = trainer.global_step
        if self.figures and not painters(trainer):
            rank_zero_warn("SparsityMonitor(figures=True) draws for loggers that take figures, such as TensorBoard's.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what was logged at the end of the last epoch after this callback had its turn."""
        self._close(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock; before the first step, when every method has its masks, describe the run."""
        if not self._file.head:
            self._begin(trainer, pl_module, batch)
        self._clock.start(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; look at the masks now and then, and when connections have moved."""
        self._clock.stop()
        self._looks.batches += 1
        moved = self._looks.moved()
        if moved or self._looks.due(self.every_n_batches):
            self._look(trainer, pl_module, moved)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write."""
        if not self._file.head:
            return
        self._close(trainer)
        self._look(trainer, pl_module, self._looks.moved(), draw=True)
        latest = self._record(trainer, pl_module)
        self._history.add(latest)
        self._looks.begin_epoch()
        self._clock = Clock()
        pl_module.log("density/model", latest["density"], logger=False, prog_bar=True, sync_dist=True)
        # straight to the loggers: the bookkeeping of `log` costs about a millisecond a name
        values = {"epoch": trainer.current_epoch, **record.scalars(latest, self.log_layers)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=steps_logged(trainer) - 1)
        if self.figures and trainer.is_global_zero:
            self._paint(trainer)
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
            self._looks.release()

    # ------------------------------------------------------------------ state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have bits of divided weights saved by shards, or whole, as the module is."""
        if divides_weights(trainer):
            divided_states.save(trainer, checkpoint, self.state_key)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read what processes have written in shards."""
        states, key = checkpoint.get("callbacks", {}), self.state_key
        if key in states and divides_weights(trainer):
            states[key] = divided_states.read(states[key], Looks.divided_state(pl_module), key, str(trainer.ckpt_path))

    def state_dict(self) -> dict[str, Any]:
        """Return averages, explored connections as bits, and the epochs so far: tensors and plain values only."""
        return {
            **self._file.state_dict(),
            "from_step": self._from_step or 0,
            **self._history.state_dict(),
            **self._operations.state_dict(),
            **self._looks.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an earlier run."""
        self._from_step = state_dict["from_step"]
        for part in (self._file, self._history, self._operations, self._looks):
            part.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the Trainer's part and what ties the callback to a fit."""
        state = {**self.__dict__, "_clock": Clock()}
        for attached in ("log", "log_dict"):  # the module's methods, which the Trainer gives its callbacks
            state.pop(attached, None)
        return state

    # ------------------------------------------------------------------ the run

    def _begin(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Describe the run, and look at the masks it begins with."""
        dense = trainer.strategy.broadcast(counted(trainer, module, batch) if self.flops else {})
        self._operations.dense = dense
        self._looks.begin(module)
        examples = record.batch_size(batch)
        parameters = sum(math.prod(choice.shape) for choice in select_parameters(module))
        self._file.head = {
            "method": record.described(self._looks.methods),
            "module": f"{type(module).__module__}.{type(module).__qualname__}",
            "seed": run_file.seed(),
            "from_step": self._from_step,
            "versions": run_file.versions(),
            "hardware": run_file.hardware(trainer),
            "flops_of": None if not dense else "batch" if examples is None else "example",
            **record.sizes(self._looks.layers, parameters, dense, examples),
        }
        self._look(trainer, module, [])
        self._looks.start_epochs()
        self._write("running")

    def _look(
        self, trainer: Trainer, module: LightningModule, moved: Sequence[SparseCallback], draw: bool = False
    ) -> None:
        """Account for the steps since the last look, and see what the masks are now; ``draw`` them, too."""
        looks, growing = self._looks, [method for method in moved if method.dense_gradient_to_move]
        # the steps had the densities that were found then
        self._operations.add(
            trainer.global_step - looks.step,
            looks.density,
            looks.gradient_density,
            all_at_last=[layer.name for layer in looks.layers if layer.method in growing],
        )
        looks.look(module, trainer.global_step, moved, draw)

    def _record(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return what the file says of the epoch that ends."""
        looks, training = self._looks, self._operations.training
        stored = stored_bytes(module, trainer.optimizers, [method.state_tensors for method in looks.methods])
        step_time, peak, stored = highest(trainer, module, self._clock.median, stored)
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            **record.of_layers(looks),
            "inference_flops": self._operations.inference(looks.density),
            "training_flops": training.mean if training.count else None,
            "step_time_s": step_time,
            "peak_memory_bytes": peak,
            "updates": looks.updates,
            "churn": looks.churn,
            "churn_per_update": looks.churn_per_update,
            "exploration": looks.exploration,
            "thresholds": record.thresholds(looks.methods),
            "bytes": stored,
            "metrics": record.metrics(trainer),
        }

    def _close(self, trainer: Trainer) -> None:
        """Complete the record of the latest epoch by its metrics, which other callbacks may have logged later."""
        self._history.close(partial(record.metrics, trainer))

    def _paint(self, trainer: Trainer) -> None:
        """Draw densities and masks."""
        densities = {layer.name: self._looks.density.get(layer.name, 1.0) for layer in self._looks.layers}
        for painter in painters(trainer):
            for name, figure in draw(densities, self._looks.pictures).items():
                painter.add_figure(f"monitor/{name}", figure, global_step=trainer.global_step)

    def _write(self, status: str) -> None:
        """Write the file."""
        self._file.write(status, self._history.epochs().values(), self._looks.pictures)
