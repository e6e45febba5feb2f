#!/usr/bin/env bash
# Finding: `import lightning.pytorch` loads PyTorch's compiler, and whatever of SciPy and torchvision is installed.
#
# Packages:  lightning 2.6.6, torchmetrics 1.9.0, torch 2.14.1, torchvision 0.29.1, scipy 1.17.1, CPU.
# Guessed:   a library for loops loads torch; the compiler and sympy are loaded when somebody compiles, and packages
#            that Lightning does not need cost nothing until somebody imports them.
# Found:     `import torch` loads neither torch._dynamo nor sympy, `import lightning.pytorch` loads both. It also
#            imports torchmetrics, first of all to compare its version (lightning.fabric.utilities.imports);
#            torchmetrics imports all of its functional metrics, and these import torchvision and scipy.signal where
#            they are installed. Every process that imports Lightning pays for all of it: each rank, each worker that
#            is spawned, each program of a test suite.
# Output seen:
#   torch                     1199 modules, with none of the four
#   lightning                 2680 modules, with torch._dynamo, sympy
#   torch, both installed     1199 modules, with none of the four
#   lightning, both installed 3460 modules, with torch._dynamo, sympy, scipy.signal, torchvision
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }

cat > "$folder/loaded.py" <<'PYTHON'
import sys
from importlib import import_module
from importlib.metadata import version

package, name, *expected = sys.argv[1:]
import_module(package)
loaded = [module for module in ("torch._dynamo", "sympy", "scipy.signal", "torchvision") if module in sys.modules]
print(f"{name:25s} {len(sys.modules)} modules, with {', '.join(loaded) or 'none of the four'}")
print(*(f"{each} {version(each)}" for each in ("lightning", "torchmetrics", "torch")), file=sys.stderr)
sys.exit("the behaviour has changed" if loaded != expected else None)
PYTHON
loaded() { "$folder/venv/bin/python" "$folder/loaded.py" "$@"; }

install lightning==2.6.6 torchmetrics==1.9.0 torch==2.14.1 numpy
loaded torch "torch"
loaded lightning.pytorch "lightning" torch._dynamo sympy
install torchvision==0.29.1 scipy==1.17.1
loaded torch "torch, both installed"
loaded lightning.pytorch "lightning, both installed" torch._dynamo sympy scipy.signal torchvision
