"""Lightning's averages of weights over time; a test that makes one skips where Lightning is older than they are."""

import pytest
from lightning.pytorch import callbacks


def _of(name):
    def make(*args, **kwargs):
        if not hasattr(callbacks, name):
            pytest.skip(f"{name} is of Lightning 2.6 and newer")
        return getattr(callbacks, name)(*args, **kwargs)

    return make


WeightAveraging, EMAWeightAveraging = _of("WeightAveraging"), _of("EMAWeightAveraging")
