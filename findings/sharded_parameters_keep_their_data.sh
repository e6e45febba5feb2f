#!/usr/bin/env bash
# Finding: torch's vector_to_parameters and `p.data = ...` change nothing in parameters that FSDP2 shards, silently.
#
# Package:   torch 2.14.1 (fully_shard, DTensor, torch.nn.utils), CPU, gloo, 2 processes.
# Guessed:   what replaces the values of a parameter replaces them for a sharded one, too, or raises: setting `data` is
#            how vector_to_parameters, weight averages, rollbacks and masks in many libraries write a weight.
# Found:     a DTensor holds its shard beside the tensor whose data are set. So after `p.data = 0 * p.data` the
#            parameter, its shards, its `data`, the next forward pass and the next update are all as before, and so
#            after vector_to_parameters(0 * vector, parameters). `grad.data = ...` does nothing either. In-place
#            operations work: p.data.mul_, p.data.copy_, and load_state_dict. (For `.data` torch has an issue that asks
#            to document it: 157391.)
# Output seen (a weight of 8 ones that should become 0):
#   in-place mul_          0.0
#   copy_                  0.0
#   data = DTensor         8.0
#   data = plain tensor    8.0
#   vector_to_parameters   8.0
#   vector_to_parameters   0.0  (the same, not sharded)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy
cat > "$folder/check.py" <<'PYTHON'
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def zeroed(how, mesh=None):
    """Return the sum of 8 weights, as the next forward pass sees it, after they were set to 0 in one of the ways."""
    layer = nn.Linear(2, 4, bias=False)
    nn.init.ones_(layer.weight)
    if mesh:
        fully_shard(layer, mesh=mesh)
    how(layer.weight)
    total = layer(torch.ones(1, 2)).sum().item()
    weight = layer.weight.full_tensor() if isinstance(layer.weight, DTensor) else layer.weight
    assert weight.sum().item() == total
    return total


def assign(weight):
    weight.data = 0 * weight.data


def assign_plain(weight):
    weight.data = torch.zeros(4, 2)


def from_vector(weight):
    vector_to_parameters(0 * parameters_to_vector([weight]), [weight])


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ways = {
        "in-place mul_": lambda weight: weight.data.mul_(0),
        "copy_": lambda weight: weight.data.copy_(0 * weight.data),
        "data = DTensor": assign,
        "data = plain tensor": assign_plain,
        "vector_to_parameters": from_vector,
    }
    found = [zeroed(how, mesh) for how in ways.values()]
    dist.destroy_process_group()
    if rank == 0:
        for name, total in zip(ways, found):
            print(f"{name:22s} {total}")
        print(f"{'vector_to_parameters':22s} {zeroed(from_vector)}  (the same, not sharded)")
    sys.exit("the behaviour has changed" if found != [0.0, 0.0, 8.0, 8.0, 8.0] else None)


if __name__ == "__main__":
    print("torch", torch.__version__, "python", sys.version.split()[0], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (os.path.join(folder, "store"),), 2)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
