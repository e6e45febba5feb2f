"""Which export pays here: time, file size and memory of a module and of what it can be exported to, measured."""

import copy
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.sparse import SparseSemiStructuredTensor
from tqdm import tqdm

from lightning_sparse.accounting.memory import peak_memory, resident_memory
from lightning_sparse.accounting.timing import seconds
from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.export._modules import (
    Example,
    check_equal,
    check_module,
    dense_bytes,
    evaluating,
    results,
    tensor_arguments,
    unpacked,
)
from lightning_sparse.export.compaction import compact, trace
from lightning_sparse.export.csr import CSRConv2d, CSRLinear, to_csr
from lightning_sparse.export.files import save_sparse
from lightning_sparse.export.onnx import onnx_outputs, onnx_session, to_onnx
from lightning_sparse.export.openvino import RATE, OpenVINOModel, openvino_compiled, to_openvino
from lightning_sparse.export.semi_structured import to_semi_structured
from lightning_sparse.storage import to_dense

__all__ = ["TWIN_LIMIT", "Benchmark", "Measurement", "benchmark"]

T = TypeVar("T")

#: bytes of the weights of a dense twin up to which it is made
TWIN_LIMIT = 2 << 30

_MIB = 2**20
_OPENVINO = "OpenVINO", "OpenVINO int8", "compacted, OpenVINO int8"
# one timing of a variant lasts as long as this, at least
_SECONDS = 0.005


@dataclass
class Measurement:
    """One row of the table.

    Attributes:
        milliseconds: by batch size, the median time of a forward pass.
        file_bytes: of the state dict as ``torch.save`` writes it, or of the files of ONNX or OpenVINO.
        memory_bytes: what loading it and running the largest batch adds to the memory of a process, at its peak; on a
            GPU, what its parameters and buffers and the peak of such a run take there. None: not measured.
        accuracy: what ``accuracy`` has returned for it. None: not measured.
    """

    milliseconds: dict[int, float]
    file_bytes: int
    memory_bytes: float | None
    accuracy: float | None = None


