"""Networks for OpenVINO: int8 with exact zeros, and what its kernels make of them.

OpenVINO's CPU plugin keeps the weights of a layer packed, without zeros, under conditions that it does not report:
the processor has AMX, weights and activations are int8, the weight is a matrix of sizes divisible by 64, and its share
of zeros reaches ``CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE``. What it does report is the kernel of each layer.
"""

import io
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.export._modules import (
    Example,
    check_dense,
    check_equal,
    check_tolerance,
    results,
    tensor_arguments,
    unpacked,
)
from lightning_sparse.export.onnx import to_onnx

__all__ = ["RATE", "OpenVINOLayer", "OpenVINOModel", "openvino_compiled", "to_openvino"]

_PRODUCTS = frozenset({"MatMul", "Convolution", "GroupConvolution"})
#: of a compiled network: the share of zeros from which weights are packed
RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
# layers of the compiled model that hand weights on
_CARRIERS = frozenset({"Const", "Reorder", "Reshape", "Transpose", "Convert"})
# sizes of a weight that sparse kernels take are multiples of this
_TILE = 64


@dataclass(frozen=True)
class OpenVINOLayer:
    """A layer of the compiled network.

    Attributes:
        name: of its weight.
        shape: of its weight.
        sparsity: share of zeros in its weight, after quantization.
        kernel: that OpenVINO reports, such as ``"brgemm_avx2_f32"``.
        reason: why the kernel does not skip zeros; None: it does.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    kernel: str
    reason: str | None


@dataclass(frozen=True)
class OpenVINOModel:
    """A compiled network; call it with tensors. ``str`` makes a table of its layers and kernels.

    Attributes:
        compiled: the ``openvino.CompiledModel``.
        layers: its linear layers and convolutions.
        error: on the example, the difference from the module's outputs relative to them, as root mean squares.
    """

    compiled: Any
    layers: list[OpenVINOLayer]
    error: float

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the network gives for these inputs: a tensor, or several."""
        return unpacked(_run(self.compiled, inputs))

    @property
    def verdict(self) -> str:
        """How many layers have kernels that skip zeros, and what the others lack."""
        sparse = sum(layer.reason is None for layer in self.layers)
        others: dict[str, set[str]] = {}
        for layer in self.layers:
            if layer.reason:
                others.setdefault(layer.reason, set()).add(layer.kernel)
        notes = [f"{reason} (here: {', '.join(sorted(kernels))})" for reason, kernels in others.items()]
        return f"{sparse} of {len(self.layers)} layers have kernels that skip zeros.{_sentence(notes)}"

    def __str__(self) -> str:
        rows = [("layer", "shape", "zeros", "kernel")]
        rows += [(x.name, " x ".join(map(str, x.shape)), f"{x.sparsity:.1%}", x.kernel) for x in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.verdict])


def _sentence(notes: list[str]) -> str:
    return f" Such kernels need {'; '.join(notes)}." if notes else ""


