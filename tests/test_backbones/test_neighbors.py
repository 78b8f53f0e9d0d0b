"""What every backbone and neck promises of an image whose neighbours in the batch are larger.

Its padding is known (sizes are noted on the batch) or guessed (trailing zeros). See "Padding" in
the docstring of each class.
"""

import pytest
import torch
from families import DPVT, PVT, SWAT_SWIN, SWIN, VIT
from helpers import wake
from mmengine.registry import MODELS as MMENGINE_MODELS

import mmtoken
from mmtoken import backbones, necks
from mmtoken.layers.common.gate import RegionGate
from mmtoken.layers.common.padding import note_sizes
from mmtoken.runtime.decisions import record_routing

SIZE, SHAPE = (128, 192), (256, 384)
ROUTED = [
    dict(type='mmtoken.DGEPVT', arch=PVT),
    dict(type='mmtoken.DGEDPVT', arch=DPVT),
    dict(type='mmtoken.DGEDeiT', arch=VIT),
    dict(type='mmtoken.MSViT', arch=VIT),
    dict(type='mmtoken.MSViT', arch=VIT, gate=dict(input='pixels')),
]
WINDOWED = [  # with how many of their maps are local
    (dict(type='mmtoken.STViTRSwin', arch=SWIN), 2),
    (dict(type='mmtoken.STViTRSwin', arch=SWIN, semantic_size=None), 3),
    (dict(type='mmtoken.STViTRSwin', arch=SWIN, form='classification'), 2),
    (dict(type='mmtoken.SWATSwin', arch=SWAT_SWIN), 3),
    (dict(type='mmtoken.SWATSwin', arch=SWAT_SWIN, structured=False), 3),
]


def build(cfg):
    torch.manual_seed(0)
    model = MMENGINE_MODELS.build(dict(cfg, drop_path_rate=0.0))
    wake(model)
    for module in model.modules():
        if isinstance(module, RegionGate):  # no tie between the scales of a black region
            module.layers[-1].bias.data.fill_(0.1)
    return model


def padded(image, shape=SHAPE, colour=0.0):
    """The image in a batch of another shape."""
    batch = torch.full((len(image), 3, *shape), colour)
    batch[:, :, : image.shape[2], : image.shape[3]] = image
    return batch


def told(batch, size=SIZE):
    mmtoken.set_image_sizes(batch, [size] * len(batch))
    return batch


def run(model, batch):
    """Maps and decisions in inference."""
    with torch.no_grad(), record_routing() as record:
        return model.eval()(batch), record


def in_image(decision, size=SIZE):
    """Regions that the image reaches into, ``(Hr, Wr)``, bool."""
    side = decision.region_size * SHAPE[0] // decision.grid[0]
    rows, columns = (torch.arange(n) * side for n in decision.choice.shape[1:])
    return (rows < size[0])[:, None] & (columns < size[1])


@pytest.mark.parametrize('cfg', ROUTED)
@pytest.mark.parametrize('colour', [0.0, 1e-6, 114.0])
def test_known_padding_is_coarse_whatever_its_colour(cfg, colour):
    model, image = build(cfg), torch.randn(2, 3, *SIZE)
    _, record = run(model, told(padded(image, colour=colour)))
    for decision in record:
        outside = ~in_image(decision)
        assert torch.equal(decision.padding, outside.expand(2, -1, -1))
        assert (decision.choice[:, outside] == decision.choice.max()).all()
    assert any((d.choice[:, in_image(d)] != d.choice.max()).any() for d in record)


