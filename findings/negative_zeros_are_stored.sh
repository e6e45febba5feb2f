#!/usr/bin/env bash
# Finding: the sparse arrays of the package `sparse` (PyData) store -0.0, so a masked weight is not sparse in them.
#
# Packages:  sparse 0.19.3, numpy 2.4.6; beside them scipy 1.17.1 and pyarrow 26.0.1.
# Guessed:   -0.0 == 0, so what makes an array sparse leaves it out, as numpy's count_nonzero does.
# Found:     COO, GCXS and asarray compare with the fill value bit by bit. `weight * mask` is -0.0 wherever a negative
#            weight is pruned, so half of the pruned weights are stored: 0.55 of a matrix with 10 % nonzeros, 5.5 times
#            the memory and products, also in the scipy matrix that `tocsr` makes. A product of a sparse weight and a
#            sparse mask does the same, and the argument `prune` leaves them. Adding 0 once, np.where(mask, weight, 0)
#            or a way through scipy leaves the true nonzeros. DOK, scipy and pyarrow store no -0.0.
# Output seen (entries of 6618 nonzeros that are stored):
#   COO.from_numpy(weight * mask)            36073
#   GCXS.from_numpy(weight * mask)           36073
#   COO(weight) * COO(mask)                  36073
#   COO(..., prune=True)                     36073
#   COO.from_numpy(weight * mask).tocsr()    36073
#   COO.from_numpy(weight * mask) + 0         6618
#   COO.from_numpy(where(mask, weight, 0))    6618
#   DOK.from_numpy(weight * mask)             6618
#   scipy csr_array(weight * mask)            6618
#   pyarrow SparseCSRMatrix                   6618
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check sparse==0.19.3 numpy==2.4.6 scipy==1.17.1 pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import pyarrow
import scipy.sparse
import sparse

packages = ("sparse", "numpy", "scipy", "pyarrow")
print(*(f"{name} {version(name)}" for name in packages), "python", sys.version.split()[0])
rng = np.random.default_rng(0)
weight, mask = rng.normal(size=(256, 256)).astype(np.float32), rng.random((256, 256)) < 0.1
masked = weight * mask
coo = sparse.COO.from_numpy(masked)
nonzeros = np.count_nonzero(masked)
zeros = nonzeros + np.count_nonzero(np.signbit(masked) & ~mask)
stored = {
    "COO.from_numpy(weight * mask)": coo.nnz,
    "GCXS.from_numpy(weight * mask)": sparse.GCXS.from_numpy(masked).nnz,
    "COO(weight) * COO(mask)": (sparse.COO.from_numpy(weight) * sparse.COO.from_numpy(mask)).nnz,
    "COO(..., prune=True)": sparse.COO(coo.coords, coo.data, coo.shape, prune=True).nnz,
    "COO.from_numpy(weight * mask).tocsr()": coo.tocsr().nnz,
    "COO.from_numpy(weight * mask) + 0": (coo + 0).nnz,
    "COO.from_numpy(where(mask, weight, 0))": sparse.COO.from_numpy(np.where(mask, weight, 0)).nnz,
    "DOK.from_numpy(weight * mask)": sparse.DOK.from_numpy(masked).nnz,
    "scipy csr_array(weight * mask)": scipy.sparse.csr_array(masked).nnz,
    "pyarrow SparseCSRMatrix": pyarrow.SparseCSRMatrix.from_dense_numpy(masked).non_zero_length,
}
for name, count in stored.items():
    print(f"{name:40s} {count:5d}")
sys.exit("the behaviour has changed" if [*stored.values()] != [zeros] * 5 + [nonzeros] * 5 else None)
PYTHON