def to_openvino(
    module: nn.Module,
    example_input: Example,
    calibration: Iterable[Example] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    min_sparsity: float = 0.8,
    dynamic_batch: bool = True,
    tolerance: float | None = 1e-4,
) -> OpenVINOModel:
    """Return ``module`` in eval mode compiled by OpenVINO for this CPU, in int8 if there are batches to calibrate with.

    NNCF chooses the scales. Weights are int8, symmetric, with a scale for each output, so 0 stays 0; they use 7 bits,
    since products would overflow on processors without VNNI. Activations are int8 with ranges from the calibration
    batches. Each zero is compared before and after. Kernels that skip zeros exist only for int8 and only on processors
    with AMX (Intel Xeon of 2023 and later). If no layer has one, a warning says why.

    The module is converted through ONNX, which ``to_onnx`` checks. OpenVINO's result in float32 is checked as well.

    Args:
        module: to export; it is not changed.
        example_input: a tensor, or a tuple of positional tensors, of the shapes and dtypes of the inputs.
        calibration: inputs like the example, some hundred rows in all, such as ``[x for x, _ in loader]``; None: the
            network stays in float32.
        path: ``NAME.xml`` to write the network to, with the weights in ``NAME.bin``; int8 takes a quarter of float32,
            zeros included.
        min_sparsity: the share of zeros from which a layer may have a kernel that skips them, from 0 to 1.
        dynamic_batch: accept any size of the first dimension of each input. False: that of the example only.
        tolerance: the largest difference allowed in float32, as in ``to_onnx``.

    Raises:
        ValueError: an argument is of another type, the module has sparse layers, or torch cannot trace it.
        FileNotFoundError: the folder of the file does not exist.
        RuntimeError: in float32 the outputs differ, or quantization has changed a zero; no file is written then.
        ModuleNotFoundError: the extra ``openvino`` is not installed.

    Example:
        >>> import torch
        >>> from lightning_sparse.export import to_openvino
        >>> net = torch.nn.Linear(64, 64)
        >>> fast = to_openvino(net, torch.randn(2, 64), [torch.randn(8, 64) for _ in range(4)])  # doctest: +SKIP
        >>> fast(torch.randn(2, 64)).shape  # doctest: +SKIP
        torch.Size([2, 64])
    """
    check_dense(module, "to_openvino")
    given = tensor_arguments(example_input)
    _check_path(path)
    checks.fraction("Layers with fewer zeros stay dense.", min_sparsity=min_sparsity)
    checks.flag(dynamic_batch=dynamic_batch)
    check_tolerance(tolerance)
    batches = None if calibration is None else _batches(calibration, given)
    openvino = extra("openvino", "openvino")
    with TemporaryDirectory() as folder:
        to_onnx(module, Path(folder, "net.onnx"), example_input, dynamic_batch=dynamic_batch, tolerance=tolerance)
        model = openvino.Core().read_model(Path(folder, "net.onnx"))
        compiled = openvino_compiled(model, min_sparsity)
        expected = results(module, example_input)
        check_equal(expected, _run(compiled, given), tolerance, "The module in OpenVINO")
    weights = _weights(model)
    names = {product: weight.names[-1] for product, weight in weights.items()}
    if batches is not None:
        model = _quantized(model, batches)
        quantized = _weights(model)
        _check_zeros(weights, quantized)
        weights = quantized
        compiled = openvino_compiled(model, min_sparsity)
    error = _error(expected, _run(compiled, given))  # kernels for any batch size are chosen at the first run
    kernels = _kernels(compiled)
    layers = [_layer(names[product], weight, kernels, min_sparsity) for product, weight in weights.items()]
    found = OpenVINOModel(compiled, layers, error)
    if path is not None:
        openvino.save_model(model, os.fspath(path), compress_to_fp16=False)
    if found.layers and all(layer.reason for layer in found.layers):
        warnings.warn(f"Zeros make this network no faster in OpenVINO. {found.verdict}", stacklevel=2)
    return found


