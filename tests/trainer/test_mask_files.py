"""Files of masks are read as they were written, or refused."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_sparse.trainer.mask_files import read_masks

MASKS = {"a.weight": torch.tensor([[True, False, True]]), "b.weight": torch.zeros(4, dtype=torch.bool)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_with_any_byte_altered_or_cut_is_one_of_booleans_or_refused(tmp_path, data):
    save_file(MASKS, tmp_path / "masks.safetensors")
    whole = (tmp_path / "masks.safetensors").read_bytes()
    at, byte = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.sampled_from([None, 0, 1, 2, 57, 123, 255]))
    altered = whole[:at] if byte is None else whole[:at] + bytes([byte]) + whole[at + 1 :]
    (tmp_path / "masks.safetensors").write_bytes(altered)
    try:
        read = read_masks(str(tmp_path / "masks.safetensors"))
    except ValueError as error:
        assert "initial must be a file of" in str(error)  # noqa: PT017
    else:
        assert all(mask.dtype == torch.bool and mask.view(torch.uint8).le(1).all() for mask in read.values())


def test_bytes_that_are_no_booleans_are_refused_by_the_name_of_their_mask(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_file(MASKS, path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(ValueError, match=r"whose '[ab]\.weight' holds other bytes than 0 and 1: .*save_masks\(path\)"):
        read_masks(str(path))
