import torch
import torch.nn.functional as F
from torch import nn

from mmtoken.analysis import measure_cost
from mmtoken.analysis.cost import macs_by_stage, stage_names
from mmtoken.runtime.reference import on_reference_path


class Attention(nn.Module):
    """8 tokens of 6 channels attend to each other; half of the tokens on the fast path."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(6, 18, bias=False)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        if not on_reference_path():
            tokens = tokens[:, :4]
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        if self.fused:
            return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
        return (query @ key.transpose(1, 2)).softmax(-1) @ value


class Network(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.layers = nn.ModuleList([nn.Identity(), Attention(fused)])
        self.scale = nn.Parameter(torch.ones(6, 6))

    def forward(self, x):
        out = self.stem(x)
        for layer in self.layers:
            out = layer(out)
        return (out.squeeze(1)[0] @ self.scale,)  # a tuple of one, as backbones return it


LINEAR, SCORES = 8 * 6 * 18, 2 * 8 * 8 * 6
EXPECTED = {
    'stem': dict(linear=0, convolution=8 * 6 * 3 * 4, attention=0),
    'layers.1': dict(linear=LINEAR, convolution=0, attention=SCORES),
    'other': dict(linear=8 * 6 * 6, convolution=0, attention=0),
}


def test_stages_and_kinds_are_told_apart():
    images = torch.zeros(1, 3, 4, 8)
    for fused in (True, False):
        cost = measure_cost(Network(fused), images)
        assert cost.stages == EXPECTED
        assert cost.macs == sum(sum(kinds.values()) for kinds in EXPECTED.values())
        assert cost.by_kind()['attention'] == SCORES
        # The fast path: half of the tokens.
        assert cost.executed == cost.macs - LINEAR // 2 - SCORES * 3 // 4 - 4 * 6 * 6
        assert cost.to_dict()['executed_extra'] == cost.executed - cost.macs
        assert cost.parameters == 6 * 3 * 4 + 6 + 6 * 18 + 36


def test_parts_of_a_submodule():
    model = nn.Sequential(Network())
    assert stage_names(model[0]) == ['stem', 'layers.0', 'layers.1']
    images = torch.zeros(1, 3, 4, 8)
    stages = macs_by_stage(model, images, root=model[0])
    assert stages.keys() == EXPECTED.keys()
    assert stages['stem'] == EXPECTED['stem']
    assert not model[0].stem._forward_hooks and not model[0].stem._forward_pre_hooks


class Growing(nn.Linear):
    """The i-th image of a batch has i + 1 tokens."""

    def forward(self, x):
        return [super(Growing, self).forward(x.new_zeros(i + 1, 2)) for i in range(len(x))]


def test_of_a_batch_the_mean_is_taken():
    cost = measure_cost(nn.Sequential(Growing(2, 5)), torch.zeros(3, 3, 4, 4), batch_size=3)
    assert cost.macs == cost.executed == 2 * 2 * 5
    assert cost.stages['0']['linear'] == 2 * 2 * 5


def test_of_a_backbone():
    from mmtoken.backbones import STViTRSwin

    tiny = dict(embed_dims=32, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8))
    images = torch.zeros(1, 3, 112, 112)
    sparse = measure_cost(STViTRSwin(tiny).eval(), images)
    dense = measure_cost(STViTRSwin(tiny, semantic_size=None).eval(), images)
    assert list(sparse.stages) == ['patch_embed', *(f'layers.{i}' for i in range(4))]
    for name in ('patch_embed', 'layers.0', 'layers.1'):
        assert sparse.stages[name] == dense.stages[name]
    # 28 x 28 tokens of 32 channels in 16 windows, two blocks, and the merging behind them.
    tokens, channels, window = 28 * 28, 32, 49
    assert dense.stages['layers.0'] == dict(
        linear=2 * 12 * tokens * channels**2 + tokens // 4 * 8 * channels**2,
        convolution=0,
        attention=2 * 2 * tokens * window * channels,
    )