def openvino_compiled(model: Any, min_sparsity: float) -> Any:
    """Return a model, or the file of one, compiled for the CPU with as many threads as torch has."""
    options = {
        RATE: min_sparsity,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # of what is not int8; else bfloat16 where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    return extra("openvino", "openvino").Core().compile_model(model, "CPU", options)


# ---------------------------------------------------------------------- arguments


def _check_path(path: str | os.PathLike[str] | None) -> None:
    if path is None:
        return
    checks.folder_of(path=path)
    if Path(path).suffix != ".xml":
        raise ValueError(f"path must end in .xml, got {os.fspath(path)!r}. The weights go into a .bin file beside it.")


def _batches(calibration: Iterable[Example], example: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    """Return the calibration batches as NNCF takes them."""
    if isinstance(calibration, (Tensor, str, Mapping)) or not isinstance(calibration, Iterable):
        raise ValueError(
            "calibration must be a list of inputs like example_input, got one of type "
            f"{type(calibration).__name__}. Give [x for x, _ in loader]."
        )
    batches = [tuple(batch) if isinstance(batch, (tuple, list)) else (batch,) for batch in calibration]
    wrong = [batch for batch in batches if len(batch) != len(example) or not all(isinstance(x, Tensor) for x in batch)]
    if wrong or not batches:
        found = f"one of {', '.join(type(x).__name__ for x in wrong[0])}" if wrong else "none"
        raise ValueError(
            f"calibration must hold batches of {len(example)} tensors, as forward takes them, got {found}. "
            "Leave labels out: [x for x, _ in loader]."
        )
    return [tuple(x.detach().cpu().numpy() for x in batch) for batch in batches]


# ---------------------------------------------------------------------- weights


class _Weight(NamedTuple):
    """The weight of a product.

    Attributes:
        numbers: as they are multiplied by, after quantization and back.
        names: of the nodes that make them, the constant last.
    """

    numbers: Any
    names: list[str]


def _weights(model: Any) -> dict[str, _Weight]:
    """Return the weights by the names of their products."""
    found = {}
    for product in model.get_ordered_ops():
        if product.get_type_name() in _PRODUCTS:
            value = product.input_value(1)
            nodes = [node := value.get_node()]
            while node.get_input_size():
                nodes.append(node := node.input_value(0).get_node())
            if node.get_type_name() == "Constant":
                found[product.get_friendly_name()] = value, [node.get_friendly_name() for node in nodes]
    openvino = extra("openvino", "openvino")
    values = openvino.Model([value for value, _ in found.values()], []) if found else None
    computed = openvino.Core().compile_model(values, "CPU")([]) if found else []
    return {product: _Weight(computed[at].copy(), names) for at, (product, (_, names)) in enumerate(found.items())}


def _quantized(model: Any, batches: list[tuple[Any, ...]]) -> Any:
    """Return the model in int8."""
    nncf, parameters = extra("nncf", "openvino"), extra("nncf.quantization.advanced_parameters", "openvino")
    # without VNNI, sums of two products of 8 and 8 bits overflow 16 bits: weights have 7
    chosen = parameters.AdvancedQuantizationParameters(overflow_fix=parameters.OverflowFix.ENABLE)
    with redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), advanced_parameters=chosen)


def _check_zeros(before: Mapping[str, _Weight], after: Mapping[str, _Weight]) -> None:
    """Raise unless each 0 of the weights is one after quantization."""
    for product, weight in before.items():
        if after[product].numbers[weight.numbers == 0].any():
            raise RuntimeError(f"Quantization has made zeros of {weight.names[-1]} nonzero. Leave calibration out.")


# ---------------------------------------------------------------------- what has become of it


def _run(compiled: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = compiled([x.detach().cpu().numpy() for x in inputs])
    return [torch.from_numpy(outputs[slot].copy()) for slot in compiled.outputs]


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    right, x = (torch.cat([part.double().flatten().cpu() for part in parts]) for parts in (expected, found))
    return float((x - right).norm() / right.norm())


def _kernels(compiled: Any) -> dict[str, str]:
    """Return by name of a constant the kernel that computes with it."""
    found = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        if _said(node, "layerType") not in _CARRIERS:
            for value in node.input_values():
                source = value.get_node()
                while _said(source, "layerType") in _CARRIERS and source.get_input_size():
                    source = source.input_value(0).get_node()
                found[source.get_friendly_name()] = _said(node, "primitiveType")
    return found


def _said(node: Any, entry: str) -> str:
    """Return what the compiled model says of one of its layers."""
    return str(node.get_rt_info()[entry].astype(str))


def _layer(name: str, weight: _Weight, kernels: Mapping[str, str], min_sparsity: float) -> OpenVINOLayer:
    shape, sparsity = weight.numbers.shape, float((weight.numbers == 0).mean()) if weight.numbers.size else 0.0
    kernel = next((kernels[node] for node in weight.names if node in kernels), "unknown")
    amx = any("amx" in other for other in kernels.values())
    return OpenVINOLayer(name, tuple(shape), sparsity, kernel, _lacks(kernel, shape, sparsity, min_sparsity, amx))


def _lacks(kernel: str, shape: tuple[int, ...], sparsity: float, min_sparsity: float, amx: bool) -> str | None:
    """Return what a kernel needs to skip zeros; None: it does."""
    if "sparse" in kernel:
        return None
    if not kernel.lower().endswith("_i8"):
        return "int8 weights and activations, and a processor with AMX"
    if not amx:
        return "a processor with AMX"
    if len(shape) != 2 or any(size % _TILE for size in shape):
        return f"a matrix of sizes divisible by {_TILE}"
    if sparsity < min_sparsity:
        return f"a share of zeros of min_sparsity={min_sparsity:g}"
    return "more than OpenVINO says"
