import math

import pytest
import torch
from torch import nn

from mmtoken.layers.common.gate import RegionGate


def test_shapes():
    gate = RegionGate(384)
    linear = [m for m in gate.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [
        (384, 64), (64, 64), (64, 64), (64, 1),
    ]  # fmt: skip
    assert sum(m.weight.numel() for m in linear) == 32_832
    kinds = [type(m) for m in gate.layers]
    assert kinds == [nn.Linear, nn.LayerNorm, nn.GELU] * 3 + [nn.Linear]
    scores = gate(torch.randn(2, 3, 5, 384))
    assert scores.shape == (2, 3, 5, 2) and scores.dtype == torch.float32
    assert not scores[..., 0].any()


@pytest.mark.parametrize('num_layers', [1, 2, 4])
def test_score_is_that_of_a_sigmoid(num_layers):
    gate, x = RegionGate(6, 8, num_layers), torch.randn(2, 3, 5, 6)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    scores = gate(x)
    logits = gate.layers(x)[..., 0]
    assert logits.std() > 0.1
    torch.testing.assert_close(scores.softmax(-1)[..., 1], logits.sigmoid())
    assert torch.equal(scores.argmax(-1) == 1, logits > 0)


def test_regions_decide_for_themselves():
    gate, x = RegionGate(6), torch.randn(2, 3, 5, 6)
    nn.init.normal_(gate.layers[-1].weight)
    alone = torch.stack([gate(part.view(1, 1, 1, 6)).flatten() for part in x.view(-1, 6)])
    torch.testing.assert_close(gate(x).view(-1, 2), alone)


@pytest.mark.parametrize('start_ratio', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('num_layers', [1, 4])
def test_start(start_ratio, num_layers):
    """Nearly the same chance for every region, and for good after another initialization."""
    gate, x = RegionGate(16, num_layers=num_layers, start_ratio=start_ratio), torch.randn(500, 16)
    for again in (False, True):
        if again:
            for parameter in gate.parameters():
                nn.init.normal_(parameter)
            gate.init_weights()
        assert gate.layers[-1].bias.item() == pytest.approx(
            math.log(start_ratio / (1 - start_ratio)), abs=1e-6
        )
        assert 0 < gate.layers[-1].weight.abs().max() <= 0.05
        coarse = gate(x.view(1, 20, 25, 16)).softmax(-1)[..., 1]
        assert coarse.mean().item() == pytest.approx(start_ratio, abs=0.03)
        assert coarse.std() > 0


def test_half_precision_is_read_in_float32():
    gate, x = RegionGate(16), torch.randn(2, 3, 5, 16)
    nn.init.normal_(gate.layers[-1].weight)
    expected = gate(x.bfloat16().float())
    with torch.autocast('cpu', torch.bfloat16):
        scores = gate(x.bfloat16())
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)
    assert gate.bfloat16()(x).dtype == torch.float32


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(start_ratio=0), 'start_ratio must be between 0 and 1, got 0'),
        (dict(start_ratio=1), 'got 1'),
        (dict(start_ratio=float('nan')), 'got nan'),
        (dict(num_layers=0), 'num_layers must be 1 or more, got 0'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        RegionGate(8, **bad)


def test_regions_see_their_neighbors():
    gate, x = RegionGate(6, 8, num_layers=3, kernel_size=3), torch.randn(1, 7, 7, 6)
    other = x.clone()
    other[0, 0, 0] += 1
    seen = (gate(x) != gate(other))[0, ..., 1]
    rows, columns = torch.meshgrid(torch.arange(7), torch.arange(7), indexing='ij')
    assert torch.equal(seen, (rows <= 2) & (columns <= 2))  # two layers of 3 x 3


def test_padding_is_not_seen():
    gate, x = RegionGate(6, 8, kernel_size=3), torch.randn(1, 5, 6, 6)
    padding = torch.zeros(1, 5, 6, dtype=torch.bool)
    padding[:, 3:], padding[:, :, 4:] = True, True
    torch.testing.assert_close(gate(x, padding)[:, :3, :4], gate(x[:, :3, :4]))
