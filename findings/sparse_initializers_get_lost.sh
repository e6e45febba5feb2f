#!/usr/bin/env bash
# Finding: most ONNX tools lose or refuse the weights of a valid model that stores them in sparse form.
#
# Packages:  onnx 1.23.2, onnxruntime 1.32.0, onnx_ir 1.1.0, onnxscript 0.7.2, openvino 2026.4.1.
# Guessed:   `GraphProto.sparse_initializer` is part of the format since 2019 (IR version 6), the checker takes it and
#            onnxruntime runs it; so what rewrites, prints, converts or loads models takes it along like other weights.
# Found:     onnxruntime alone computes with it. Text form and onnx_ir (and with it onnxscript's optimizer and rewriter)
#            return without an error a model that has no weight any more. The version converter, the reference
#            evaluator, the full check with shape inference, the quantizer and its preprocessing and openvino refuse
#            such a model. What onnxruntime itself saves as the optimized model keeps the weight sparse, but onnx's
#            checker refuses that file; the float16 converter leaves the weight in float32, so nothing runs the result.
#            With the same weight as a dense initializer all sixteen work. So zeros are better kept dense in ONNX.
#            (That onnx's old optimizer dropped them is known: onnx issue 3009, of 2020.)
# Output seen:
#   runs                   onnxruntime
#   keeps the weight       shape inference, function inliner
#   loses it silently      text form, onnx_ir, onnxscript optimizer, onnxscript rewriter
#   raises                 full check, version converter, reference evaluator, extractor, quantize_dynamic,
#                          quant_pre_process, openvino
#   writes what is invalid onnxruntime optimized model, float16 converter
#   with a dense weight:   keeps the weight, runs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 onnx_ir==1.1.0 \
  onnxscript==0.7.2 openvino==2026.4.1 sympy numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
logging.disable(logging.ERROR)
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript.optimizer
import onnxscript.rewriter
import openvino
from onnx import TensorProto, helper, inliner, numpy_helper, parser, printer, shape_inference, utils, version_converter
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

packages = ("onnx", "onnxruntime", "onnx_ir", "onnxscript", "openvino")
print(*(f"{name} {version(name)}" for name in packages), "python", sys.version.split()[0])
rng = np.random.default_rng(0)
weight = rng.normal(size=(64, 32)).astype(np.float32) * (rng.random((64, 32)) < 0.1)
x = rng.normal(size=(3, 64)).astype(np.float32)


def network(sparse):
    """Return relu(x @ w), whose weight is a sparse or a dense initializer."""
    where = np.flatnonzero(weight)
    values = numpy_helper.from_array(weight.ravel()[where], "w")
    w = helper.make_sparse_tensor(values, numpy_helper.from_array(where, "w_indices"), weight.shape)
    initializers = {"sparse_initializer": [w]} if sparse else {"initializer": [numpy_helper.from_array(weight, "w")]}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", n]) for name, n in (("x", 64), ("z", 32))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], **initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, "model.onnx")
    return model


def session(model, **options):
    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 4
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), chosen)


def optimized(model):
    session(model, optimized_model_filepath="optimized.onnx")
    return onnx.load("optimized.onnx")


def quantized(model):
    quantize_dynamic("model.onnx", "quantized.onnx")
    return onnx.load("quantized.onnx")


def preprocessed(model):
    quant_pre_process("model.onnx", "preprocessed.onnx")
    return onnx.load("preprocessed.onnx")


def checked(model):
    onnx.checker.check_model(model, full_check=True)
    return model


def verdict(tool, sparse=True):
    """Say what a tool makes of the model."""
    try:
        result = tool(network(sparse))
    except Exception:
        return "raises"
    if not isinstance(result, onnx.ModelProto):
        return "runs" if np.allclose(result, np.maximum(x @ weight, 0), atol=1e-5) else "computes something else"
    if not [*result.graph.sparse_initializer, *result.graph.initializer]:
        return "loses it silently"
    try:
        onnx.checker.check_model(result)
        session(result)
    except Exception:
        return "writes what is invalid"
    return "keeps the weight"


tools = {
    "onnxruntime": lambda model: session(model).run(None, {"x": x})[0],
    "shape inference": shape_inference.infer_shapes,
    "function inliner": inliner.inline_local_functions,
    "text form": lambda model: parser.parse_model(printer.to_text(model)),
    "onnx_ir": lambda model: onnx_ir.to_proto(onnx_ir.from_proto(model)),
    "onnxscript optimizer": onnxscript.optimizer.optimize,
    "onnxscript rewriter": onnxscript.rewriter.rewrite,
    "full check": checked,
    "version converter": lambda model: version_converter.convert_version(model, 21),
    "reference evaluator": lambda model: ReferenceEvaluator(model).run(None, {"x": x})[0],
    "extractor": lambda model: utils.Extractor(model).extract_model(["x"], ["z"]),
    "quantize_dynamic": quantized,
    "quant_pre_process": preprocessed,
    "openvino": lambda model: openvino.Core().compile_model("model.onnx", "CPU")(x)[0],
    "onnxruntime optimized model": optimized,
    "float16 converter": convert_float_to_float16,
}
expected = {"onnxruntime": "runs"}
expected |= dict.fromkeys(("shape inference", "function inliner"), "keeps the weight")
expected |= dict.fromkeys(("text form", "onnx_ir", "onnxscript optimizer", "onnxscript rewriter"), "loses it silently")
expected |= dict.fromkeys(("onnxruntime optimized model", "float16 converter"), "writes what is invalid")
found = {name: verdict(tool) for name, tool in tools.items()}
for outcome in dict.fromkeys(found.values()):
    print(f"{outcome:22s}", ", ".join(name for name in found if found[name] == outcome))
control = {verdict(tool, sparse=False) for tool in tools.values()}
print("with a dense weight:  ", ", ".join(sorted(control)))
found["control"], expected["control"] = control, {"runs", "keeps the weight"}
sys.exit("the behaviour has changed" if found != {name: expected.get(name, "raises") for name in found} else None)
PYTHON
