"""How often a forward pass waits for a GPU: never, but where a method chooses by the image."""

import pytest
import torch
from families import FAMILIES
from mmengine.registry import MODELS

from mmtoken.analysis.host_reads import count_host_reads

# Of each variant, once its plans are cached. DGE reads how many queries each block has, MSViT and
# MergeViT how many tokens an image keeps, and its windows how many each has.
READS = {
    'DGEPVT': [dict(tolist=5)] * 3 + [{}],
    'DGEDPVT': [dict(tolist=5), {}],
    'DGEDeiT': [dict(tolist=6)] * 3 + [{}, dict(tolist=6)],
    'MSViT': [dict(tolist=1)] * 2 + [dict(tolist=2), {}, dict(tolist=1)],
    'MergeViT': [dict(tolist=2)] * 2 + [dict(tolist=1), {}, dict(tolist=1)],
}
CASES = [
    pytest.param(
        dict(type=f'mmtoken.{name}', **kwargs),
        READS[name][i] if family.chooses else {},
        id=f'{name}-{i}',
    )
    for name, family in FAMILIES.items()
    for i, kwargs in enumerate(family.variants)
]


@pytest.mark.parametrize('cfg, expected', CASES)
@pytest.mark.parametrize('batch', [1, 3])
def test_reads_of_a_forward_pass(cfg, expected, batch):
    model, images = MODELS.build(cfg).eval(), torch.randn(batch, 3, 72, 104)

    @torch.no_grad()
    def forward():
        model(images)

    forward()
    assert count_host_reads(forward, images.device) == expected
