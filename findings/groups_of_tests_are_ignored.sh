#!/usr/bin/env bash
# Finding: under pytest 9.2, pytest-xdist's `--dist loadgroup` groups nothing, and says nothing.
#
# Packages:  pytest 9.2.0 and 9.1.1, pytest-xdist 3.8.0.
# Guessed:   tests with the same `xdist_group` run in one worker, so that a fixture that trains for all tests of a module
#            (on several processes, or on the only GPU) runs once.
# Found:     xdist writes the group into a private attribute of each test, from which pytest 9.2 no longer makes the
#            test's id. So no test has a group: they are dealt out one by one, and every worker runs the fixture. The
#            suite passes, and takes longer; what must not run twice at a time does. `--dist loadfile` still keeps a
#            module in one worker.
# Output seen (how often the fixture of a module ran, on two workers):
#   pytest 9.1.1 loadgroup 1, loadfile 1
#   pytest 9.2.0 loadgroup 2, loadfile 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_trained.py" <<'PYTHON'
import time

import pytest

pytestmark = pytest.mark.xdist_group("trained")


@pytest.fixture(scope="module")
def trained():
    with open("runs", "a") as file:
        file.write("run\n")
    time.sleep(2)


@pytest.mark.parametrize("case", range(8))
def test_case(trained, case):
    pass
PYTHON
printf 'import pytest\n\n\n@pytest.mark.parametrize("case", range(20))\ndef test_other(case):\n    pass\n' > "$folder/test_other.py"
python3 -m venv "$folder/venv"
counts=()
for version in 9.1.1 9.2.0; do
    "$folder/venv/bin/pip" install -q --disable-pip-version-check "pytest==$version" pytest-xdist==3.8.0
    for way in loadgroup loadfile; do
        rm -f "$folder/runs"
        (cd "$folder" && venv/bin/python -m pytest -q -n 2 --dist "$way" -p no:cacheprovider > out.txt) || cat "$folder/out.txt"
        counts+=("$(wc -l < "$folder/runs")")
    done
    echo "pytest $version loadgroup ${counts[-2]}, loadfile ${counts[-1]}"
done
[ "${counts[*]}" = "1 1 2 1" ] || { echo "the behaviour has changed"; exit 1; }
