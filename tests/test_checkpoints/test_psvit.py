"""Dense weights for PSViT, whose layers without an attention map have values only."""

import pytest
import torch

from mmtoken.backbones.psvit import PSViT
from mmtoken.checkpoints import load_into

ARCH = dict(stages=[(16, 2, (2,)), (32, 2, (1, 3))])
ARGS = dict(window_sizes=(None, None), img_size=64, out_indices=(0, 1))


def test_dense_twin(save):
    twin, ours = PSViT(ARCH, sharing=None, **ARGS), PSViT(ARCH, **ARGS)
    dense = twin.state_dict()
    report = load_into(ours, save(dict(state_dict={f'backbone.{k}': v for k, v in dense.items()})))
    assert report.source is None and report.newly_initialized == report.dropped == []
    followers = [(0, 1), (1, 2), (1, 3)]
    names = [f'layers.{i}.blocks.{j}.attn' for i, j in followers]
    assert report.split == [f'{name}.qkv.{kind}' for name in names for kind in ('weight', 'bias')]
    for name in names:
        channels = len(dense[f'{name}.proj.bias'])
        for kind in ('weight', 'bias'):
            joint, value = dense[f'{name}.qkv.{kind}'], ours.state_dict()[f'{name}.v.{kind}']
            assert torch.equal(value, joint[2 * channels :])
            assert report.mapped[f'{name}.v.{kind}'] == f'{name}.qkv.{kind}'
            assert report.resized[f'{name}.v.{kind}'] == (tuple(joint.shape), tuple(value.shape))
    same = dense.keys() & ours.state_dict().keys()
    assert all(torch.equal(dense[name], ours.state_dict()[name]) for name in same)
    assert len(same) + 6 == len(dense)


def test_as_torch_loads_it(save):
    """What PSViT does by itself with a dense twin's weights."""
    dense = PSViT(ARCH, sharing=None, **ARGS).state_dict()
    loaded, expected = PSViT(ARCH, **ARGS), PSViT(ARCH, **ARGS)
    load_into(loaded, save(dense))
    expected.load_state_dict(dense)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_other_layout(save):
    """A layer that had queries and keys may follow, one that had none may not lead."""
    finer = dict(stages=[(16, 2, (1, 1)), (32, 2, (2, 2))])
    state = PSViT(finer, **ARGS).state_dict()
    with pytest.raises(ValueError, match=r'not have: layers\.1\.blocks\.1\.attn\.v\.weight'):
        load_into(PSViT(ARCH, sharing=None, **ARGS), save(state))
    coarser = dict(stages=[(16, 2, (2,)), (32, 2, (4,))])
    report = load_into(PSViT(coarser, **ARGS), save(state))
    assert report.split == [
        f'layers.{i}.blocks.{j}.attn.qkv.{kind}'
        for i, j in ((0, 1), (1, 2))
        for kind in ('weight', 'bias')
    ]


def test_own_names_are_taken_as_they_are(save):
    theirs, ours = PSViT(ARCH, **ARGS), PSViT(ARCH, **ARGS)
    report = load_into(ours, save(theirs.state_dict()))
    assert report.source is None and not (
        report.split or report.newly_initialized or report.dropped
    )
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in ours.state_dict().items())
