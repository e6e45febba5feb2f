"""Memory of the process as the operating system counts it."""

import math
import mmap

from lightning_sparse.accounting.memory import peak_memory, resident_memory


def test_memory_that_was_touched_is_counted_and_the_peak_remembers_what_was_freed():
    if math.isnan(peak_memory()):
        return
    before = resident_memory()
    with mmap.mmap(-1, 1 << 26) as block:  # new pages, whatever the heap still holds
        block.write(bytes([1]) * (1 << 26))
        assert resident_memory() - before > 0.9 * (1 << 26)
    assert peak_memory() - before > 0.9 * (1 << 26)
    assert peak_memory() >= resident_memory()
