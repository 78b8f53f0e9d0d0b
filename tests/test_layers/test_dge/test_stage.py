import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmtoken.layers.dge.block import DynamicGranularityBlock
from mmtoken.layers.dge.spatial_reduction import SpatialReductionAttention
from mmtoken.layers.dge.stage import DynamicGranularityStage, resize_position, run_blocks
from mmtoken.losses.budget import count_tokens
from mmtoken.runtime.decisions import record_routing
from mmtoken.runtime.routing_override import routing_override


def tokens_of(decisions):
    """Counted tokens of each image, in each block."""
    layout, padding, gates, _ = decisions
    return [count_tokens(g, layout, padding)[0].tolist() for g in gates]


def make(depth=2, cls_token=False, granularities=(1, 2, 4), patch_size=2, stride=8, **kwargs):
    blocks = [
        DynamicGranularityBlock(16, SpatialReductionAttention(16, 2), 24, granularities, **kwargs)
        for _ in range(depth)
    ]
    return DynamicGranularityStage(3, patch_size, stride, (4, 4), blocks, cls_token).eval()


@pytest.mark.parametrize('cls_token', [False, True])
@pytest.mark.parametrize('size', [(16, 24), (15, 17), (1, 1)])
def test_parts_are_put_together(size, cls_token):
    stage = make(cls_token=cls_token)
    nn.init.normal_(stage.pos_embed)
    image = torch.randn(2, 3, *size)
    grid = tuple(-(-n // 2) for n in size)
    with torch.no_grad():
        tokens, extra, decisions = stage(image)
        x = F.pad(image, (0, -size[1] % 2, 0, -size[0] % 2))
        x = stage.patch_embed.norm(stage.patch_embed.proj(x).permute(0, 2, 3, 1))
        position = stage.pos_embed[:, int(cls_token) :].mT.unflatten(2, (4, 4))
        position = F.interpolate(position, grid, mode='bilinear', align_corners=False)
        x = (x + position.permute(0, 2, 3, 1)).flatten(1, 2)
        if cls_token:
            first = stage.cls_token + stage.pos_embed[:, :1]
            x = torch.cat([first.expand(2, -1, -1), x], dim=1)
        layout = stage.blocks[0].layout(grid, int(cls_token), x.device)
        x, _ = run_blocks(stage.blocks, x, layout, None)
    assert tokens.shape == (2, *grid, 16) and extra.shape == (2, int(cls_token), 16)
    together = torch.cat([extra, tokens.flatten(1, 2)], dim=1)
    torch.testing.assert_close(together, x, atol=1e-5, rtol=1e-5)
    assert tokens_of(decisions) == [[grid[0] * grid[1] + cls_token] * 2] * 2


def test_plain_stages_choose_nothing():
    tokens, _, decisions = make(granularities=(1,))(torch.randn(1, 3, 8, 8))
    assert tokens.shape == (1, 4, 4, 16) and decisions.gates == []


def test_all_blocks_are_told_of_padding():
    stage, valid = make(), torch.tensor([[32, 33], [64, 96]])
    with record_routing() as record, torch.no_grad(), routing_override(query_ratio=1.0):
        _, _, decisions = stage(torch.randn(2, 3, 16, 24), valid)
        stage(torch.randn(2, 3, 16, 24))
    padding = torch.tensor([[[0, 0, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]]).bool()
    for decision in record[:2]:
        assert torch.equal(decision.padding, padding)
        assert torch.equal(decision.choice, 2 * padding.long())
    assert all(decision.padding is None for decision in record[2:])
    assert tokens_of(decisions) == [[32, 96]] * 2


def test_positions_are_resized_only_if_they_must():
    position = torch.randn(1, 12, 5)
    assert torch.equal(resize_position(position, (3, 4), (3, 4)), position.view(1, 3, 4, 5))
    # As many tokens, but another grid
    other = resize_position(position, (3, 4), (4, 3))
    assert other.shape == (1, 4, 3, 5)
    assert not torch.allclose(other.flatten(1, 2), position)


def test_everything_learns():
    stage = make(cls_token=True, train_mode='exact').train()
    tokens, extra, _ = stage(torch.randn(2, 3, 18, 22))
    (tokens.square().sum() + (extra * torch.randn_like(extra)).sum()).backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
