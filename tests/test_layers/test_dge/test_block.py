from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmtoken.layers.common import routing
from mmtoken.layers.common.attention import attention_reference, join_heads, split_heads
from mmtoken.layers.common.regions import (
    all_cells,
    gate_per_cell,
    make_region_layout,
    pool_cells,
    unpool_cells,
)
from mmtoken.layers.dge.block import DynamicGranularityBlock, GranularityRouter
from mmtoken.layers.dge.deformable import DeformableAttention
from mmtoken.layers.dge.spatial_reduction import SpatialReductionAttention
from mmtoken.layers.dge.stage import run_blocks
from mmtoken.losses.budget import BlockWidths, block_complexity, count_tokens
from mmtoken.runtime.decisions import record_routing
from mmtoken.runtime.reference import reference_path
from mmtoken.runtime.routing_override import routing_override

DATA = Path(__file__).parents[2] / 'data'
MODES = ['exact', 'dense', 'sparse']
RELEASED = ['dge_block_pvt_sr2', 'dge_block_pvt_sr1_cls']


def run(block, x, grid, padding=None, with_cp=False):
    """Route and run a block: ``(B, N, C)``, and what it chose."""
    layout = block.layout(grid, x.shape[1] - grid[0] * grid[1], x.device)
    return run_blocks([block], x, layout, padding, with_cp)


def count(decisions):
    """Tokens and queries of each image."""
    (gates,) = decisions.gates
    return count_tokens(gates, decisions.layout, decisions.padding)


def costs(block, decisions):
    """Complexity of each image: of the full block, and as routed."""
    tokens, queries = count(decisions)
    widths = BlockWidths.of(block)
    return block_complexity(widths, tokens, tokens), block_complexity(widths, tokens, queries)


class Golden:
    """Tensors by name, and the block they belong to."""

    def __init__(self, name):
        self.arrays = dict(np.load(DATA / f'{name}.npz'))
        self.grid = int(self['H']), int(self['W'])
        self.num_prefix_tokens = self['x'].shape[1] - self.grid[0] * self.grid[1]

    def __getitem__(self, name):
        return torch.from_numpy(self.arrays[name])

    def block(self, **kwargs):
        state = {
            name[3:].replace('dge.router', 'router'): self[name]
            for name in self.arrays
            if name.startswith('sd.') and not name.endswith('splits')
        }
        hidden, dims = state['mlp.fc1.weight'].shape
        attn = SpatialReductionAttention(dims, int(self['num_heads']), int(self['sr_ratio']))
        block = DynamicGranularityBlock(dims, attn, hidden, **kwargs)
        block.load_state_dict(state)
        return block


@pytest.fixture(scope='module', params=RELEASED)
def released(request):
    return Golden(request.param)


@pytest.mark.parametrize('name', [*RELEASED, 'dge_ext_nondivisible'])
@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad])
def test_released_inference(name, context):
    golden = Golden(name)
    block = golden.block().eval()
    tokens = golden['x'][:, golden.num_prefix_tokens :].unflatten(1, golden.grid)
    with context(), record_routing() as record:
        scores = block.router(tokens)
        out, decisions = run(block, golden['x'], golden.grid)
    tokens, queries = count(decisions)
    static, dynamic = costs(block, decisions)
    torch.testing.assert_close(scores, golden['gate_logits'], atol=2e-5, rtol=0)
    torch.testing.assert_close(out, golden['y_eval'], atol=2e-5, rtol=0)
    assert torch.equal(record[0].choice, golden['gate_index'])
    assert queries.tolist() == golden['q_lengths'].tolist()
    assert tokens.tolist() == [golden['x'].shape[1]] * len(out)
    if name in RELEASED:
        assert torch.equal(static.double(), golden['comp_static'].double())
        assert torch.equal(dynamic.double(), golden['comp_dynamic_eval'].double())