@dataclass
class Benchmark:
    """What was measured; ``str`` makes a Markdown table of it, and says which one pays.

    Attributes:
        rows: measurements by name. The first, with which the others are compared, is the module itself, "dense". Of a
            module with sparse layers it is a copy with dense weights, and the module itself is "sparse layers", which
            comes first if there is no such copy.
        skipped: by name of what could not be made, why.
        sparse_file_bytes: of the module's state dict as ``save_sparse`` writes it; None: safetensors is not installed.
        notes: by name, which kernels OpenVINO has for it.
    """

    rows: dict[str, Measurement]
    skipped: dict[str, str]
    sparse_file_bytes: int | None
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        batches = list(self._first.milliseconds)
        head = ["", *(f"batch {batch} (ms)" for batch in batches), "file (MiB)", "peak memory added (MiB)"]
        head += ["accuracy"] if self._first.accuracy is not None else []
        lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for name, row in self.rows.items():
            times = [f"{row.milliseconds[batch]:.3f}" for batch in batches]
            added = "" if row.memory_bytes is None else f"{row.memory_bytes / _MIB:.1f}"
            accuracy = [] if row.accuracy is None else [f"{row.accuracy:.2%}"]
            lines.append(_line([name, *times, f"{row.file_bytes / _MIB:.2f}", added, *accuracy]))
        notes = [self._best(f"Fastest at batch {batch}", _time_at(batch)) for batch in batches]
        notes.append(self._best("Smallest file", lambda row: row.file_bytes))
        if self.sparse_file_bytes is not None:
            notes.append(f"The module's weights as save_sparse writes them: {self.sparse_file_bytes / _MIB:.2f} MiB.")
        if self._first.memory_bytes is not None:
            notes.append(self._best("Least memory", lambda row: row.memory_bytes or float("inf")))
        notes += [f"{name}: {note}" for name, note in self.notes.items()]
        notes += [f"Not measured: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, "", *notes])

    @property
    def _first(self) -> Measurement:
        return next(iter(self.rows.values()))

    def _best(self, title: str, cost: Callable[[Measurement], float]) -> str:
        first = next(iter(self.rows))
        costs = {name: cost(row) for name, row in self.rows.items()}
        best = min(costs, key=lambda name: costs[name])
        ratio = costs[first] / costs[best]
        return f"{title}: {best}" + ("." if best == first else f", {ratio:.2f} times better than {first}.")


def benchmark(
    module: nn.Module,
    example_input: Example,
    *,
    batch_sizes: Sequence[int] = (1, 128),
    rounds: int = 15,
    min_sparsity: float = 0.9,
    memory: bool = True,
    calibration: Iterable[Example] | None = None,
    accuracy: Callable[[Callable[..., Any]], float] | None = None,
) -> Benchmark:
    """Measure what a sparse module and its exports need on this machine, on its CPU or a CUDA GPU.

    These are the module as it is, compacted, with CSR layers, both, and if it is installed with onnxruntime, also
    compacted. With ``calibration`` there is also OpenVINO in float32, in int8, and compacted in int8, and a line on
    which of its kernels skip zeros. All run in turn with ``torch.get_num_threads()`` threads, so that a change of the
    machine's speed meets all. Memory is that of a process of its own for each. Progress is shown on standard error, if
    it is a terminal.

    Where the module is on a GPU, so are its exports: with 2:4 sparsity if it fits, and without ONNX, which is measured
    only on the CPU. Times include the wait for the GPU at the end. Memory is that of the GPU, in this process: the
    bytes of the variant's parameters and buffers, plus what a run of the largest batch allocates at its peak.

    A module with sparse layers is measured as it is. A copy with dense weights, from which the exports are made, is
    measured beside it if its weights take no more than ``lightning_sparse.export.measure.TWIN_LIMIT`` bytes. If they
    take more, rows that need dense weights are left out.

    Args:
        module: on the CPU or a CUDA GPU, with exact zeros in its weights, or with sparse layers; it is not changed.
        example_input: a tensor, or a tuple of positional tensors, on the module's device; its first row is repeated to
            make the batches.
        batch_sizes: to time; the largest is used for memory.
        rounds: how often each is timed; the median counts.
        min_sparsity: as in ``to_csr`` and ``to_openvino``.
        memory: measure memory, too, which on the CPU starts a process for each.
        calibration: batches for int8, as in ``to_openvino``; None: OpenVINO is not measured.
        accuracy: is given each variant as a function of tensors and returns its accuracy, from 0 to 1, such as
            ``lambda net: (net(x).argmax(1) == y).float().mean().item()``. It makes one more column.

    Raises:
        ValueError: an argument is out of range, or module and example are not on one device, the CPU or a CUDA GPU.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse.export import benchmark
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:60].zero_()
        >>> table = benchmark(net, torch.randn(2, 64), rounds=3, memory=False)
        >>> table.rows["compacted"].file_bytes < table.rows["dense"].file_bytes
        True
    """
    checks.integer(1, "15 is enough for a stable median.", rounds=rounds)
    if not isinstance(batch_sizes, Sequence) or isinstance(batch_sizes, (str, bytes)) or not batch_sizes:
        raise ValueError(f"batch_sizes must be a list of sizes such as (1, 128), got {batch_sizes!r}.")
    for size in batch_sizes:
        checks.integer(1, "It is a number of examples.", batch_sizes=size)
    checks.fraction("0.9 is about where CSR begins to pay.", min_sparsity=min_sparsity)
    checks.flag(memory=memory)
    if accuracy is not None and not callable(accuracy):
        raise ValueError(f"accuracy must be a function of a network, got one of type {type(accuracy).__name__}.")
    calibration = list(calibration) if isinstance(calibration, Iterator) else calibration  # it is gone through twice
    check_module(module)
    device = _device(module, example_input)
    batches = {size: tuple(_repeat(x, size) for x in tensor_arguments(example_input)) for size in batch_sizes}
    skipped: dict[str, str] = {}
    with TemporaryDirectory() as folder, evaluating(module):
        variants = _variants(module, example_input, device, min_sparsity, calibration, Path(folder), skipped)
        times = {size: _times(variants, inputs, rounds, device) for size, inputs in batches.items()}
        peaks: dict[str, float | None] = {}
        if memory and device.type == "cuda":
            largest = batches[max(batch_sizes)]
            peaks = {name: _gpu_peak(variants[name], largest, device) for name in _shown(variants, "memory")}
        elif memory:
            torch.save(batches[max(batch_sizes)], Path(folder, "inputs"))
            peaks = {name: _peak(name, variants, Path(folder), skipped) for name in _shown(variants, "memory")}
        files = {name: _file_size(name, variant, Path(folder)) for name, variant in variants.items()}
        sparse_file = _sparse_file_size(module, Path(folder))
        right = {name: accuracy(_function(variant)) for name, variant in variants.items()} if accuracy else {}
    rows = {
        name: Measurement(
            {size: times[size][name] for size in batch_sizes}, files[name], peaks.get(name), right.get(name)
        )
        for name in variants
    }
    notes = {name: variant.verdict for name, variant in variants.items() if isinstance(variant, OpenVINOModel)}
    return Benchmark(rows, skipped, sparse_file, notes)


def _shown(things: Collection[T], title: str) -> Iterable[T]:
    """Return the things, with a bar, if there is a terminal, that shows how many of them have been handed out."""
    bar: Iterable[T] = tqdm(things, title, file=sys.stderr, leave=False, dynamic_ncols=True, disable=None)
    return bar


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _time_at(batch: int) -> Callable[[Measurement], float]:
    return lambda row: row.milliseconds[batch]


def _device(module: nn.Module, example_input: Example) -> torch.device:
    """Return where module and example are."""
    held = chain(module.parameters(), module.buffers(), tensor_arguments(example_input))
    devices = sorted({tensor.device for tensor in held}, key=str)
    if len(devices) != 1 or devices[0].type not in ("cpu", "cuda"):
        raise ValueError(
            "module and example_input must be on one device, the CPU or a CUDA GPU, got tensors on "
            f"{', '.join(map(str, devices)) or 'none'}. Give module.to(device) and example_input.to(device)."
        )
    return devices[0]


def _repeat(x: Tensor, size: int) -> Tensor:
    return x[:1].repeat(size, *[1] * (x.ndim - 1))


# ---------------------------------------------------------------------- what is measured


def _variants(
    module: nn.Module,
    example_input: Example,
    device: torch.device,
    min_sparsity: float,
    calibration: Iterable[Example] | None,
    folder: Path,
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Return what can be made of the module by name: a module, the session of an ONNX file, or OpenVINO's model."""
    variants: dict[str, Any] = {}
    size = dense_bytes(module)
    if size <= TWIN_LIMIT:
        variants["dense"] = to_dense(copy.deepcopy(module)) if size else module
    if size:
        variants["sparse layers"] = module
    dense = variants.get("dense", module)

    def csr(source: nn.Module) -> nn.Module:
        # without its LightningModule's or the script's class, it can be loaded by another process
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = to_csr(_portable(source), min_sparsity)
        if not any(isinstance(layer, (CSRLinear, CSRConv2d)) for layer in result.modules()):
            raise ValueError(f"no layer has a sparsity of {min_sparsity:.0%} or more")
        return result

    def semi_structured() -> nn.Module:
        with warnings.catch_warnings():  # torch says that 2:4 is a prototype
            warnings.simplefilter("ignore")
            result = to_semi_structured(dense)
        check_equal(results(dense, example_input), results(result, example_input), None, "The 2:4 module")
        return result

    def onnx(source: nn.Module, name: str) -> Any:
        if device.type != "cpu":
            raise ValueError("ONNX is measured only on the CPU")
        to_onnx(source, folder / name, example_input)
        return onnx_session(folder / name)

    def openvino(name: str) -> OpenVINOModel:
        if device.type != "cpu":
            raise ValueError("OpenVINO is measured only on the CPU")
        source = variants["compacted"] if name.startswith("compacted") else dense
        batches = calibration if name.endswith("int8") else None
        with warnings.catch_warnings():  # the table has the kernels
            warnings.simplefilter("ignore")
            return to_openvino(source, example_input, batches, path=folder / f"{name}.xml", min_sparsity=min_sparsity)

    exports: dict[str, Callable[[], Any]] = {
        "compacted": lambda: compact(dense, example_input)[0],
        "CSR": lambda: csr(module),
        "ONNX": lambda: onnx(dense, "ONNX"),
        "compacted, CSR": lambda: csr(variants["compacted"]),
        "compacted, ONNX": lambda: onnx(variants["compacted"], "compacted, ONNX"),
    }
    if calibration is not None:
        exports |= {name: partial(openvino, name) for name in _OPENVINO}
    if device.type == "cuda":
        exports["2:4"] = semi_structured
    for name in _shown(exports, "exports"):
        if name.startswith("compacted, ") and "compacted" not in variants:
            continue
        try:
            variants[name] = exports[name]()
        except Exception as error:
            skipped[name] = str(error).splitlines()[0]
    return variants


def _portable(module: nn.Module) -> nn.Module:
    """Return the module as a graph of torch's layers if it can be traced, so that any process can load it."""
    if isinstance(module, fx.GraphModule):
        return module
    try:
        return trace(module)
    except ValueError:
        return module


def _times(
    variants: Mapping[str, Any], inputs: tuple[Tensor, ...], rounds: int, device: torch.device
) -> dict[str, float]:
    """Return each variant's median time in milliseconds."""
    runs = {name: _runner(variant, inputs) for name, variant in variants.items()}
    counts = {}
    for name, run in runs.items():
        run()
        counts[name] = max(1, round(_SECONDS / seconds(run, 1, str(device))))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in _shown(range(rounds), f"batch {len(inputs[0])}"):
        for name, run in runs.items():
            taken[name].append(1e3 * seconds(run, counts[name], str(device)))
    return {name: median(values) for name, values in taken.items()}


def _runner(variant: Any, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    if isinstance(variant, nn.Module):
        return lambda: variant(*inputs)
    if isinstance(variant, OpenVINOModel):
        arrays = [x.numpy() for x in inputs]
        return lambda: variant.compiled(arrays, share_inputs=True)
    given = {slot.name: x.numpy() for slot, x in zip(variant.get_inputs(), inputs, strict=True)}
    return lambda: variant.run(None, given)


def _function(variant: Any) -> Callable[..., Any]:
    """Return a variant as a function of tensors."""
    if isinstance(variant, (nn.Module, OpenVINOModel)):
        return variant
    return lambda *inputs: unpacked(onnx_outputs(variant, inputs))


def _file_size(name: str, variant: Any, folder: Path) -> int:
    if isinstance(variant, nn.Module):
        torch.save(variant.state_dict(), folder / "state")
        return os.path.getsize(folder / "state")
    names = {name, *(f"{name}.{end}" for end in ("data", "xml", "bin"))}
    return sum(os.path.getsize(file) for file in folder.iterdir() if file.name in names)


def _sparse_file_size(module: nn.Module, folder: Path) -> int | None:
    try:
        save_sparse(module, folder / "sparse")
    except (ModuleNotFoundError, ValueError):
        return None
    return os.path.getsize(folder / "sparse")


# ---------------------------------------------------------------------- memory of a GPU


def _gpu_peak(variant: nn.Module, inputs: tuple[Tensor, ...], device: torch.device) -> float:
    """Return what a variant's tensors and the peak of a run, not the first one, take of the GPU's memory, in bytes."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    variant(*inputs)
    run = torch.cuda.max_memory_allocated(device) - before
    return float(run + sum(_bytes(tensor) for tensor in chain(variant.parameters(), variant.buffers())))


def _bytes(tensor: Tensor) -> int:
    """Return the size of a tensor; of a 2:4 one that of what it holds, as its own is that of the dense tensor."""
    if not isinstance(tensor, SparseSemiStructuredTensor):
        return tensor.nbytes
    return sum(getattr(tensor, part).nbytes for part in tensor.__tensor_flatten__()[0])


# ---------------------------------------------------------------------- memory, in a process of its own


def _peak(name: str, variants: Mapping[str, Any], folder: Path, skipped: dict[str, str]) -> float | None:
    """Return what loading and running a variant adds to the memory of a new process, in bytes."""
    file, kind = folder / name, "onnx"
    try:
        if isinstance(variants[name], OpenVINOModel):
            file, kind = folder / f"{name}.xml", f"openvino {variants[name].compiled.get_property(RATE)}"
        if isinstance(variants[name], nn.Module):
            file, kind = folder / "module", "torch"
            torch.save(_portable(variants[name]), file)
        command = [sys.executable, "-m", "lightning_sparse.export.measure", kind, str(file), str(folder / "inputs")]
        command.append(str(torch.get_num_threads()))
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    except Exception as error:  # whatever the module's class does when it is pickled, and the process
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        skipped[f"memory of {name}"] = reason.splitlines()[-1] if reason else type(error).__name__
        return None


def _print_peak(kind: str, file: str, inputs: str, threads: str) -> None:
    """Print what loading and running what is in the file adds to this process's memory."""
    torch.set_num_threads(int(threads))
    given = torch.load(inputs)
    kind, _, rate = kind.partition(" ")
    if kind != "torch":
        extra({"onnx": "onnxruntime"}.get(kind, kind), "export")
    _warm_up()
    before = resident_memory()
    if kind == "openvino":
        variant: Any = OpenVINOModel(openvino_compiled(file, float(rate)), [], 0.0)
    else:
        variant = onnx_session(file) if kind == "onnx" else torch.load(file, weights_only=False)
    with torch.no_grad():
        run = _runner(variant, given)
        for _ in range(3):
            run()
    print(max(0.0, peak_memory() - before))


def _warm_up() -> None:
    """Load what torch loads when it is first used, which is not the network's memory."""
    buffer = io.BytesIO()
    torch.save(to_csr(trace(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1))), min_sparsity=0), buffer)
    buffer.seek(0)
    with torch.no_grad():
        torch.load(buffer, weights_only=False)(torch.ones(4, 4, 4))


if __name__ == "__main__":
    _print_peak(*sys.argv[1:])
