import pytest
import torch

from mmtoken.layers.common.packed import pack_equal, unpack_equal


def test_round_trip():
    sequences = torch.randn(3, 5, 2)
    features = pack_equal(sequences, (2, 2))
    assert features.tokens.shape == (15, 2)
    assert features.lengths.tolist() == [5, 5, 5]
    assert features.layout is None and features.grid == (2, 2)
    torch.testing.assert_close(unpack_equal(features), sequences)


def test_tokens_that_cannot_be_shared_out():
    features = pack_equal(torch.randn(2, 5, 2), (2, 2))
    with pytest.raises(ValueError, match='9 tokens are no multiple of 2 images'):
        unpack_equal(features._replace(tokens=features.tokens[:9]))
