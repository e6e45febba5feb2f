#!/usr/bin/env bash
# Finding: of the GGUF formats, Q4_1 and Q5_1 fill the zeros of a sparse weight; the smaller Q4_0 and Q5_0 keep them.
#
# Package:   gguf 0.19.0 (gguf.quants), numpy 2.4.6.
# Guessed:   a quantizer gives 0 a code of its own, as integer quantization with a zero point must; and Q4_1, which has
#            a minimum beside the scale of each 32 weights and is more exact on dense weights, is so on sparse ones.
# Found:     a block of Q4_1 spans its smallest to its largest value in 15 steps, and 0 lies on one of them only by
#            chance, or where a block has no value below 0. Of a weight with 10 % nonzeros 80 % become nonzero, and the
#            error is 2.2 times that of Q4_0, which needs half a bit less a weight; on a dense weight Q4_1 is the better
#            one. Q5_1 and Q5_0 likewise. Q4_0, Q5_0, Q8_0 and MXFP4 keep every zero.
# Output seen (share of nonzeros after the way there and back; root mean square error; dense, then 10 % nonzeros):
#            nonzeros          error
#   Q4_0     0.884   0.094     0.0862   0.0156
#   Q4_1     1.000   0.800     0.0784   0.0345
#   Q5_0     0.942   0.097     0.0429   0.0077
#   Q5_1     1.000   0.806     0.0380   0.0170
#   Q8_0     0.993   0.100     0.0054   0.0010
#   MXFP4    0.912   0.095     0.1151   0.0397
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType, quants

print(*(f"{name} {version(name)}" for name in ("gguf", "numpy")), "python", sys.version.split()[0])
rng = np.random.default_rng(0)
dense = rng.normal(size=(256, 1024)).astype(np.float32)
mask = rng.random(dense.shape) < 0.1


def there_and_back(name, weight):
    """Return the share of nonzeros and the error of a weight after quantization."""
    kind = GGMLQuantizationType[name]
    result = quants.dequantize(quants.quantize(weight, kind), kind)
    return np.count_nonzero(result) / result.size, np.sqrt(np.mean((result - weight) ** 2))


found = {}
for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"):
    found[name] = [there_and_back(name, weight) for weight in (dense, dense * mask)]
    (full, dense_error), (share, sparse_error) = found[name]
    print(f"{name:8s} {full:.3f}   {share:.3f}     {dense_error:.4f}   {sparse_error:.4f}")
keep = all(found[name][1][0] <= mask.mean() for name in ("Q4_0", "Q5_0", "Q8_0", "MXFP4"))
fill = all(found[name][1][0] > 0.7 for name in ("Q4_1", "Q5_1"))
pairs = [(found["Q4_0"], found["Q4_1"]), (found["Q5_0"], found["Q5_1"])]
worse = all(b[1][1] > 2 * a[1][1] and b[0][1] < a[0][1] for a, b in pairs)
sys.exit(None if keep and fill and worse else "the behaviour has changed")
PYTHON
