"""Where a row of packed documents belongs, against the definition."""

import torch

from nsa.ops.packed import document_of, packed_positions


def test_positions_restart_at_each_document_and_go_on_behind_the_last():
    bounds, length = [0, 0, 3, 3, 7, 7], 9
    expected = [max(range(len(bounds) - 1), key=lambda d: (bounds[d] <= t < bounds[d + 1], d)) for t in range(length)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert document_of(torch.arange(length), cu_seqlens).tolist() == expected
    assert packed_positions(cu_seqlens, length).tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
