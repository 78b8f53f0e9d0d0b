import copy
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import mmtoken
from mmtoken.analysis import count_macs
from mmtoken.backbones import MSViT, msvit
from mmtoken.layers.common.attention import varlen_attention
from mmtoken.layers.common.gate import RegionGate
from mmtoken.layers.msvit.mixed_scale import restore_features
from mmtoken.runtime.decisions import record_routing
from mmtoken.runtime.reference import reference_path
from mmtoken.runtime.routing_override import routing_override

DATA = Path(__file__).parent.parent / 'data'
VIT = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=48)
WINDOWS = dict(cls_token=False, window_size=4, global_blocks=(1, -1))
MODES = ['masked', 'gathered']
SIZES = [(128, 128), (100, 150), (20, 70), (1, 1)]


def make(**kwargs):
    return MSViT(**{'arch': VIT, 'img_size': 80, **kwargs})


def stir(model):
    """A gate that likes both scales, positions that can be told apart, parts that start as none."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith('gate.layers') and parameter.ndim == 2:
                nn.init.normal_(parameter)
            elif name.endswith(('gate.layers.9.bias', '.gamma')):
                nn.init.normal_(parameter, std=0.1)
            elif name in ('pos_embed', 'cls_token', 'reg_token'):
                nn.init.normal_(parameter)
    return model


def run(model, images, seed=3):
    """Maps, decisions, and what was published."""
    torch.manual_seed(seed)
    with mmtoken.token_losses() as published, record_routing() as record:
        maps = model(images)
    return maps, record, published


def choose(monkeypatch, choice):
    """Let models choose as told: 1 where a region is coarse, ``(B, Hr, Wr)``."""
    gates = F.one_hot(choice.long(), 2).double()
    monkeypatch.setattr(msvit, 'choose', lambda *args, **kwargs: gates)


def spy_on_tokens(model):
    """How many tokens enter each block, once it has run."""
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def with_same(model, **kwargs):
    """Another of the same weights, as far as it has them."""
    other = make(**kwargs).train(model.training)
    missing, _ = other.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    return other


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# Embedding


@pytest.fixture(scope='module')
def golden():
    return {n: torch.from_numpy(v) for n, v in np.load(DATA / 'msvit_tokens_golden.npz').items()}


def golden_model(golden, **kwargs):
    arch = dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8)
    model = make(arch=arch, img_size=128, cls_token=False, **kwargs).double().eval()
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(golden['Wp'])
        model.patch_embed.proj.bias.copy_(golden['bp'])
        model.pos_embed.copy_(golden['pos_fine'].flatten(2).mT)
        if model.patch_embed_coarse is not None:
            model.patch_embed_coarse.proj.weight.copy_(golden['Wc'])
            model.patch_embed_coarse.proj.bias.copy_(golden['bp'])
    return model


@pytest.mark.parametrize('shared', [True, False])
def test_golden_embedding(golden, shared, monkeypatch):
    """Of both scales, with positions."""
    model = golden_model(golden, share_patch_embed=shared)
    coarse = model.embed_coarse(golden['img']).permute(0, 3, 1, 2)
    close(coarse, golden['coarse_embed'], 1e-12)
    order = torch.cat([torch.arange(16, 80), torch.arange(16)])  # theirs are coarse first
    for choice in (golden['gate'], 1 - golden['gate']):
        choose(monkeypatch, choice)
        tokens, mixture = model.reduce(golden['img'])
        expected = golden['full_tokens'][:, order].flatten(0, 1)[mixture.index]
        close(tokens, expected, 1e-12)
    choose(monkeypatch, golden['gate'])
    assert model.reduce(golden['img'])[1].lengths == golden['lengths'].tolist()


def test_golden_kernel(golden):
    """Weights without a coarse projection give that of the fine one with each weight shared out."""
    model = golden_model(golden, share_patch_embed=False)
    state = {k: v for k, v in model.state_dict().items() if 'patch_embed_coarse' not in k}
    nn.init.zeros_(model.patch_embed_coarse.proj.weight)
    nn.init.zeros_(model.patch_embed_coarse.proj.bias)
    nn.Sequential(model).load_state_dict({f'0.{k}': v for k, v in state.items()})
    close(model.patch_embed_coarse.proj.weight, golden['Wc'], 1e-15)
    assert torch.equal(model.patch_embed_coarse.proj.bias, golden['bp'])


@pytest.mark.parametrize('sides', [(32, 16), (28, 14), (48, 16), (64, 16)])
@pytest.mark.parametrize('size', [(192, 192), (100, 131)])
def test_coarse_embedding_is_of_the_resized_image(sides, size):
    """By a half it is bilinear, and always the mean."""
    coarse_size, fine_size = sides
    model = make(coarse_size=coarse_size, fine_size=fine_size).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    padded = F.pad(x, (0, -size[1] % coarse_size, 0, -size[0] % coarse_size))
    mode = dict(mode='area')
    if coarse_size == 2 * fine_size:
        mode = dict(mode='bilinear', align_corners=False)
    small = F.interpolate(padded, scale_factor=fine_size / coarse_size, **mode)
    expected = model.patch_embed.proj(small).permute(0, 2, 3, 1)
    close(model.embed_coarse(x), expected, 1e-10)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('ratio', [2, 4])
def test_coarse_positions_are_means_of_fine_ones(size, ratio, monkeypatch):
    """Of those that there are, at the borders."""
    model = stir(make(coarse_size=16 * ratio)).eval()
    for parameter in model.patch_embed.parameters():
        nn.init.zeros_(parameter)
    height, width = (-(-side // 16) for side in size)
    position = model.positions((height, width))[1][0]
    means = [
        position[y : y + ratio, x : x + ratio].mean(dim=(0, 1))
        for y in range(0, height, ratio)
        for x in range(0, width, ratio)
    ]
    choose(monkeypatch, torch.ones(1, -(-height // ratio), -(-width // ratio)))
    tokens, mixture = model.reduce(torch.zeros(1, 3, *size))
    assert mixture.lengths == [1 + len(means)]
    close(tokens[1:], torch.stack(means))
    close(tokens[:1], model.cls_token[0] + model.pos_embed[0, :1])


# The twin


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(cls_token=False),
        {},
        dict(num_registers=4, layer_scale=1e-5),
        dict(cls_token=False, num_registers=2, qkv_bias=False),
    ],
)
@pytest.mark.parametrize('size', [(80, 80), (64, 144), (97, 50)])
def test_twin_is_timms(kwargs, size):
    cls_token, registers = kwargs.get('cls_token', True), kwargs.get('num_registers', 0)
    theirs = VisionTransformer(
        80, embed_dim=32, depth=4, num_heads=2, mlp_ratio=1.5, class_token=cls_token, num_classes=0,
        global_pool='', dynamic_img_size=True, dynamic_img_pad=True, reg_tokens=registers,
        no_embed_class=registers > 0, init_values=kwargs.get('layer_scale'),
        qkv_bias=kwargs.get('qkv_bias', True),
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = theirs.state_dict()
    if registers and cls_token:  # whose position timm has in the class token
        state['pos_embed'] = F.pad(state['pos_embed'], (0, 0, 1, 0))
    twin = make(**MSViT.twin_args, **kwargs, out_indices=(0, 2, 3)).eval()
    twin.load_state_dict(state, strict=True)
    image = torch.randn(2, 3, *size)
    outs = {}
    for out_type in ('avg_featmap', 'cls_token')[: 1 + cls_token]:
        model = with_same(twin, **MSViT.twin_args, **kwargs, out_type=out_type)
        with torch.no_grad():
            (outs[out_type],) = model(image)
    with torch.no_grad():
        maps = twin(image)
        expected = theirs.forward_intermediates(image, (0, 2), norm=False, intermediates_only=True)
        last = theirs.forward_features(image)
    for map_, other in zip(maps, expected, strict=False):
        close(map_, other, 1e-4)
    tokens = last[:, int(cls_token) + registers :]
    close(maps[2].flatten(2).mT, tokens, 1e-4)
    close(outs.pop('avg_featmap'), tokens.mean(1), 1e-4)
    for out in outs.values():
        close(out, last[:, 0], 1e-4)


@pytest.mark.parametrize('arch, dims, depth', [('tiny', 192, 12), ('large', 1024, 24)])
def test_parameters(arch, dims, depth):
    with torch.device('meta'):
        model = MSViT(arch)
        theirs = VisionTransformer(
            embed_dim=dims, depth=depth, num_heads=dims // 64, num_classes=0
        ).state_dict()
    ours = {name: value.shape for name, value in model.state_dict().items()}
    gate = {name: ours.pop(name) for name in list(ours) if name.startswith('gate')}
    assert ours == {name: value.shape for name, value in theirs.items()}
    assert sum(shape.numel() for name, shape in gate.items() if 'loss' not in name) == (
        dims * 64 + 2 * 64 * 64 + 3 * 3 * 64 + 65
    )
    assert gate['gate_loss.mean_logits'] == (7, 7)


@pytest.mark.parametrize(
    'kwargs', [{}, dict(num_registers=2, layer_scale=0.1), WINDOWS, dict(cls_token=False)]
)
@pytest.mark.parametrize('size', SIZES)
def test_fine_everywhere_is_the_twin(kwargs, size):
    model = stir(make(**kwargs, out_indices=(1, 3)))
    twin = with_same(model, **MSViT.twin_args, **kwargs, out_indices=(1, 3))
    assert twin.gate is None and twin.gate_loss is None
    images = torch.randn(2, 3, *size)
    expected = twin(images)
    for training in (True, False):
        for train_mode in MODES:
            model.train(training).train_mode = train_mode
            with routing_override(coarse_ratio=0):
                maps, record, published = run(model, images)
            assert training == bool(published) and not record[0].choice.any()
            for map_, other in zip(maps, expected, strict=True):
                close(map_, other)


# Both scales


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(num_registers=2, layer_scale=0.1, share_patch_embed=False),
        WINDOWS,
        dict(gate=dict(input='pixels', temperature=0.5), drop_path_rate=0.5),
        dict(coarse_size=64),
    ],
)
def test_training_modes(kwargs):
    """Same values, same choices, and same gradients of all but the gate's."""
    model = stir(make(**kwargs, out_indices=(1, 3))).double().train()
    images, results = torch.randn(3, 3, 100, 150, dtype=torch.float64), []
    for train_mode in MODES:
        model.train_mode = train_mode
        maps, record, published = run(model, images)
        torch.manual_seed(4)
        loss = sum((m * torch.randn_like(m)).sum() for m in maps)
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        grads = dict(zip(dict(model.named_parameters()), grads, strict=True))
        results.append((maps, record[0].choice, dict(published), grads))
    (maps, choice, published, grads), (maps_, choice_, published_, grads_) = results
    assert 0 < choice.double().mean() < 1 and torch.equal(choice, choice_)
    for ours, theirs in zip(maps, maps_, strict=True):
        close(ours, theirs, 1e-9)
    assert list(published) == ['loss_gate', 'coarse_ratio']
    for name, value in published.items():
        assert torch.equal(value, published_[name])
    for name, grad in grads.items():
        if name.startswith('gate_loss.'):
            assert grad is None
        elif name.startswith('gate.'):
            assert grad.any() and grads_[name].any(), name
            assert not torch.allclose(grad, grads_[name], rtol=1e-3), name
        else:
            torch.testing.assert_close(grads_[name], grad, atol=1e-7, rtol=1e-7, msg=name)
    # Nor do values depend on being in training.
    if 'drop_path_rate' not in kwargs:
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            choose(patch, choice)
            for ours, theirs in zip(model.eval()(images), maps, strict=True):
                close(ours, theirs, 1e-9)