@pytest.mark.parametrize('train_mode', MODES)
@pytest.mark.parametrize('with_cp', [False, True])
def test_released_training(released, train_mode, with_cp, monkeypatch):
    block = released.block(train_mode=train_mode).train()
    monkeypatch.setattr(routing, 'gumbel_noise', lambda scores: released['gumbel_noise'])
    path = 'sparse' if train_mode == 'sparse' else 'dense'
    x = released['x'].requires_grad_()
    with record_routing() as record:
        out, decisions = run(block, x, released.grid, with_cp=with_cp)
    static, dynamic = costs(block, decisions)
    gates = F.one_hot(record[0].choice, 3).float()
    assert torch.equal(gates, released[f'{path}.gate_hard'].view_as(gates))
    torch.testing.assert_close(out, released[f'{path}.y_train'], atol=2e-5, rtol=0)
    assert torch.equal(dynamic.double(), released[f'{path}.comp_dynamic'].double())
    ratio = dynamic.mean() / static.mean()
    loss = (out * released['loss_weight']).sum() + (ratio - 0.5) ** 2
    assert ratio.item() == pytest.approx(released[f'{path}.ratio'].item(), abs=1e-6)
    assert loss.item() == pytest.approx(released[f'{path}.loss'].item(), abs=2e-5)
    loss.backward()
    grads = dict(
        x=x.grad,
        gate_weight=block.router.gate.weight.grad,
        gate_bias=block.router.gate.bias.grad,
        q_weight=block.attn.q.weight.grad,
        kv_weight=block.attn.kv.weight.grad,
        fc1_weight=block.mlp.fc1.weight.grad,
    )
    stored = {name for name in released.arrays if name.startswith(f'{path}.grad_')}
    assert stored == {f'{path}.grad_{name}' for name in grads}
    for name, grad in grads.items():
        expected = released[f'{path}.grad_{name}']
        torch.testing.assert_close(grad, expected, atol=2e-6, rtol=0, msg=name)


def make_block(granularities=(1, 2, 4), region_size=4, attn='reduced', extra=0, **kwargs):
    """Always the same: every parameter matters, and the router chooses all granularities."""
    attn = dict(
        reduced=lambda: SpatialReductionAttention(16, 2, 1 if extra else 2),
        deformable=lambda: DeformableAttention(16, 2, 3),
    )[attn]()
    block = DynamicGranularityBlock(16, attn, 24, granularities, region_size, **kwargs)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in block.named_parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if 'norm' in name and name.endswith('weight'):
                parameter.add_(1)
            if name == 'router.gate.bias':
                parameter.zero_()
    return block