@pytest.mark.parametrize('cfg', ROUTED)
def test_a_black_part_of_a_known_image_is_image(cfg):
    """No jump from 0 to a millionth: the same regions choose, and maps change little."""
    model, image = build(cfg), torch.randn(1, 3, *SIZE)
    image[:, :, SIZE[0] // 2 :] = 0
    almost = image.clone()
    almost[:, :, SIZE[0] // 2 :] = 1e-6
    maps, record = run(model, told(padded(image)))
    others, other_record = run(model, told(padded(almost)))
    for decision, other in zip(record, other_record, strict=True):
        assert torch.equal(~decision.padding[0], in_image(decision))
        assert torch.equal(decision.choice, other.choice)
    for map_, other in zip(maps, others, strict=True):
        torch.testing.assert_close(map_, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('cfg', ROUTED)
def test_a_black_part_of_an_unknown_image_is_padding(cfg):
    """What the docstrings say of images whose sizes nobody told."""
    model, image = build(cfg), torch.randn(1, 3, *SHAPE)
    image[:, :, SIZE[0] :] = 0
    _, record = run(model, image)
    for decision in record:
        assert torch.equal(~decision.padding[0], in_image(decision, (SIZE[0], SHAPE[1])))


@pytest.mark.parametrize('cfg', ROUTED)
@pytest.mark.parametrize('colour', [0.0, 114.0])
def test_padding_does_not_count_in_training(cfg, colour):
    """Among the same choices, what is published of the image is the same in any batch.

    But for the loss of gates, whose priors lie over the padded images.
    """
    model, image = build(cfg).train(), torch.randn(2, 3, *SIZE)
    published = []
    kind = 'coarse_ratio' if cfg['type'] == 'mmtoken.MSViT' else 'query_ratio'
    for batch in (
        image,
        told(padded(image, colour=colour)),
        told(padded(image, (128, 384), colour)),
    ):
        with mmtoken.token_losses() as losses, mmtoken.routing_override(**{kind: 1.0}):
            model(batch)
        published.append({k: v.item() for k, v in losses.items() if k != 'loss_gate'})
    assert published[0] and published[1:] == published[:1] * 2


@pytest.mark.parametrize('cfg', [cfg for cfg in ROUTED if cfg['type'] == 'mmtoken.MSViT'])
@pytest.mark.parametrize('size', [SIZE, (100, 150)])
def test_the_gate_chooses_as_for_the_image_alone(cfg, size):
    model, image = build(cfg), torch.randn(2, 3, *size)
    _, (alone,) = run(model, image)
    for batch in (padded(image), told(padded(image), size)):
        _, (decision,) = run(model, batch)
        assert torch.equal(decision.choice[:, in_image(decision, size)], alone.choice.flatten(1))
    assert 0 < alone.choice.float().mean() < 1


@pytest.mark.parametrize('cfg, local', WINDOWED)
def test_away_from_padding_windows_see_none(cfg, local):
    model, side = build(cfg), 1120
    model.out_indices = model.out_indices[:local]  # later stages are not run
    image = torch.randn(1, 3, side, side)
    alone, _ = run(model, image)
    maps, _ = run(model, padded(image, (side + 64, side + 160)))
    for map_, expected, reach in zip(maps, alone, (48, 160, 640), strict=False):
        places = (side - reach) * expected.shape[2] // side
        corner = map_[:, :, :places, :places]
        torch.testing.assert_close(corner, expected[:, :, :places, :places], atol=1e-4, rtol=1e-4)


def test_every_backbone_says_what_it_promises():
    for module in (backbones, necks):
        for name in module.__all__:
            assert 'Padding: ' in getattr(module, name).__doc__, name


@pytest.mark.parametrize('norm', ['LN', None])
@pytest.mark.parametrize('side', [12, 13])
def test_a_pyramid_is_local(side, norm):
    neck = necks.SimpleFeaturePyramid(8, 8, norm=norm)
    neck.init_weights()
    whole = torch.randn(1, 8, 20, 24)
    with torch.no_grad():
        alone, levels = neck([whole[:, :, :side, :side]]), neck([whole])
    for expected, level in zip(alone[:4], levels, strict=False):
        places = expected.shape[2] - 2
        torch.testing.assert_close(
            level[:, :, :places, :places], expected[:, :, :places, :places], atol=1e-5, rtol=1e-5
        )


def test_a_neck_that_is_told_leaves_padding_out():
    neck = necks.GrainUnpoolNeck([8, 8], 2, depth=1)
    wake(neck)
    image = torch.randn(2, 8, 8, 12)
    published = []
    for fill in (None, 0.0, 7.0):
        maps = [image.clone(), image[:, :, :4, :4].clone()]
        if fill is not None:
            sizes = [map_.shape[2:] for map_ in maps]
            maps = [torch.nn.functional.pad(map_, (0, 8, 0, 4), value=fill) for map_ in maps]
            for map_, size in zip(maps, sizes, strict=True):
                note_sizes(map_, torch.tensor([size] * 2))
        with mmtoken.token_losses() as losses, mmtoken.routing_override(query_ratio=1.0):
            neck.train()(maps)
        published.append({name: value.item() for name, value in losses.items()})
    assert published[0] and published[1:] == published[:1] * 2
