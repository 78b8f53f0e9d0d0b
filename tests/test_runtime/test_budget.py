import copy
import re

import pytest
import torch

import mmtoken
from mmtoken.analysis.decisions import image_ratios
from mmtoken.backbones import DGEPVT, DGEDeiT, MergeViT, MSViT, STViTDeiT
from mmtoken.necks import GrainUnpoolNeck
from mmtoken.runtime.decisions import record_routing

VIT = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
PVT = dict(
    embed_dims=(16, 32), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(4, 2)
)
BACKBONES = {
    'DGEPVT': lambda: DGEPVT(PVT, out_indices=(0, 1), drop_path_rate=0),
    'DGEPVT, shared': lambda: DGEPVT(
        PVT, out_indices=(0, 1), drop_path_rate=0, router=dict(query_ratio=0.9)
    ),
    'DGEDeiT': lambda: DGEDeiT(VIT),
    'DGEDeiT, shared': lambda: DGEDeiT(VIT, router={}),
    'MSViT': lambda: MSViT(VIT),
    'MSViT, fixed': lambda: MSViT(VIT, gate=dict(fine_ratio=0.9)),
}
LEAST = {name: 1 / 4 if name.startswith('MSViT') else 1 / 16 for name in BACKBONES}
IMAGES = torch.rand(3, 3, 256, 128, generator=torch.Generator().manual_seed(0))


def make(name):
    torch.manual_seed(0)
    backbone = BACKBONES[name]().eval()
    for name, layer in backbone.named_modules():  # scores that differ
        if isinstance(layer, torch.nn.Linear) and re.search(r'router\.gate$|gate\.layers', name):
            torch.nn.init.normal_(layer.weight, std=1)
    return backbone


def ratios(backbone, images=IMAGES):
    with record_routing() as decisions, torch.no_grad():
        backbone(images)
    return image_ratios(decisions)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('tokens', [0.3, 0.5, 0.77, 1.0])
def test_every_image_has_its_share(name, tokens):
    """As near as whole regions come to it; only MSViT may have half a region more."""
    found = ratios(mmtoken.set_budget(make(name), tokens))
    more = 0.02 if name.startswith('MSViT') else 1e-6
    assert (found <= tokens + more).all() and (found > tokens - 0.13).all(), found


@pytest.mark.parametrize('name', BACKBONES)
def test_scores_that_were_learned_decide(name):
    """A larger budget keeps what was fine."""
    backbone, fine = make(name), None
    for tokens in (0.3, 0.6, 0.9):
        mmtoken.set_budget(backbone, tokens)
        with record_routing() as decisions, torch.no_grad():
            backbone(IMAGES)
        now = decisions[0].choice == 0  # what later routers see has changed
        assert fine is None or (now | ~fine).all()
        fine = now


@pytest.mark.parametrize('name', BACKBONES)
def test_none_goes_back_to_the_config(name):
    backbone = make(name)
    with torch.no_grad():
        expected = backbone(IMAGES)
        mmtoken.set_budget(backbone, 0.6)
        assert not torch.equal(backbone(IMAGES)[-1], expected[-1])
        state = copy.deepcopy(backbone).state_dict()
        mmtoken.set_budget(backbone, None)
        for got, wanted in zip(backbone(IMAGES), expected, strict=True):
            assert torch.equal(got, wanted)
    assert not any('budget' in key for key in state.keys() - backbone.state_dict().keys())


@pytest.mark.parametrize('name', BACKBONES)
def test_training_chooses_what_inference_does(name):
    backbone = mmtoken.set_budget(make(name), 0.5)
    with torch.no_grad():
        expected = backbone(IMAGES)
    backbone.train()
    with mmtoken.token_losses():
        for got, wanted in zip(backbone(IMAGES), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    backbone = mmtoken.set_budget(make('MSViT'), 0.5)
    with torch.no_grad():
        together, alone = backbone(IMAGES)[0], backbone(IMAGES[1:2])[0]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_merging_leaves_no_fewer():
    backbone = MergeViT(VIT, merge_blocks=(0, 1)).eval()
    patches = 16 * 8
    lengths = {}

    def count(tokens):
        mmtoken.set_budget(backbone, tokens)
        found = []
        backbone.blocks[-1].register_forward_pre_hook(
            lambda module, args: found.append(args[2]), with_kwargs=False
        )
        with torch.no_grad():
            backbone(IMAGES)
        backbone.blocks[-1]._forward_pre_hooks.clear()
        return [length - 1 for length in found[0]]  # without the class token

    lengths = {tokens: count(tokens) for tokens in (None, 0.5, 0.9, 1.0)}
    assert all(a < b for a, b in zip(lengths[None], lengths[0.9], strict=True))
    assert lengths[0.9] == [116] * 3 and lengths[1.0] == [patches] * 3
    assert all(length >= patches / 2 for length in lengths[0.5])
    fixed = MergeViT(VIT, merge_blocks=(0, 1), least_tokens=0.9)
    assert fixed.least_behind(1, (16, 8)) == 116


def test_a_detector_and_a_neck():
    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Conv2d(3, 32, 16, 16)
            self.neck = GrainUnpoolNeck(32, num_heads=2, depth=1)

    model = mmtoken.set_budget(Detector().eval(), 0.4)
    with record_routing() as decisions, torch.no_grad():
        model.neck((model.backbone(IMAGES),))
    assert (image_ratios(decisions) <= 0.4).all()


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('tokens', [0.0, 0.01, 1.2, -1])
def test_budgets_that_cannot_be(name, tokens):
    with pytest.raises(ValueError, match=rf'from {LEAST[name]:.4g} to 1 .* got {tokens}'):
        mmtoken.set_budget(make(name), tokens)


@pytest.mark.parametrize(
    'make', [lambda: STViTDeiT(VIT, base_layers=1), lambda: MSViT(VIT, gate=None),
             lambda: MergeViT(VIT, merge_blocks=()), lambda: DGEDeiT(VIT, granularities=(1,))]
)  # fmt: skip
def test_networks_that_choose_nothing(make):
    with pytest.raises(ValueError, match='no part of .* chooses its tokens'):
        mmtoken.set_budget(make(), 0.5)


def test_least_tokens_is_a_share():
    with pytest.raises(ValueError, match='least_tokens must be from 0 to 1, got 2'):
        MergeViT(VIT, merge_blocks=(0,), least_tokens=2)