def make_tokens(grid, batch=2, extra=0):
    """With a mean that changes over the map, as routers see it."""
    x = torch.randn(batch, *grid, 16)
    x = x + unpool_cells(torch.randn(batch, *[-(-n // 4) for n in grid], 16), 4, grid)
    return torch.cat([torch.randn(batch, extra, 16), x.flatten(1, 2)], dim=1)


def run_backward(block, x, grid, with_cp=False):
    """Output, what was chosen, and gradients of the input and of all parameters by name."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    with record_routing() as record:
        out, decisions = run(block, x, grid, with_cp=with_cp)
    generator = torch.Generator().manual_seed(7)
    static, dynamic = costs(block, decisions)
    loss = (out * torch.randn(out.shape, generator=generator)).sum() + (dynamic / static).sum()
    block.zero_grad()
    loss.backward()
    grads = {'x': x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    return out.detach(), [decision.choice for decision in record], grads


CASES = [
    {},
    dict(extra=1),
    dict(granularities=(1, 2)),
    dict(granularities=(1, 2, 3, 6), region_size=6),
    dict(attn='deformable'),
]


def same(ours, theirs, but=()):
    for name, expected in theirs.items():
        if name not in but:
            torch.testing.assert_close(ours[name], expected, atol=2e-4, rtol=1e-5, msg=name)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('drop_path', [0.0, 0.5])
def test_training_modes(case, drop_path):
    grid, extra = (9, 14), case.get('extra', 0)
    x = make_tokens(grid, 4, extra)
    results = {}
    for mode in MODES:
        block = make_block(**case, train_mode=mode, drop_path=drop_path).train()
        results[mode] = run_backward(block, x, grid)
        with torch.no_grad():
            torch.manual_seed(3)
            results[mode, 'without gradients'] = run(block, x, grid)
    out, choice, grads = results['dense']
    assert len(choice[0].unique()) == len(block.granularities)
    for mode in ('exact', 'sparse'):
        torch.testing.assert_close(results[mode][0], out, atol=1e-5, rtol=1e-5)
        assert torch.equal(results[mode][1][0], choice[0])
        without = results[mode, 'without gradients'][0]
        torch.testing.assert_close(without, out, atol=1e-5, rtol=1e-5)
    same(results['exact'][2], grads)
    routed = ('x', 'router.gate.weight', 'router.gate.bias')
    same(results['sparse'][2], grads, but=routed)
    for name in routed:
        assert not torch.allclose(results['sparse'][2][name], grads[name], rtol=1e-3), name
        assert results['sparse'][2][name].abs().sum() > 0


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('train_mode', MODES)
def test_recomputation(case, train_mode):
    grid, extra = (8, 11), case.get('extra', 0)
    x = make_tokens(grid, 3, extra)
    (out, choice, grads), (again, rechosen, regrads) = (
        run_backward(
            make_block(**case, train_mode=train_mode, drop_path=0.4).train(), x, grid, with_cp=cp
        )
        for cp in (False, True)
    )
    assert torch.equal(out, again)
    assert len(choice) == len(rechosen) == 1 and torch.equal(choice[0], rechosen[0])
    for name, grad in grads.items():
        torch.testing.assert_close(regrads[name], grad, atol=0, rtol=0, msg=name)


def test_stochastic_depth_drops_images():
    """Of attention and of the MLP, each for all queries alike, and scales what it keeps."""
    block = make_block(drop_path=0.5, train_mode='sparse').train()
    x = make_tokens((8, 8), 1).expand(64, -1, -1)
    with routing_override(query_ratio=1.0):
        out, _ = run(block, x, (8, 8))
        kinds = out.detach().unique(dim=0)
    assert len(kinds) == 4
    queries, cells = x[0], all_cells(make_region_layout((8, 8), (1,), 4), 1)
    keys = block.attn.keys(block.norm1(x[:1]), cells.layout)
    for attn in (0.0, 2.0):
        for mlp in (0.0, 2.0):
            keep = torch.tensor([[attn]]), torch.tensor([[mlp]])
            expected = queries + block.block_update(queries, cells, keys, keep)
            assert (kinds - expected).abs().amax(dim=(1, 2)).min() < 1e-5


def vanilla(block, queries, dense, grid):
    """A pre-norm block on queries ``(B, Q, C)``, written out: their change."""
    attn, kv = block.attn, block.norm1(dense)
    if attn.sr_ratio > 1:
        kv = kv.unflatten(1, grid).permute(0, 3, 1, 2)
        r = attn.sr_ratio
        kv = attn.sr(F.pad(kv, (0, -grid[1] % r, 0, -grid[0] % r))).flatten(2).mT
        kv = attn.norm(kv)
    key, value = attn.kv(kv).chunk(2, dim=-1)
    heads = (split_heads(t, attn.num_heads) for t in (attn.q(block.norm1(queries)), key, value))
    change = attn.proj(join_heads(attention_reference(*heads)))
    hidden = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(queries + change))))
    return change + hidden


@pytest.mark.parametrize('case', CASES[:-1])
@pytest.mark.parametrize('grid', [(8, 12), (7, 13), (1, 5)])
@pytest.mark.parametrize('path', ['inference', 'reference', 'training'])
def test_output_is_the_sum_over_granularities(case, grid, path):
    extra = case.get('extra', 0)
    block, x = make_block(**case).train(path == 'training'), make_tokens(grid, 2, extra)
    torch.manual_seed(5)
    context = dict(inference=torch.no_grad, reference=reference_path, training=torch.enable_grad)[
        path
    ]
    with context():
        out, decisions = run(block, x, grid)
    (gates,) = decisions.gates
    on_grid = x[:, extra:].unflatten(1, grid)
    expected = on_grid
    for k, side in enumerate(block.granularities):
        pooled = pool_cells(on_grid, side)
        change = vanilla(block, pooled.flatten(1, 2), x, grid).view_as(pooled)
        gate = unpool_cells(gates[..., k : k + 1], block.region_size, grid)
        expected = expected + gate * unpool_cells(change, side, grid)
    first = x[:, :extra] + vanilla(block, x[:, :extra], x, grid) if extra else x[:, :0]
    expected = torch.cat([first, expected.flatten(1, 2)], dim=1)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


def dense_block(block, extra=0, attn='reduced'):
    dense = make_block((1,), extra=extra, attn=attn)
    assert dense.router is None
    state = {k: v for k, v in block.state_dict().items() if 'router' not in k}
    dense.load_state_dict(state)
    return dense.train(block.training)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('grid', [(8, 12), (9, 7)])
def test_finest_everywhere_is_the_dense_block(case, training, grid):
    extra = case.get('extra', 0)
    block, x = make_block(**case).train(training), make_tokens(grid, 2, extra)
    dense = dense_block(block, extra, case.get('attn', 'reduced'))
    for context in (torch.enable_grad, torch.no_grad):
        with context(), routing_override(query_ratio=1.0):
            out, decisions = run(block, x, grid)
            expected, nothing = run(dense, x, grid)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert nothing.gates == []
        assert torch.equal(*(n.detach() for n in count(decisions)))
        assert torch.equal(*(cost.detach() for cost in costs(block, decisions)))


def test_prefix_tokens_are_always_queries():
    block, x = make_block(extra=2).eval(), make_tokens((8, 12), 2, 2)
    with torch.no_grad():
        out, decisions = run(block, x, (8, 12))
        expected, _ = run(dense_block(block, extra=2), x, (8, 12))
    tokens, queries = count(decisions)
    assert (queries < tokens).all()
    torch.testing.assert_close(out[:, :2], expected[:, :2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[:, 2:], expected[:, 2:], atol=1e-2)


def test_images_of_a_batch_are_independent():
    block, x = make_block().eval(), make_tokens((10, 9), 3)
    with torch.no_grad():
        out, decisions = run(block, x, (10, 9))
        alone = [run(block, image[None], (10, 9)) for image in x]
    _, queries = count(decisions)
    assert len(set(queries.tolist())) > 1
    torch.testing.assert_close(out, torch.cat([o for o, _ in alone]), atol=1e-5, rtol=1e-5)
    assert torch.equal(queries, torch.cat([count(d)[1] for _, d in alone]))


@pytest.mark.parametrize('choices', [2, 3, 4])
def test_new_routers_choose_the_finest(choices):
    router = GranularityRouter(64, choices, 4)
    scores = router(torch.randn(4, 40, 40, 64))
    assert scores.shape == (4, 10, 10, choices)
    assert (scores.argmax(-1) == 0).all()
    assert router.gate.bias.softmax(0)[0].item() == pytest.approx(0.95)
    assert 0.008 < router.gate.weight.std() < 0.012
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.bias.zero_()
    router.init_weights()
    assert router.gate.bias.softmax(0)[0].item() == pytest.approx(0.95)
    assert router.gate.weight.abs().sum() > 0


def test_new_blocks_train_with_some_regions_coarse():
    block = DynamicGranularityBlock(16, SpatialReductionAttention(16, 2, 8), 16).train()
    with torch.no_grad(), record_routing() as record:
        run(block, torch.randn(4, 64 * 64, 16), (64, 64))
        run(block.eval(), torch.randn(4, 64 * 64, 16), (64, 64))
    trained, tested = (decision.choice for decision in record)
    coarse = (trained > 0).double().mean()
    assert 0.03 < coarse < 0.07
    assert {1, 2} <= set(trained.flatten().tolist())
    assert (tested == 0).all()


def test_bias_of_three_choices_is_that_of_the_release():
    bias = GranularityRouter(8, 3, 4).gate.bias.tolist()
    assert bias == pytest.approx([1.8188, -1.8188, -1.8188], abs=1e-4)


@pytest.mark.parametrize('train_mode', MODES)
def test_mixed_precision(train_mode):
    """With a constant scale, as half precision needs it."""
    scale, grid = 2.0**10, (8, 12)
    x = make_tokens(grid)
    block = make_block(train_mode=train_mode).train()
    scores = []
    block.router.register_forward_hook(lambda module, args, out: scores.append(out))
    results = []
    for enabled in (False, True):
        block.zero_grad()
        torch.manual_seed(3)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out, decisions = run(block, x, grid)
            static, dynamic = costs(block, decisions)
            loss = out.float().square().mean() + (dynamic / static).mean() / 10
        (loss * scale).backward()
        grads = {name: p.grad / scale for name, p in block.named_parameters()}
        results.append((out.float(), decisions.gates[0], dynamic, grads))
    (out, gates, dynamic, grads), (half, chosen, used, halves) = results
    assert torch.equal(scores[0], scores[1]) and scores[1].dtype == torch.float32
    assert torch.equal(gates, chosen)
    assert dynamic.dtype == used.dtype == torch.float32
    assert torch.equal(dynamic, used)
    assert (half - out).norm() < 0.02 * out.norm()
    for name, grad in grads.items():
        if name != 'attn.kv.bias':
            assert (halves[name] - grad).norm() < 0.05 * grad.norm(), name


def test_router_reads_half_precision_maps_in_float32():
    router = GranularityRouter(16, 3, 4)
    x = make_tokens((8, 8)).unflatten(1, (8, 8))
    with torch.autocast('cpu', torch.bfloat16):
        scores = router(x.bfloat16())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, router(x), atol=5e-3, rtol=0)


@pytest.mark.parametrize('training', [True, False])
def test_padding_is_coarsest_and_does_not_count(training):
    """An image of 8 x 8 tokens, alone and with regions of padding around."""
    block, x = make_block(extra=1).train(training), make_tokens((8, 8), 1, 1)
    with torch.no_grad():
        block.router.gate.weight.zero_()
        block.router.gate.bias.copy_(torch.tensor([-100.0, 100.0, -100.0]))
    _, alone = run(block, x, (8, 8))
    padded = torch.zeros(1, 12, 16, 16)
    padded[:, :8, :8] = x[:, 1:].unflatten(1, (8, 8))
    padded = torch.cat([x[:, :1], padded.flatten(1, 2)], dim=1)
    padding = torch.ones(1, 3, 4, dtype=torch.bool)
    padding[:, :2, :2] = False
    out, decisions = run(block, padded, (12, 16), padding)
    assert torch.equal(decisions.gates[0].argmax(-1), torch.where(padding, 2, 1))
    tokens, queries = count(decisions)
    assert tokens.item() == 65 and queries.item() == 17
    assert [n.item() for n in count(alone)] == [65, 17]
    _, without = run(block, padded, (12, 16))
    assert [n.item() for n in count(without)] == [193, 49]
    on_grid = out[:, 1:].unflatten(1, (12, 16))
    torch.testing.assert_close(on_grid[:, 8:, 8:], on_grid[:, 8:9, 8:9].expand(-1, 4, 8, -1))
    if training:
        costs(block, decisions)[1].sum().backward()
        assert block.router.gate.bias.grad.isfinite().all()


def test_padding_teaches_routers_nothing():
    block, x = make_block().train(), make_tokens((8, 8))
    padding = torch.ones(2, 2, 2, dtype=torch.bool)
    out, decisions = run(block, x, (8, 8), padding)
    assert [n.tolist() for n in count(decisions)] == [[0, 0], [0, 0]]
    (out.square().sum() + costs(block, decisions)[1].sum()).backward()
    assert not block.router.gate.weight.grad.any()


def test_gates_of_cells():
    regions = make_region_layout((4, 5), (1, 2, 4), 4, num_prefix_tokens=1)
    gates = torch.tensor([[[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]]])
    on_cells = gate_per_cell(gates, regions).squeeze()
    finest = [0.1, 0.1, 0.1, 0.1, 0.4] * 4
    assert on_cells.tolist() == pytest.approx([1, *finest, *[0.2, 0.2, 0.5] * 2, 0.3, 0.6])


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(granularities=()), r'got \(\)'),
        (dict(granularities=(2, 4)), r'rise from 1.*got \(2, 4\)'),
        (dict(granularities=(1, 4, 2)), r'got \(1, 4, 2\)'),
        (dict(granularities=(1, 1, 2)), r'got \(1, 1, 2\)'),
        (dict(granularities=(1, 3)), r'divide region_size=4.*got \(1, 3\)'),
        (dict(granularities=(1, 2, 8)), r'region_size=4'),
        (dict(train_mode='fast'), "got 'fast'"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        DynamicGranularityBlock(8, SpatialReductionAttention(8, 2), 8, **bad)
