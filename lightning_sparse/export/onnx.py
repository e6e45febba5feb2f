"""ONNX files that are checked with onnxruntime when they are written."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.export._modules import (
    Example,
    check_dense,
    check_equal,
    check_tolerance,
    evaluating,
    results,
    tensor_arguments,
)

__all__ = ["onnx_outputs", "onnx_session", "to_onnx"]

# a protobuf file holds 2 GiB at most: above, weights go into a second file
_ONE_FILE = 2**31 - 2**24
# what a sparse initializer takes beside its numbers, about
_ENTRY = 100


def to_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_input: Example,
    *,
    dynamic_batch: bool = True,
    tolerance: float | None = 1e-4,
    sparse_weights: bool = False,
) -> None:
    """Write ``module`` in eval mode as ONNX, and check with onnxruntime that it computes the same.

    ONNX has no sparse matrix products, so zeros make such a file no faster. Export the result of ``compact`` for a
    faster one. Zeros are written as zeros, or with ``sparse_weights`` not at all.

    Args:
        module: to export; it is not changed.
        path: of the file; it is overwritten. Weights of more than 2 GiB go into a second file beside it.
        example_input: a tensor, or a tuple of positional tensors, of the shapes and dtypes of the inputs.
        dynamic_batch: accept any size of the first dimension of each input. False: that of the example alone.
        tolerance: the largest difference allowed on the example, relative to the larger of 1 and the largest output;
            None: by dtype, 1e-5 for float32.
        sparse_weights: write weights with more than two thirds zeros (float32) as ``sparse_initializer``: 12 bytes per
            nonzero. The file is for onnxruntime only, which makes them dense when it loads them. onnxscript's optimizer
            and onnx's text form lose such weights without an error; OpenVINO, converters and quantizers refuse them.

    Raises:
        ValueError: an argument is of another type, the module has sparse layers, or torch cannot trace it; or weights
            of more than 2 GiB are to be written sparsely.
        FileNotFoundError: the folder of the file does not exist.
        RuntimeError: onnxruntime computes something else; no file is left then.
        ModuleNotFoundError: the extra ``export`` is not installed.

    Example:
        >>> import os, tempfile, torch
        >>> from lightning_sparse.export import to_onnx
        >>> path = os.path.join(tempfile.mkdtemp(), "net.onnx")
        >>> to_onnx(torch.nn.Linear(4, 2), path, torch.randn(3, 4))
        >>> os.path.exists(path)
        True
    """
    check_dense(module, "to_onnx")
    given = tensor_arguments(example_input)
    checks.folder_of(path=path)
    checks.flag(dynamic_batch=dynamic_batch)
    checks.flag(sparse_weights=sparse_weights)
    check_tolerance(tolerance)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        extra(package, "export")
    more = tuple(torch.cat([x, x[:1]]) for x in given) if dynamic_batch else given  # a batch of one would be a constant
    size = sum(tensor.nbytes for tensor in module.state_dict().values() if isinstance(tensor, Tensor))
    if sparse_weights and size > _ONE_FILE:
        raise ValueError(f"sparse_weights must be False for weights of more than 2 GiB, got {size / 2**30:.1f} GiB.")
    expected = [results(module, given), results(module, more)]
    try:
        with evaluating(module):
            torch.onnx.export(
                module,
                more,
                os.fspath(path),
                dynamo=True,
                verbose=False,
                external_data=size > _ONE_FILE,
                dynamic_shapes=_free_batch(module, more) if dynamic_batch else None,
            )
    except Exception as error:  # whatever torch does not know
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(
            f"torch.export cannot trace {type(module).__name__}: {reason}\n"
            "Its forward may branch on values of tensors, take *args or **kwargs, or compute what ONNX does not have. "
            "Export a part that can be traced, name the arguments of forward, or take the branch out of it; with "
            "dynamic_batch=False it may fix the size of the batch."
        ) from error
    if sparse_weights:
        _make_weights_sparse(path)
    try:
        session = onnx_session(path)
        for example, wanted in zip((given, more), expected, strict=True):
            found = onnx_outputs(session, example)
            check_equal(wanted, found, tolerance, f"{os.fspath(path)} in onnxruntime")
    except Exception as error:
        for file in (Path(path), Path(f"{os.fspath(path)}.data")):
            file.unlink(missing_ok=True)
        if "INVALID_ARGUMENT" in str(error):
            raise RuntimeError(
                f"The module does not take other batch sizes: give dynamic_batch=False. {error}"
            ) from error
        raise


def onnx_session(path: str | os.PathLike[str]) -> Any:
    """Return an onnxruntime session on the CPU with as many threads as torch has."""
    onnxruntime = extra("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def _make_weights_sparse(path: str | os.PathLike[str]) -> None:
    """Write a file again with sparse initializers where they are smaller."""
    onnx = extra("onnx", "export")
    model = onnx.load(path)
    dense = list(model.graph.initializer)
    del model.graph.initializer[:]
    for initializer in dense:
        array = onnx.numpy_helper.to_array(initializer)
        (places,) = array.ravel().nonzero()
        if places.nbytes + len(places) * array.itemsize + _ENTRY >= array.nbytes:
            model.graph.initializer.append(initializer)
            continue
        values = onnx.numpy_helper.from_array(array.ravel()[places], initializer.name)
        indices = onnx.numpy_helper.from_array(places, f"{initializer.name}_indices")
        model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, array.shape))
    onnx.save(model, path)


def _free_batch(module: nn.Module, example: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return for ``torch.export`` that the first dimension of each tensor may have any size, by argument."""
    free: dict[int, Any] = {0: torch.export.Dim.AUTO}
    given = inspect.signature(module.forward).bind(*example).arguments
    return {name: tuple(free for _ in x) if isinstance(x, tuple) else free for name, x in given.items()}


def onnx_outputs(session: Any, example: tuple[Any, ...]) -> list[Tensor]:
    """Return the outputs of an onnxruntime session for these inputs."""
    given = {slot.name: x.detach().cpu().numpy() for slot, x in zip(session.get_inputs(), example, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]
