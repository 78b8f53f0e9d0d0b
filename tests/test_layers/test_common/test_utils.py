import torch

from mmtoken.layers.common.utils import to_map


def test_map_is_row_by_row_and_contiguous():
    map_ = to_map(torch.arange(12.0).view(1, 2, 3, 2))
    assert map_.is_contiguous()
    torch.testing.assert_close(map_[0, 0], torch.tensor([[0.0, 2, 4], [6, 8, 10]]))