@pytest.mark.parametrize('size', [(128, 128), (100, 150)])
@pytest.mark.parametrize('kwargs', [{}, dict(cls_token=False, num_registers=3), WINDOWS])
def test_tokens_are_few(kwargs, size):
    """Wherever nothing learns to choose; otherwise `masked` has them all."""
    model = stir(make(**kwargs))
    height, width = (-(-side // 32) for side in size)
    regions, fine = height * width, -(-size[0] // 16) * -(-size[1] // 16)
    images, seen = torch.randn(3, 3, *size), spy_on_tokens(model)
    for ratio in (0, 0.25, 1):
        for training, train_mode in ((False, 'masked'), (True, 'gathered'), (True, 'masked')):
            model.train(training).train_mode = train_mode
            seen.clear()
            with routing_override(coarse_ratio=ratio):
                _, record, _ = run(model, images)
            coarse = record[0].choice.flatten(1).sum(1)
            assert coarse.tolist() == [round(ratio * regions)] * 3
            if training and train_mode == 'masked':
                expected = 3 * (fine + regions)
            elif size == (128, 128):
                expected = sum(4 * regions - 3 * int(n) for n in coarse)
            else:  # regions at the borders have fewer than four
                per_region = torch.tensor(
                    [
                        min(2, fine_rows - 2 * y) * min(2, fine_columns - 2 * x)
                        for fine_rows, fine_columns in [(-(-size[0] // 16), -(-size[1] // 16))]
                        for y in range(height)
                        for x in range(width)
                    ]
                )
                choice = record[0].choice.flatten(1)
                expected = int(torch.where(choice == 1, 1, per_region).sum())
            assert seen == [expected + 3 * model.num_prefix_tokens] * 4


@pytest.mark.parametrize('freeze', ['stage', 'parameters', 'no_grad'])
def test_frozen_gates_drop_tokens_in_training(freeze):
    model = stir(make(frozen_stages=0 if freeze == 'stage' else -1)).train()
    if freeze == 'parameters':
        model.gate.requires_grad_(False)
    seen, images = spy_on_tokens(model), torch.randn(2, 3, 128, 128)
    with torch.set_grad_enabled(freeze != 'no_grad'):
        maps, record, published = run(model, images)
    coarse = int(record[0].choice.sum())
    assert 0 < coarse < 32 and set(seen) == {2 * (1 + 64) - 3 * coarse}
    assert bool(published) == (freeze == 'parameters')
    if freeze == 'stage':  # which decides as in inference
        with record_routing() as again:
            model.eval()(images)
        assert torch.equal(again[0].choice, record[0].choice)
    if freeze != 'no_grad':
        maps[0].sum().backward()
        assert all(p.grad is None for p in model.gate.parameters())
        assert model.blocks[0].attn.qkv.weight.grad.any()


@pytest.mark.parametrize('kwargs', [dict(num_registers=1), WINDOWS])
def test_images_of_a_batch_are_independent(kwargs):
    model, images = stir(make(**kwargs, out_type='tokens')).eval(), torch.randn(4, 3, 100, 150)
    with torch.no_grad():
        (together,) = model(images)
        alone = [model(image[None])[0] for image in images]
    assert len(set(together.lengths.tolist())) > 1
    assert together.lengths.tolist() == [int(a.lengths) for a in alone]
    close(together.tokens, torch.cat([a.tokens for a in alone]))
    close(restore_features(together)[0], torch.cat([restore_features(a)[0] for a in alone]))


@pytest.mark.parametrize('sides', [(28, 14), (48, 16), (64, 16), (16, 8)])
def test_other_sides(sides, monkeypatch):
    """Maps have the fine stride, and copies where regions are coarse."""
    coarse_size, fine_size = sides
    ratio = coarse_size // fine_size
    model = stir(make(coarse_size=coarse_size, fine_size=fine_size)).eval()
    height, width = (-(-side // fine_size) for side in (150, 110))
    choice = torch.rand(2, -(-height // ratio), -(-width // ratio)) < 0.5
    choice[:, 0, 0], choice[:, 0, 1] = True, False
    choose(monkeypatch, choice)
    with torch.no_grad():
        (map_,) = model(torch.randn(2, 3, 150, 110))
    assert map_.shape == (2, 32, height, width)
    for b, row, column in np.ndindex(*choice.shape):
        rows, columns = (slice(n * ratio, (n + 1) * ratio) for n in (row, column))
        region = map_[b, :, rows, columns].flatten(1)
        assert region.shape[1] == 1 or bool(choice[b, row, column]) == bool(
            (region == region[:, :1]).all()
        )


def test_options_of_dinov2():
    """Patches of 14 pixels, registers and layer scale, at the size it is trained at and others."""
    model = stir(
        make(coarse_size=28, fine_size=14, img_size=70, num_registers=4, layer_scale=1e-5)
    ).eval()
    assert model.pos_grid == (5, 5) and model.pos_embed.shape == (1, 26, 32)
    assert model.reg_token.shape == (1, 4, 32)
    for size in ((70, 70), (140, 98)):
        with torch.no_grad(), routing_override(coarse_ratio=0.5):
            (map_,) = model(torch.randn(2, 3, *size))
        assert map_.shape == (2, 32, size[0] // 14, size[1] // 14) and map_.isfinite().all()


# Windows


@pytest.mark.parametrize('size', [(128, 128), (100, 170), (64, 30)])
@pytest.mark.parametrize('global_blocks', [(), (0, 2), None])
def test_windows_of_the_twin(size, global_blocks):
    """Each block on each window by itself; at the borders windows are smaller."""
    kwargs = dict(WINDOWS, global_blocks=global_blocks)
    model = stir(make(**MSViT.twin_args, **kwargs)).eval()
    images = torch.randn(2, 3, *size)
    tokens, layout = model.embed(images)
    grid = layout.grid
    x = tokens.unflatten(1, grid)
    for i, block in enumerate(model.blocks):
        # Four blocks are quarters of one each, so by default all are global.
        if global_blocks is None or i in global_blocks:
            windows = [(slice(None), slice(None))]
        else:
            windows = [
                (slice(y, y + 4), slice(x, x + 4))
                for y in range(0, grid[0], 4)
                for x in range(0, grid[1], 4)
            ]
        out = torch.empty_like(x)
        for b in range(2):
            for rows, columns in windows:
                window = x[b, rows, columns]
                part = alone(block, window.flatten(0, 1))
                out[b, rows, columns] = part.view_as(window)
        x = out
    with torch.no_grad():
        (map_,) = model(images)
    close(map_, model.norm(x).permute(0, 3, 1, 2))


def alone(block, tokens):
    lengths = [len(tokens)]
    return block(tokens, partial(varlen_attention, lengths=lengths), lengths)


@pytest.mark.parametrize('training', [False, True])
def test_windows_of_mixed_tokens(training):
    model = stir(make(**WINDOWS, train_mode='gathered', out_type='tokens')).train(training)
    images = torch.randn(2, 3, 100, 170)
    torch.manual_seed(3)
    with mmtoken.token_losses():
        tokens, mixture = model.reduce(images)
    assert len(mixture.windows) == 2 * 2 * 3 and len(set(mixture.windows)) > 2
    for i, block in enumerate(model.blocks):
        parts = tokens.split(mixture.lengths if i in (1, 3) else mixture.windows)
        tokens = torch.cat([alone(block, part) for part in parts])
    (features,), _, _ = run(model, images)
    close(features.tokens, model.norm(tokens))


@pytest.mark.parametrize('train_mode', [None, *MODES])
def test_window_larger_than_the_image(train_mode):
    kwargs = dict(cls_token=False, train_mode=train_mode or 'masked')
    everywhere = stir(make(**kwargs)).train(train_mode is not None)
    images = torch.randn(2, 3, 100, 128)
    (expected,), _, _ = run(everywhere, images)
    for size, equal in ((8, True), (4, False)):
        windowed = with_same(everywhere, **kwargs, window_size=size, global_blocks=())
        (map_,), _, _ = run(windowed, images)
        assert torch.allclose(map_, expected, atol=1e-4) == equal


def test_global_blocks():
    arch = dict(VIT, num_layers=12)
    windows = dict(cls_token=False, window_size=4)
    assert make(arch=arch, **windows).global_blocks == {2, 5, 8, 11}
    assert make(arch=arch, **windows, global_blocks=[0, -1]).global_blocks == {0, 11}
    assert make(arch=arch, **windows, global_blocks=()).global_blocks == set()
    assert make(arch=arch).global_blocks == set(range(12))


# The gate and what it publishes


@pytest.mark.parametrize('given', ['embed', 'pixels', 'patches'])
def test_what_the_gate_reads(given):
    """Neither positions nor neighbours, and it does not shape what it reads."""
    model, read = stir(make(gate=dict(input=given))).train(), []
    model.gate.register_forward_hook(lambda module, args, out: read.append(args[0]))
    images = torch.randn(2, 3, 100, 150, requires_grad=given != 'pixels')
    _, _, published = run(model, images)
    (seen,) = read
    if given == 'embed':
        assert torch.equal(seen, model.embed_coarse(images)) and not seen.requires_grad
    elif given == 'patches':
        assert seen.shape == (2, 4, 5, 2 * 32) and not seen.requires_grad
        patches = model.patch_embed(images)[1, 4:6, 2:4].flatten(0, 1)
        close(seen[1, 2, 1], torch.cat([patches.mean(0), patches.std(0, unbiased=False)]), 1e-4)
    else:
        assert seen.shape == (2, 4, 5, 3 * 32 * 32)
        corner = images[1, :, 64:96, 32:64]
        assert torch.equal(seen[1, 2, 1], corner.flatten())
    published.total().backward()
    assert model.gate.layers[0].weight.grad.any()
    assert model.patch_embed.proj.weight.grad is None and images.grad is None


def test_published_values():
    """The loss is of probabilities without noise, though choices are sampled."""
    model, asked = stir(make(gate=dict(start_ratio=0.3))).train(), []
    assert model.gate.start_ratio == 0.3
    model.gate.register_forward_hook(lambda module, args, out: asked.append(out))
    model.gate_loss.register_forward_hook(lambda module, args, out: asked.append((args, out)))
    _, record, published = run(model, torch.randn(2, 3, 128, 160))
    scores, ((coarse, real), loss) = asked
    close(coarse, scores[..., 1].sigmoid())
    assert real.all() and real.shape == (2, 4, 5)
    assert list(published) == ['loss_gate', 'coarse_ratio']
    assert published['loss_gate'] == loss and published['loss_gate'].requires_grad
    assert published['coarse_ratio'].item() == pytest.approx(record[0].choice.double().mean())
    assert not torch.equal(record[0].choice, scores.argmax(-1))
    assert published.total() == loss


def test_gate_learns_from_both_losses():
    for train_mode in MODES:
        model = stir(make(train_mode=train_mode)).train()
        (map_,), _, published = run(model, torch.randn(4, 3, 128, 128))
        for loss in ((map_ * torch.randn_like(map_)).mean(), published.total()):
            model.zero_grad()
            loss.backward(retain_graph=True)
            for name, parameter in model.gate.named_parameters():
                assert parameter.grad.any(), name


def test_temperature_is_of_gradients_alone():
    model, images, results = stir(make()).train(), torch.randn(2, 3, 128, 128), []
    for temperature in (1.0, 3.0):
        model.temperature = make(gate=dict(temperature=temperature)).temperature
        (map_,), record, published = run(model, images)
        torch.manual_seed(4)
        loss = (map_ * torch.randn_like(map_)).sum()
        (grad,) = torch.autograd.grad(loss, model.gate.layers[-1].weight)
        results.append((map_, record[0].choice, published.total(), grad))
    (*values, grad), (*others, flat) = results
    assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True))
    assert not torch.allclose(grad, flat, rtol=1e-2)


def test_other_losses():
    loss = dict(type='mmtoken.CoarseRatioLoss', target_coarse_ratio=0.25, loss_weight=2.0)
    model = stir(make(gate=dict(loss=loss))).train()
    _, _, published = run(model, torch.randn(2, 3, 128, 128))
    assert list(published) == ['loss_gate', 'coarse_ratio']
    assert published['loss_gate'] > 0 and not list(model.gate_loss.parameters())


@pytest.mark.parametrize('train_mode', MODES)
def test_nothing_published_without_a_loss(train_mode):
    model = stir(make(gate=dict(loss=None), train_mode=train_mode)).train()
    assert model.gate_loss is None
    (map_,), record, published = run(model, torch.randn(2, 3, 64, 96))
    assert not published and len(record) == 1
    (map_ * torch.randn_like(map_)).sum().backward()
    assert model.gate.layers[0].weight.grad.any()
    with torch.no_grad():
        assert not run(make().train(), torch.randn(1, 3, 64, 64))[2]
    assert not run(make().eval(), torch.randn(1, 3, 64, 64))[2]


@pytest.mark.parametrize('training', [True, False])
def test_one_decision(training):
    model = stir(make(coarse_size=64)).train(training)
    _, record, _ = run(model, torch.randn(2, 3, 100, 150))
    (decision,) = record
    assert decision.choice.shape == decision.padding.shape == (2, 2, 3)
    assert (
        decision.granularities == (1, 4) and decision.region_size == 4 and decision.grid == (7, 10)
    )
    assert not decision.padding.any()
    assert not run(make(**MSViT.twin_args), torch.randn(1, 3, 64, 64))[1]


def test_new_gates_leave_nearly_all_fine():
    model, images = make(), torch.randn(8, 3, 320, 320)
    with torch.no_grad():
        _, trained, _ = run(model.train(), images)
        _, tested, _ = run(model.eval(), images)
    assert 0.05 < trained[0].choice.double().mean() < 0.15
    assert not tested[0].choice.any()


def test_padding_is_not_counted():
    """An image of 3 x 2 regions, alone and with padding around."""
    model = stir(
        make(gate=dict(loss=dict(type='mmtoken.CoarseRatioLoss', target_coarse_ratio=0.9)))
    )
    nn.init.constant_(model.gate.layers[-1].bias, -1e4)  # nothing is coarse that need not be
    asked = []
    model.gate_loss.register_forward_hook(lambda module, args, out: asked.append(args[1]))
    image, results = torch.zeros(2, 3, 192, 256), []
    image[:, :, :90, :64] = torch.randn(2, 3, 90, 64)
    for height, width in ((96, 64), (96, 160), (192, 256)):
        for training in (True, False):
            part = image[:, :, :height, :width]
            _, record, published = run(model.train(training), part)
            (decision,) = record
            choice, padding = decision.choice, decision.padding
            assert torch.equal(choice == 1, padding)
            assert not padding[:, :3, :2].any()
            assert padding.sum((1, 2)).tolist() == [height * width // 32**2 - 6] * 2
            if training:
                results.append({name: value.item() for name, value in published.items()})
                assert torch.equal(asked.pop(), ~padding)
    assert results[0] == results[1] == results[2]
    assert results[0]['coarse_ratio'] == 0


def test_padding_teaches_gates_nothing():
    model = stir(make(gate=dict(loss=None))).train()
    image = torch.zeros(1, 3, 128, 128)
    image[:, :, :32, :32] = torch.randn(1, 3, 32, 32)
    scores = []
    model.gate.register_forward_hook(lambda module, args, out: scores.append(out))
    (map_,), record, _ = run(model, image)
    (grad,) = torch.autograd.grad((map_ * torch.randn_like(map_)).sum(), scores[0])
    assert torch.equal(grad.any(dim=-1), ~record[0].padding) and record[0].padding.sum() == 15


@pytest.mark.parametrize('train_mode', MODES)
def test_recomputation_keeps_choices_and_loss(train_mode, published_names):
    plain = stir(make(train_mode=train_mode, drop_path_rate=0.4)).train()
    images, results = torch.randn(3, 3, 100, 128), []
    for with_cp in (False, True):
        model = with_same(plain, train_mode=train_mode, drop_path_rate=0.4, with_cp=with_cp)
        torch.manual_seed(3)
        with mmtoken.token_losses() as published, record_routing() as record:
            (map_,) = model(images)
            (map_.square().sum() + published.total()).backward()
        assert len(record) == 1 and published_names == ['loss_gate', 'coarse_ratio']
        published_names.clear()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((map_, record[0].choice, published.total(), grads))
    (map_, choice, loss, grads), (again, rechosen, reloss, regrads) = results
    assert torch.equal(map_, again) and torch.equal(choice, rechosen) and torch.equal(loss, reloss)
    for name, grad in grads.items():
        torch.testing.assert_close(regrads[name], grad, msg=name)


def test_wrong_kind_of_ratio():
    with (
        routing_override(query_ratio=0.5),
        pytest.raises(ValueError, match=r'query_ratio=.* but this network has a coarse_ratio'),
    ):
        make().eval()(torch.randn(1, 3, 64, 64))


def test_ratios_of_images():
    model = make(out_type='tokens').eval()
    with torch.no_grad(), routing_override(coarse_ratio=(0, 0.25, 1)):
        (features,) = model(torch.randn(4, 3, 128, 128))
    assert features.lengths.tolist() == [1 + 64, 1 + 64 - 12, 1 + 16, 1 + 64]


# Outputs


@pytest.mark.parametrize('kwargs', [dict(num_registers=2), WINDOWS, MSViT.twin_args])
@pytest.mark.parametrize('train_mode', [None, *MODES])
def test_tokens_are_the_map(kwargs, train_mode):
    common = dict(kwargs, train_mode=train_mode or 'masked', out_indices=(1, 3))
    maps = stir(make(**common)).train(train_mode is not None)
    tokens = with_same(maps, **common, out_type='tokens')
    images = torch.randn(2, 3, 100, 150)
    expected, record, _ = run(maps, images)
    features, _, _ = run(tokens, images)
    assert len(features) == 2
    for feature, map_ in zip(features, expected, strict=True):
        assert feature.grid == (7, 10) and int(feature.lengths.sum()) == len(feature.tokens)
        restored, coarse = restore_features(feature)
        assert torch.equal(restored, map_) and coarse.shape == (2, 1, 7, 10)
        if record:
            choice = record[0].choice.repeat_interleave(2, 1).repeat_interleave(2, 2)
            assert torch.equal(coarse[:, 0], choice[:, :7, :10].float())
        else:
            assert not coarse.any()


@pytest.mark.parametrize('train_mode', [None, *MODES])
def test_vectors(train_mode):
    common = dict(train_mode=train_mode or 'masked', num_registers=1)
    maps = stir(make(**common)).train(train_mode is not None)
    images = torch.randn(2, 3, 100, 150)
    (map_,), _, _ = run(maps, images)
    mean = with_same(maps, **common, out_type='avg_featmap')
    (vector,), _, _ = run(mean, images)
    close(vector, map_.mean((2, 3)))
    first = with_same(maps, **common, out_type='cls_token')
    (vector,), _, _ = run(first, images)
    packed = with_same(maps, **{**common, 'train_mode': 'gathered'}, out_type='tokens')
    (features,), _, _ = run(packed, images)
    starts = features.lengths.cumsum(0) - features.lengths
    close(vector, features.tokens[starts])
    assert vector.shape == (2, 32) and first.out_channels == (32,)


def test_norm_only_where_it_is_used():
    assert not list(make(out_indices=(0, 2)).norm.parameters())
    model = stir(make(out_indices=(1, 3))).train()
    maps, _, published = run(model, torch.randn(2, 3, 80, 80))
    (sum(m.square().sum() for m in maps) + published.total()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('ratio', [0, 1])
def test_every_parameter_has_a_gradient_with_one_scale_alone(ratio):
    """As distributed training asks for."""
    for train_mode in MODES:
        model = make(train_mode=train_mode, share_patch_embed=False).train()
        with routing_override(coarse_ratio=ratio):
            (map_,), _, published = run(model, torch.randn(2, 3, 80, 80))
        (map_.square().sum() + published.total()).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_drop_path_rises_to_its_rate():
    rates = [block.drop_path.drop_prob for block in make(drop_path_rate=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize('train_mode', MODES)
def test_mixed_precision(train_mode):
    """With a constant scale, as half precision needs it."""
    scale, results = 2.0**10, []
    model = stir(make(train_mode=train_mode)).train()
    nn.init.normal_(model.pos_embed, std=0.1)
    images = torch.randn(2, 3, 100, 128)
    for enabled in (False, True):
        model.zero_grad()
        with (
            routing_override(coarse_ratio=0.5),
            torch.autocast('cpu', torch.bfloat16, enabled=enabled),
        ):
            (map_,), record, published = run(model, images)
            loss = map_.float().square().mean() + published.total()
        assert published['loss_gate'].dtype == torch.float32
        (loss * scale).backward()
        grads = {name: p.grad / scale for name, p in model.named_parameters()}
        results.append((map_.float(), record[0].choice, grads))
    (map_, choice, grads), (half, chosen, halves) = results
    assert torch.equal(choice, chosen)
    assert (half - map_).norm() < 0.02 * map_.norm()
    for name, grad in grads.items():
        assert halves[name].isfinite().all()
        if name.startswith('blocks') and not name.endswith('qkv.bias'):
            assert (halves[name] - grad).norm() < 0.1 * grad.norm(), name


# Initialisation


@pytest.fixture
def quiet():
    """Initialising logs every parameter."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    yield
    logger.setLevel(level)


def shared_kernel(model):
    weight = model.patch_embed.proj.weight
    return weight.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4


@pytest.mark.parametrize('source', [None, 'config', 'own', 'twin', 'timm'])
def test_initialization(source, tmp_path, quiet):
    """A separate projection starts as the shared one, and gates at the fine scale."""
    init_cfg = dict(type='TruncNormal', layer='Linear', std=0.5) if source == 'config' else None
    if source in ('own', 'twin', 'timm'):
        if source == 'timm':
            theirs = VisionTransformer(80, embed_dim=32, depth=4, num_heads=2, mlp_ratio=1.5)
        else:
            theirs = make(share_patch_embed=source == 'twin', gate=None if source == 'twin' else {})
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        torch.save(theirs.state_dict(), tmp_path / 'weights.pth')
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    model = make(share_patch_embed=False, init_cfg=init_cfg)
    coarse = model.patch_embed_coarse.proj
    model.init_weights()
    if source == 'own':
        for name, value in model.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
        return
    close(coarse.weight, shared_kernel(model))
    assert torch.equal(coarse.bias, model.patch_embed.proj.bias)
    assert model.gate.layers[-1].bias.item() == pytest.approx(-2.1972, abs=1e-4)
    assert 0 < model.gate.layers[-1].weight.std() < 0.02
    if source in ('twin', 'timm'):
        for name in ('patch_embed.proj.weight', 'blocks.2.attn.qkv.bias', 'cls_token'):
            assert torch.equal(model.state_dict()[name], theirs.state_dict()[name])
    # So it does the same as the model that shares.
    shared = with_same(model.eval()).double()
    model.double()  # rounding grows with such weights, and differs between processors
    images = torch.randn(2, 3, 100, 150, dtype=torch.float64)
    with torch.no_grad():
        for ratio in (0.5, 1):
            outs = []
            for m in (model, shared):
                with routing_override(coarse_ratio=ratio):
                    outs.append(m(images)[0])
            close(*outs, 1e-4)


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(arch={**VIT, 'num_heads': 5}), 'embed_dims=32 is no multiple of num_heads=5'),
        (dict(coarse_size=16), 'coarse_size must be a multiple of fine_size=16, from 32 on, got 1'),
        (dict(coarse_size=40), 'got 40'),
        (dict(coarse_size=8), 'got 8'),
        (dict(coarse_size=32, fine_size=14), 'fine_size=14, from 28 on, got 32'),
        (dict(train_mode='exact'), "train_mode must be one of .*'gathered'.*got 'exact'"),
        (dict(out_type='vector'), "got 'vector'"),
        (dict(out_type='cls_token', cls_token=False), 'needs cls_token=True'),
        (dict(out_type='avg_featmap', out_indices=(1, 3)), r'out_indices=\(3,\); got \(1, 3\)'),
        (dict(gate=dict(input='map')), r"gate\['input'\] must be one of .*, got 'map'"),
        (dict(gate=dict(temperature=0)), r"gate\['temperature'\] must be above 0, got 0"),
        (dict(gate=dict(temperature=float('nan'))), 'got nan'),
        (dict(gate=dict(hidden=3, layers=2)), r"kernel_size'\), got \['hidden', 'layers'\]"),
        (dict(gate=dict(start_ratio=1)), 'start_ratio must be between 0 and 1, got 1'),
        (dict(gate=dict(num_layers=0)), 'num_layers must be 1 or more, got 0'),
        (dict(global_blocks=(1,)), 'global_blocks needs window_size'),
        (dict(cls_token=False, window_size=3), r'coarse_size / fine_size = 2, got 3'),
        (dict(cls_token=False, window_size=0), 'got 0'),
        (dict(cls_token=False, window_size=4, coarse_size=48), '= 3, got 4'),
        (dict(window_size=4), 'neither a class token nor registers'),
        (dict(cls_token=False, num_registers=1, window_size=4), 'set cls_token=False and num_regi'),
        (dict(WINDOWS, global_blocks=(4,)), r'from -4 to 3, got \[4\]'),
        (dict(WINDOWS, global_blocks=(0, -5)), r'got \[-1, 0\]'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        make(**bad)


def test_arguments_of_a_config_are_left_alone():
    loss = dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.3)
    gate = dict(hidden_channels=8, loss=loss, temperature=2.0)
    before = copy.deepcopy((gate, msvit.GATE))
    model = make(gate=gate)
    assert isinstance(model.gate, RegionGate) and model.gate.layers[0].out_features == 8
    assert model.temperature == 2 and model.gate_loss.target_coarse_ratio == 0.3
    assert make(gate={}).gate_loss.target_coarse_ratio == 0.5
    assert (gate, msvit.GATE) == before


# Costs


class WithoutProducts(TorchDispatchMode):
    """Products of matrices and attention give zeros, at once."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not re.search('mm$|attention', func._schema.name):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to('meta'), (args, kwargs))
        shapes = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda t: torch.zeros_like(t, device='cpu'), shapes)


ARCHS = dict(Ti='tiny', S='small', B='base')
TABLE = json.loads((DATA / 'msvit_cost_table.json').read_text())


@pytest.mark.parametrize('row', ['Ti@224', 'S@224', 'B@224', 'S@384', 'S@512', 'B@512'])
def test_costs(row):
    """Of a whole image, against the formula of a ViT.

    Beyond it there are the gate and the coarse embedding of regions that end up fine.
    """
    arch, size = row.split('@')
    size, regions = int(size), (int(size) // 32) ** 2
    model = MSViT(ARCHS[arch], out_type='cls_token').eval()
    dims, counts, seen = model.out_channels[0], [], spy_on_tokens(model)
    for ratio, (tokens, billions) in TABLE[row].items():
        ratio, expected = float(ratio), billions * 1e9
        coarse = round(ratio * regions)
        seen.clear()
        with routing_override(coarse_ratio=ratio), reference_path(), WithoutProducts():
            macs = count_macs(model, torch.zeros(1, 3, size, size))
        counts.append(4 * regions - 3 * coarse)
        assert set(seen) == {1 + counts[-1]}
        # The table rounds tokens, and not regions, which are three tokens apart.
        more = counts[-1] - tokens
        assert abs(more) <= 2 if ratio * regions % 1 else more == 0
        rounding, same_tokens = 5e6, macs * (tokens + 1) / (counts[-1] + 1)
        assert abs(same_tokens - expected) < 0.015 * expected + rounding, ratio
        gate = regions * (dims * 64 + 2 * 64 * 64 + 64)
        unused = (regions - coarse) * dims * 768
        if not more:
            assert macs - gate - unused == pytest.approx(expected, rel=1e-3, abs=rounding)
    assert counts == sorted(counts, reverse=True)


TAUGHT = dict(fine_ratio=0.25, kernel_size=3, label_loss=dict(type='mmtoken.LabelPurityLoss'))


@pytest.mark.parametrize('train_mode', MODES)
@pytest.mark.parametrize('ratio', [0, 0.25, 0.6, 1])
def test_so_many_regions_are_fine(ratio, train_mode):
    model = stir(make(gate=dict(fine_ratio=ratio), train_mode=train_mode))
    assert model.gate_loss is None  # nothing has to hold a budget
    images = torch.randn(3, 3, 160, 192)
    images[1, :, 100:], images[2, :, :, 60:] = 0, 0  # 4 x 6 and 5 x 2 regions without padding
    _, (trained,), _ = run(model.train(), images)
    with torch.no_grad():
        _, (tested,), _ = run(model.eval(), images, seed=4)
    assert torch.equal(trained.choice, tested.choice)  # nothing is drawn
    fine = (tested.choice == 0).flatten(1).sum(dim=1)
    assert fine.tolist() == [round(ratio * n) for n in (30, 24, 10)]
    assert not ((tested.choice == 0) & tested.padding).any()


def test_labels_teach_the_gate():
    """Fine where a label changes, which here is where colors do."""
    torch.manual_seed(0)
    images, labels = torch.zeros(4, 3, 128, 128), torch.zeros(4, 128, 128, dtype=torch.long)
    for image, label in zip(images, labels, strict=True):
        top, left = torch.randint(4, 60, (2,)).tolist()
        image[:, top : top + 50, left : left + 50] = 1
        label[top : top + 50, left : left + 50] = 1
    images += 0.5  # no padding
    model = make(gate=dict(TAUGHT, input='pixels'), train_mode='gathered').train()
    optimizer = torch.optim.Adam(model.gate.parameters(), lr=0.01)
    mmtoken.set_label_maps(images, labels)
    for _ in range(60):
        _, (decision,), published = run(model, images)
        optimizer.zero_grad()
        published.total().backward()
        optimizer.step()
    assert published['loss_region_labels'] < 0.1
    mixed = model.label_loss.targets(labels, (16, 32), 32, (4, 4))[0] == 0
    # As many as may be fine are, and all of them are mixed.
    fine = decision.choice == 0
    assert mixed.sum() > fine.sum() == 4 * 4 and not (fine & ~mixed).any()


def test_labels_are_needed_in_training_alone():
    model, images = make(gate=TAUGHT).train(), torch.randn(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match='mmtoken.set_label_maps'):
        run(model, images)
    run(model.eval(), images)
    with torch.no_grad():
        run(model.train(), images)


def test_neighbors_in_the_padding_are_not_seen():
    model = stir(make(gate=dict(TAUGHT, label_loss=None))).eval()
    image = torch.randn(1, 3, 96, 128)
    padded = torch.zeros(1, 3, 160, 192)
    padded[..., :96, :128] = image
    with torch.no_grad():
        choices = [run(model, images)[1][0].choice for images in (image, padded)]
    assert torch.equal(choices[0], choices[1][:, :3, :4])
