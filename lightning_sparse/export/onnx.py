"""ONNX files that are checked with onnxruntime when they are written."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat.extras import extra
from lightning_sparse.export._modules import Example, check_dense, check_equal, evaluating, results, tensor_arguments

__all__ = ["onnx_session", "to_onnx"]

# a protobuf file holds 2 GiB at most: above, weights go into a second file
_ONE_FILE = 2**31 - 2**24


def to_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_input: Example,
    *,
    dynamic_batch: bool = True,
    tolerance: float | None = 1e-4,
) -> None:
    """Write ``module`` in eval mode as ONNX, and check with onnxruntime that it computes the same.

    Zeros are written as zeros: ONNX has no sparse matrix products, so such a file gains nothing by sparsity alone.
    Export the result of ``compact`` to gain.

    Args:
        module: to export; it is not changed.
        path: of the file; it is overwritten. Weights of more than 2 GiB go into a second file beside it.
        example_input: a tensor, or a tuple of positional tensors, of the shapes and dtypes of the inputs.
        dynamic_batch: accept any size of the first dimension of each input. False: that of the example alone.
        tolerance: the largest difference allowed on the example, relative to the larger of 1 and the largest output;
            None: by dtype, 1e-5 for float32.

    Raises:
        ValueError: an argument is of another type, or the module has sparse layers.
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
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(
            f"path must be in a folder that exists, got {os.fspath(path)!r}. Make the folder first."
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        extra(package, "export")
    more = tuple(torch.cat([x, x[:1]]) for x in given) if dynamic_batch else given  # a batch of one would be a constant
    size = sum(tensor.nbytes for tensor in module.state_dict().values() if isinstance(tensor, Tensor))
    with evaluating(module):
        torch.onnx.export(
            module,
            more,
            os.fspath(path),
            dynamo=True,
            verbose=False,
            external_data=size > _ONE_FILE,
            dynamic_shapes=tuple({0: torch.export.Dim.AUTO} for _ in more) if dynamic_batch else None,
        )
    try:
        session = onnx_session(path)
        for example in (given, more):
            check_equal(
                results(module, example), _run(session, example), tolerance, f"{os.fspath(path)} in onnxruntime"
            )
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


def _run(session: Any, example: tuple[Any, ...]) -> list[Tensor]:
    given = {slot.name: x.detach().cpu().numpy() for slot, x in zip(session.get_inputs(), example, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]
