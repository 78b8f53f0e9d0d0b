import pytest
import torch
from helpers import wake

import mmtoken
from mmtoken.analysis.decisions import image_ratios
from mmtoken.backbones import DGEPVT, DGEDeiT
from mmtoken.layers.common.regions import describe_regions, make_region_layout
from mmtoken.layers.dge.shared_router import SharedRouter
from mmtoken.runtime.decisions import record_routing

VIT = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32)
PVT = dict(embed_dims=(8, 16), depths=(2, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))
LABEL_LOSS = dict(type='mmtoken.LabelPurityLoss')
TAUGHT = dict(query_ratio=0.5, kernel_size=3, label_loss=LABEL_LOSS)


def deit(**kwargs):
    return wake(DGEDeiT(**{'arch': VIT, 'img_size': 96, 'out_indices': (0, 2), **kwargs}))


def pvt(**kwargs):
    return wake(DGEPVT(**{'arch': PVT, 'out_indices': (0, 1), 'drop_path_rate': 0.0, **kwargs}))


MAKERS = pytest.mark.parametrize('make', [deit, pvt])


def labelled(number=2):
    images = torch.randn(number, 3, 128, 192)
    labels = torch.zeros(number, 128, 192, dtype=torch.long)
    labels[:, 30:75, 50:100] = 1
    mmtoken.set_label_maps(images, labels)
    return images


def run(model, images):
    with mmtoken.token_losses() as published, record_routing() as decisions:
        maps = model(images)
    return maps, decisions, published


@MAKERS
@pytest.mark.parametrize('ratio', [0.2, 0.5, 0.9])
def test_every_image_meets_the_budget(make, ratio):
    model = make(router=dict(query_ratio=ratio)).eval()
    with torch.no_grad():
        _, decisions, _ = run(model, torch.randn(3, 3, 256, 384))
    ratios = image_ratios(decisions)
    assert (ratios <= ratio + 1e-6).all() and (ratios > ratio - 0.1).all(), ratios


@MAKERS
def test_blocks_of_a_stage_have_one_choice(make):
    model = make(router={}).eval()
    with torch.no_grad():
        _, decisions, _ = run(model, torch.randn(2, 3, 128, 192))
    assert len(decisions) == 3 and torch.equal(decisions[0].choice, decisions[1].choice)
    assert not any('blocks' in name for name in model.state_dict() if 'router' in name)


@MAKERS
def test_training_and_inference_are_the_same_function(make):
    model, images = make(router=TAUGHT), labelled()
    trained, _, _ = run(model.train(), images)
    with torch.no_grad():
        tested, _, _ = run(model.eval(), images)
    for a, b in zip(trained, tested, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@MAKERS
def test_finest_everywhere_is_the_twin(make):
    model = make(router=dict(query_ratio=1.0)).eval()
    twin = make(**type(model).twin_args, router=dict(query_ratio=1.0)).eval()
    state = {name: value for name, value in model.state_dict().items() if 'router' not in name}
    twin.load_state_dict(state)
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        for a, b in zip(model(images), twin(images), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@MAKERS
def test_labels_alone_teach_a_router_with_a_budget(make):
    model, images = make(router=TAUGHT).train(), labelled()
    maps, _, published = run(model, images)
    assert list(published) == ['loss_region_labels'] and model.budget is None
    routers = {name: p for name, p in model.named_parameters() if 'router' in name}
    others = {name: p for name, p in model.named_parameters() if 'router' not in name}
    grads = torch.autograd.grad(
        published.total(), [*routers.values(), *others.values()], allow_unused=True
    )
    assert all((g is None) == (i >= len(routers)) for i, g in enumerate(grads))
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is None for p in routers.values())
    assert all(p.grad is not None for p in others.values())


@MAKERS
def test_without_a_budget_the_task_teaches_it_too(make):
    model = make(router=dict(label_loss=LABEL_LOSS)).train()
    maps, _, published = run(model, labelled())
    assert {'loss_region_labels', 'loss_budget'} <= set(published)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'router' in n)


def test_labels_are_learned():
    torch.manual_seed(0)
    images, labels = torch.zeros(2, 3, 192, 192), torch.zeros(2, 192, 192, dtype=torch.long)
    images[0, :, 20:84, 100:150], labels[0, 20:84, 100:150] = 1, 1
    images[1, :, 90:190, 10:90], labels[1, 90:190, 10:90] = 1, 1
    images += 0.5  # no padding
    mmtoken.set_label_maps(images, labels)
    model = deit(router=TAUGHT).train()
    optimizer = torch.optim.Adam(model.router.parameters(), lr=0.02)
    for _ in range(80):
        _, decisions, published = run(model, images)
        optimizer.zero_grad()
        published.total().backward()
        optimizer.step()
    target, _ = model.label_loss.targets(labels, (16, 32, 64), 64, (3, 3))
    assert published['loss_region_labels'] < 0.1
    assert torch.equal(decisions[0].choice, target)


@pytest.mark.parametrize('label_loss', [None, LABEL_LOSS])
def test_frozen_stem_keeps_a_router_unless_labels_teach_it(label_loss):
    model = deit(router=dict(query_ratio=0.5, label_loss=label_loss), frozen_stages=1).train()
    assert all(p.requires_grad == (label_loss is not None) for p in model.router.parameters())
    assert not any(p.requires_grad for p in model.blocks[0].parameters())


def test_padding_is_coarse_and_not_counted():
    router = wake(SharedRouter(8, (1, 2, 4), 4, query_ratio=0.5, kernel_size=3))
    layout = make_region_layout((16, 24), (1, 2, 4), 4)
    padding = torch.zeros(1, 4, 6, dtype=torch.bool)
    padding[:, :, 3:] = True
    tokens = torch.randn(1, 16 * 24, 8)
    changed = tokens.unflatten(1, (16, 24)).clone()
    changed[:, :, 12:] = 9
    choices = []
    for x in (tokens, changed.flatten(1, 2)):
        routing, _ = router(x, layout, padding, 1)
        choices.append(routing.gates.argmax(dim=-1))
    assert torch.equal(*choices)  # what the padding holds does not matter
    assert (choices[0][padding] == 2).all()
    counts = layout.num_cells.view(4, 6, 3).gather(-1, choices[0][0, ..., None])[..., 0]
    assert 0.35 < counts[:, :3].sum() / (16 * 12) <= 0.5


def test_regions_are_described_by_mean_and_spread():
    x = torch.randn(2, 6, 8, 3)
    described = describe_regions(x, 4)
    assert described.shape == (2, 2, 2, 6)
    region = x[0, :4, 4:].flatten(0, 1)
    expected = torch.cat([region.mean(0), region.std(0, unbiased=False)])
    torch.testing.assert_close(described[0, 0, 1], expected, atol=1e-4, rtol=1e-4)
    flat = describe_regions(torch.ones(1, 4, 4, 3, requires_grad=True), 4)
    flat.sum().backward()  # finite where nothing varies


@pytest.mark.parametrize('make', [deit, pvt])
@pytest.mark.parametrize('bad', [dict(query_ratio=0), dict(query_ratio=1.5), dict(target=0.5)])
def test_bad_arguments(make, bad):
    with pytest.raises(ValueError, match='query_ratio'):
        make(router=bad)


def test_a_ratio_for_each_stage():
    ratios = (0.5, 1.0)
    model = pvt(router=dict(query_ratio=ratios)).eval()
    assert [stage.router.query_ratio for stage in model.layers] == [0.5, 1.0]
    with pytest.raises(ValueError, match=r'one number or 2, one for each stage, got \[0\.5\]'):
        pvt(router=dict(query_ratio=[0.5]))
