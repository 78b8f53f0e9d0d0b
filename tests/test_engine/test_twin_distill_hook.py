"""The hook in trainings through MMEngine's runner, and in two processes."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, PixelData
from mmengine.utils import import_modules_from_strings
from torch import nn

import mmtoken
from mmtoken.engine import TwinDistillHook
from mmtoken.layers.common.padding import noted_sizes
from mmtoken.losses.map_distance import map_distance

TWIN = dict(type='mmtoken.TwinDistillHook')
TOKEN_LOSSES = dict(type='mmtoken.TokenLossHook')
LOSS = 'loss_twin_distill'
VIT = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=16)
PLAIN = dict(arch=VIT, img_size=32, patch_size=8, out_indices=(1, 2))
DENSE = dict(type='mmtoken.MergeViT', merge_blocks=(), **PLAIN)
SPARSE = dict(DENSE, merge_blocks=(1,))  # draws no random numbers
MSVIT = dict(
    type='mmtoken.MSViT', arch=VIT, img_size=32, coarse_size=16, fine_size=8, out_indices=(1, 2)
)
PYRAMID = dict(in_channels=16, out_channels=8, num_outs=2, norm=None)
DENSE_NECK = dict(type='mmtoken.SimpleFeaturePyramid', **PYRAMID)
NECK = dict(type='mmtoken.MixedScaleNeck', refine=True, **PYRAMID)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
SIZES = ((32, 32), (32, 17), (9, 32), (24, 8))


class Model(BaseModel):
    """With ``task_weight=0`` it learns from the hook alone."""

    def __init__(self, backbone, neck=None, task_weight=1.0):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.neck = None if neck is None else MODELS.build(neck)
        self.task_weight = task_weight

    def init_weights(self):
        """Keeps the weights of ``make_model``."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.loss(inputs) if mode == 'loss' else self.extract(inputs)

    def extract(self, inputs):
        maps = self.backbone(inputs)
        return maps if self.neck is None else self.neck(maps)

    def loss(self, inputs):
        task = sum((m.mean(1) - 0.5).square().mean() for m in self.extract(inputs))
        return dict(loss_task=self.task_weight * task)


class Spy(Hook):
    """Keeps what the runner logs, and the teacher and the student after each iteration."""

    priority = 'VERY_LOW'

    def __init__(self, stop_at=None):
        self.stop_at, self.outputs, self.teachers, self.students = stop_at, [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.outputs.append({name: value.item() for name, value in outputs.items()})
        self.teachers.append(clone(teacher_of(runner)))
        self.students.append(clone(runner.model))
        if len(self.outputs) == self.stop_at:
            raise KeyboardInterrupt


@OPTIM_WRAPPERS.register_module()
class CPUAutocast(OptimWrapper):
    """As MMEngine's AmpOptimWrapper, which wants a GPU."""

    def optim_context(self, model):
        return torch.autocast('cpu', torch.bfloat16)


def clone(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def hook_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, TwinDistillHook))


def teacher_of(runner):
    return hook_of(runner)._teaching.teacher


def config(backbone=SPARSE, neck=None, **kwargs):
    return dict(backbone=backbone, **({} if neck is None else dict(neck=neck)), **kwargs)


def make_model(backbone=SPARSE, neck=None, **kwargs):
    torch.manual_seed(1)
    model = Model(backbone, neck, **kwargs)
    for parameter in model.parameters():  # norms and output layers too
        nn.init.normal_(parameter, std=0.3)
    return model


def collate(batch):
    inputs, samples = zip(*batch, strict=True)
    return dict(inputs=torch.stack(inputs), data_samples=list(samples))


def make_runner(
    work_dir, hooks=(TWIN,), cfg=None, iters=3, batch_size=2, sizes=None, optim=None, lr=0.1,
    task_weight=1.0, model=None, **kwargs,
):  # fmt: skip
    cfg = cfg or config()
    samples = [
        BaseDataElement() if sizes is None else BaseDataElement(metainfo=dict(
            img_shape=size, padding_size=(0, 32 - size[1], 0, 32 - size[0])
        ))
        for size in sizes or SIZES
    ]  # fmt: skip
    return Runner(
        model=model or make_model(cfg['backbone'], cfg.get('neck'), task_weight=task_weight),
        cfg=Config(dict(model=cfg)),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=list(zip(IMAGES, samples, strict=True)),
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=collate,
            batch_size=batch_size,
            num_workers=0,
        ),
        train_cfg=dict(by_epoch=False, max_iters=iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=lr), **(optim or {})),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        custom_hooks=[copy.deepcopy(hook) if isinstance(hook, dict) else hook for hook in hooks],
        experiment_name=f'{work_dir.name}_{id(work_dir)}',
        log_level='WARNING',
        randomness=dict(seed=0),
        **kwargs,
    )


def run(work_dir, hooks=(TWIN,), **kwargs):
    """A training: its runner, and what a Spy saw."""
    spy = Spy()
    runner = make_runner(work_dir, [*hooks, spy], **kwargs)
    runner.train()
    return runner, spy


def save_dense(path, **kwargs):
    """A checkpoint of a dense model with other weights than the student starts with."""
    model = make_model(DENSE, **kwargs)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return model


def reference(student, twin, sizes=None, distance='mse'):
    """The loss, from two networks that are called one after the other."""
    expected = []
    with torch.no_grad():
        for own, wanted in zip(student(IMAGES[:2]), twin(IMAGES[:2]), strict=True):
            stride = 32 / own.shape[-1]
            places = None
            if sizes is not None:
                places = torch.tensor([[-(-s // stride) for s in pair] for pair in sizes[:2]])
            expected.append(map_distance(own, wanted, places, distance).item())
    return sum(expected) / len(expected)


def twin_of(model):
    """The dense network with the weights of a model with the backbone ``SPARSE``."""
    twin = MODELS.build(DENSE)
    twin.load_state_dict(model.backbone.state_dict())
    return twin.eval()


@pytest.mark.parametrize('sizes', [None, SIZES])
@pytest.mark.parametrize('distance', ['mse', 'cosine'])
def test_value(distance, sizes, tmp_path):
    hook = dict(TWIN, distance=distance, loss_weight=3.0)
    _, spy = run(tmp_path, [hook], iters=1, sizes=sizes)
    student = make_model()
    expected = 3 * reference(student.backbone, twin_of(student), sizes, distance)
    [outputs] = spy.outputs
    assert expected > 1e-3 and outputs[LOSS] == pytest.approx(expected, rel=1e-4)
    assert outputs['loss'] == pytest.approx(outputs['loss_task'] + outputs[LOSS])


def test_a_dense_student_starts_equal_to_its_teacher(tmp_path):
    _, spy = run(tmp_path, cfg=config(DENSE))
    assert abs(spy.outputs[0][LOSS]) < 1e-8
    assert spy.outputs[1][LOSS] > 1e-5  # the task has moved the student


def test_the_student_learns(tmp_path):
    save_dense(tmp_path / 'dense.pth')
    hook = dict(TWIN, checkpoint=str(tmp_path / 'dense.pth'))
    _, spy = run(tmp_path, [hook], iters=20, task_weight=0.0, batch_size=4, lr=3.0)
    losses = [outputs[LOSS] for outputs in spy.outputs]
    assert losses[-1] < 0.7 * losses[0]


def test_the_teacher_stays(tmp_path):
    _, spy = run(tmp_path)
    start = make_model().state_dict()
    assert not torch.equal(spy.students[-1]['backbone.pos_embed'], start['backbone.pos_embed'])
    for teacher in spy.teachers:
        assert start.keys() == teacher.keys()
        assert all(torch.equal(teacher[name], start[name]) for name in start)


def test_ema_moves_the_teacher(tmp_path):
    _, spy = run(tmp_path, [dict(TWIN, ema=0.25)])
    expected = make_model().state_dict()
    for student, teacher in zip(spy.students, spy.teachers, strict=True):
        expected = {name: 0.75 * expected[name] + 0.25 * student[name] for name in teacher}
        for name in teacher:
            torch.testing.assert_close(teacher[name], expected[name])
    assert any(not torch.equal(teacher[n], make_model().state_dict()[n]) for n in teacher)


FPN = dict(type='mmdet.FPN', in_channels=[16, 16], out_channels=8, num_outs=2)
BATCH_NORM = dict(FPN, norm_cfg=dict(type='BN'))


def test_ema_takes_the_statistics_of_batch_norms(tmp_path):
    _, spy = run(tmp_path, [dict(TWIN, ema=0.25, source='neck')], cfg=config(SPARSE, BATCH_NORM))
    statistics = [name for name in spy.teachers[-1] if 'running' in name]
    assert statistics
    for name in statistics:
        assert torch.equal(spy.teachers[-1][name], spy.students[-1][name])
        assert not torch.equal(spy.teachers[0][name], spy.students[-1][name])


def test_nothing_of_it_is_in_the_model(tmp_path):
    class Watch(Hook):
        def before_train_iter(self, runner, *args, **kwargs):
            self.teacher = teacher_of(runner)
            self.names = set(runner.model.state_dict())
            inside = {id(parameter) for parameter in runner.model.parameters()}
            groups = runner.optim_wrapper.param_groups
            self.optimized = {id(p) for group in groups for p in group['params']}
            assert not any(id(p) in inside | self.optimized for p in self.teacher.parameters())

    watch = Watch()
    runner = make_runner(tmp_path, [TWIN, watch])
    runner.train()
    assert watch.names == set(make_model().state_dict())
    assert not any(m.training for m in watch.teacher.modules())
    assert not any(p.requires_grad for p in watch.teacher.parameters())
    saved = torch.load(tmp_path / 'iter_3.pth', weights_only=False)
    assert set(saved['state_dict']) == watch.names

    assert 'loss' not in vars(runner.model) and hook_of(runner)._teaching is None
    for module in runner.model.backbone.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_student_trains_as_without_it_but_for_the_loss(tmp_path):
    """The hook draws no random numbers, and a weight of 0 changes nothing."""
    cfg = config(dict(MSVIT, drop_path_rate=0.3, gate=dict(loss=None)))
    _, with_it = run(tmp_path / 'with', [dict(TWIN, loss_weight=0.0)], cfg=cfg)
    spy = Spy()
    spy.after_train_iter = lambda runner, *args, outputs, **kwargs: spy.outputs.append(
        outputs['loss_task'].item()
    )
    make_runner(tmp_path / 'without', [spy], cfg=cfg).train()
    assert [outputs['loss_task'] for outputs in with_it.outputs] == spy.outputs


@pytest.mark.parametrize('hook', [TWIN, dict(TWIN, ema=0.25), dict(TWIN, checkpoint='dense.pth')])
def test_resume_goes_on_as_if_never_stopped(hook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_dense('dense.pth')
    _, whole = run(tmp_path / 'whole', [hook], iters=4)
    _, first = run(tmp_path / 'parts', [hook], iters=2)
    saved = torch.load(tmp_path / 'parts' / 'iter_2.pth', weights_only=False)
    assert ('twin_teacher' in saved) == ('checkpoint' not in hook)
    last = str(tmp_path / 'parts' / 'iter_2.pth')
    _, second = run(tmp_path / 'parts', [hook], iters=4, load_from=last, resume=True)
    assert first.outputs + second.outputs == whole.outputs
    for name, tensor in whole.teachers[-1].items():
        assert torch.equal(tensor, second.teachers[-1][name])


def test_load_from_starts_a_new_teacher(tmp_path):
    """Of the weights that are loaded, not of the teacher in that checkpoint."""
    _, first = run(tmp_path / 'first', [dict(TWIN, ema=0.25)], iters=2)
    _, second = run(
        tmp_path / 'second', iters=1, load_from=str(tmp_path / 'first' / 'iter_2.pth')
    )  # fmt: skip
    for name, tensor in second.teachers[0].items():
        assert torch.equal(tensor, first.students[-1][name])


def test_a_training_without_a_teacher_cannot_be_resumed(tmp_path):
    make_runner(tmp_path, hooks=(), iters=2).train()
    resumed = make_runner(
        tmp_path, iters=4, load_from=str(tmp_path / 'iter_2.pth'), resume=True
    )  # fmt: skip
    with pytest.raises(RuntimeError, match='cannot resume: the checkpoint has no teacher'):
        resumed.train()
    assert 'loss' not in vars(resumed.model)


@pytest.mark.parametrize('source', ['backbone', 'neck'])
def test_checkpoint_of_the_dense_model(source, tmp_path):
    dense = save_dense(tmp_path / 'dense.pth', neck=DENSE_NECK)
    hook = dict(TWIN, checkpoint=str(tmp_path / 'dense.pth'), source=source)
    cfg = config(SPARSE, DENSE_NECK)
    _, spy = run(tmp_path, [hook], cfg=cfg, iters=1)
    student = make_model(SPARSE, DENSE_NECK)
    networks = [m.extract if source == 'neck' else m.backbone for m in (student, dense)]
    assert spy.outputs[0][LOSS] == pytest.approx(reference(*networks), rel=1e-4)
    parts = ('backbone.', 'neck.') if source == 'neck' else ('backbone.',)
    wanted = {n: t for n, t in dense.state_dict().items() if n.startswith(parts)}
    assert spy.teachers[0].keys() == wanted.keys()
    assert all(torch.equal(spy.teachers[0][name], wanted[name]) for name in wanted)


def test_weights_of_a_backbone_alone(tmp_path):
    dense = save_dense(tmp_path / 'dense.pth')
    torch.save(dense.backbone.state_dict(), tmp_path / 'backbone.pth')
    hook = dict(TWIN, checkpoint=str(tmp_path / 'backbone.pth'))
    _, spy = run(tmp_path, [hook], iters=1)
    for name, tensor in dense.backbone.state_dict().items():
        assert torch.equal(spy.teachers[0][f'backbone.{name}'], tensor)


def test_checkpoints_that_do_not_fit(tmp_path):
    dense = save_dense(tmp_path / 'dense.pth')
    state = {f'backbone.{name}': t for name, t in dense.backbone.state_dict().items()}
    for change, said in (
        (lambda s: s.pop('backbone.blocks.1.attn.qkv.weight'), 'names it lacks: blocks.1.attn.qkv'),
        (lambda s: s.update({'backbone.extra': torch.ones(1)}), 'should not have: extra'),
    ):
        changed = dict(state)
        change(changed)
        torch.save(dict(state_dict=changed), tmp_path / 'changed.pth')
        runner = make_runner(tmp_path, [dict(TWIN, checkpoint=str(tmp_path / 'changed.pth'))])
        with pytest.raises(ValueError, match=f'changed.pth: does not fit .*{said}'):
            runner.train()
        assert 'loss' not in vars(runner.model)
    hook = dict(TWIN, checkpoint=str(tmp_path / 'dense.pth'), source='neck')
    with pytest.raises(ValueError, match="no name starts with prefix 'neck.'"):
        make_runner(tmp_path, [hook], cfg=config(SPARSE, DENSE_NECK)).train()
    with pytest.raises(FileNotFoundError):
        make_runner(tmp_path, [dict(TWIN, checkpoint=str(tmp_path / 'none.pth'))]).train()


def test_maps_behind_a_neck_that_restores_tokens(tmp_path):
    """Where every region is fine, both networks are ViT, and refining starts as the identity."""
    cfg = config(dict(MSVIT, out_type='tokens', gate=dict(loss=None)), NECK)
    losses = []
    for ratio in (0.0, 0.5):
        model = Model(cfg['backbone'], cfg['neck'])
        model.backbone.init_weights()
        model.neck.init_weights()
        with mmtoken.routing_override(coarse_ratio=ratio):
            _, spy = run(
                tmp_path / f'{ratio}', [dict(TWIN, source='neck')], cfg=cfg, model=model, iters=1
            )  # fmt: skip
        losses.append(spy.outputs[0][LOSS])
    assert abs(losses[0]) < 1e-8 and losses[1] > 1e-3
    assert not any('gate' in name or 'refine' in name for name in spy.teachers[0])


@pytest.mark.parametrize('name', ['DGEPVT', 'DGEDPVT', 'DGEDeiT', 'MSViT', 'MergeViT'])
def test_backbones_that_have_all_weights_of_their_twins(name):
    from mmtoken.engine.twin_distill_hook import _build_twin, _start_as

    cfg = config(dict(type=f'mmtoken.{name}', arch='tiny'))
    model = make_model(cfg['backbone'])
    teacher = _build_twin(cfg, ['backbone'])
    _start_as(teacher, model)
    state = model.state_dict()
    for key, tensor in teacher.state_dict().items():
        own = state.get(key)
        if own is None:
            assert 'qkv' in key
            own = torch.cat([state[key.replace('qkv', part)] for part in ('q', 'kv')])
        assert torch.equal(tensor, own)


def test_positions_of_another_grid(tmp_path):
    """The teacher takes over the grid that the student has from its weights."""
    cfg = config(dict(SPARSE, img_size=(16, 32)))
    torch.save(dict(state_dict=make_model(dict(SPARSE, img_size=64)).state_dict()),
               tmp_path / 'large.pth')  # fmt: skip
    _, spy = run(tmp_path, cfg=cfg, iters=1, load_from=str(tmp_path / 'large.pth'))
    assert spy.teachers[0]['backbone.pos_embed'].shape == (1, 65, 16)
    _, spy = run(tmp_path / 'own', cfg=cfg, iters=1)
    assert spy.teachers[0]['backbone.pos_embed'].shape == (1, 9, 16)


def test_under_autocast(tmp_path):
    class Watch(Hook):
        """The type of what the teacher computes."""

        def before_train_iter(self, runner, *args, **kwargs):
            block = teacher_of(runner).backbone.blocks[0].mlp.fc1
            block.register_forward_hook(lambda _, args, out: types.append(out.dtype))

    types = []
    _, plain = run(tmp_path / 'plain', iters=1)
    _, half = run(tmp_path / 'half', [TWIN, Watch()], iters=1, optim=dict(type='CPUAutocast'))
    assert types == [torch.bfloat16]
    assert half.outputs[0][LOSS] == pytest.approx(plain.outputs[0][LOSS], rel=0.2)
    _, dense = run(
        tmp_path / 'dense', cfg=config(DENSE), iters=1, optim=dict(type='CPUAutocast')
    )  # fmt: skip
    assert abs(dense.outputs[0][LOSS]) < 1e-3


def test_recomputed_activations_count_once(tmp_path):
    results = []
    for with_cp in (False, True):
        calls = []

        class Watch(Hook):
            def before_train(self, runner, calls=calls):
                teacher_of(runner).register_forward_hook(lambda *args: calls.append(1))

        cfg = config(dict(SPARSE, with_cp=with_cp))
        _, spy = run(tmp_path / str(with_cp), [TWIN, Watch()], cfg=cfg)
        assert len(calls) == 3
        results.append(spy.outputs)
    for plain, recomputed in zip(*results, strict=True):
        assert recomputed == pytest.approx(plain, rel=1e-4)


def test_accumulation_is_one_large_batch(tmp_path):
    _, parts = run(tmp_path / 'parts', iters=2, optim=dict(accumulative_counts=2))
    _, whole = run(tmp_path / 'whole', iters=1, batch_size=4)
    mean = sum(outputs[LOSS] for outputs in parts.outputs) / 2
    assert mean == pytest.approx(whole.outputs[0][LOSS], rel=1e-4)
    for name, tensor in whole.students[-1].items():
        torch.testing.assert_close(parts.students[-1][name], tensor, rtol=1e-4, atol=1e-5)


def test_beside_the_hook_for_token_losses(tmp_path):
    gate = dict(loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5))
    cfg = config(dict(MSVIT, gate=gate))
    orders = ([TWIN], [TWIN, TOKEN_LOSSES], [TOKEN_LOSSES, TWIN])
    results = []
    for i, hooks in enumerate(orders):
        runner, spy = run(tmp_path / str(i), hooks, cfg=cfg)
        assert 'loss' not in vars(runner.model)
        results.append(spy.outputs)
    assert {'loss_task', 'loss_gate', LOSS} <= set(results[0][0])
    assert results[0] == results[1] == results[2]
    first = results[0][0]
    assert first['loss'] == pytest.approx(first['loss_task'] + first['loss_gate'] + first[LOSS])


def test_an_interrupted_training_can_be_started_again(tmp_path):
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path / 'a', [TWIN, Spy(stop_at=1)], model=model).train()
    runner, spy = run(tmp_path / 'b', model=model, iters=1)
    # One teacher, which is equal to the student but for its tokens
    start = make_model()
    start.load_state_dict({**spy.teachers[0]})
    expected = reference(start.backbone, twin_of(start))
    assert spy.outputs[0][LOSS] == pytest.approx(expected, rel=1e-4)
    assert not model.backbone._forward_hooks and 'loss' not in vars(model)


def test_a_copy_made_in_training_is_taught_until_it_ends(tmp_path):
    class Copier(Hook):
        def before_train_iter(self, runner, *args, **kwargs):
            self.copy = copy.deepcopy(runner.model)
            assert set(self.copy.loss(IMAGES[:2])) == {'loss_task', LOSS}

    copier = Copier()
    run(tmp_path, [TWIN, copier], iters=1)
    assert set(copier.copy.loss(IMAGES[:2])) == {'loss_task'}


def test_averaged_models_and_validation(tmp_path):
    _, plain = run(tmp_path / 'plain')
    _, averaged = run(tmp_path / 'averaged', [dict(type='EMAHook', momentum=0.5), TWIN])
    assert averaged.outputs == plain.outputs
    model = make_model()
    hook = TwinDistillHook()
    runner = SimpleNamespace(model=model, hooks=[hook], cfg=Config(dict(model=config())), iter=0)
    hook.before_train(runner)
    model.eval()
    with torch.no_grad():
        assert len(model(IMAGES)) == 2  # calls outside of ``loss`` are not its business
    model.train()(IMAGES)
    assert hook._teaching.images is None


def test_in_a_segmentor():
    """The neck's maps, on a batch that the segmentor pads."""
    import_modules_from_strings(['mmseg.models'])
    from mmseg.structures import SegDataSample

    cfg = dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size=(32, 32)),
        backbone=dict(MSVIT, gate=dict(loss=dict(type='mmtoken.CoarseRatioLoss'))),
        neck=FPN,
        decode_head=dict(
            type='mmseg.FPNHead', in_channels=[8, 8], in_index=[0, 1], feature_strides=[8, 8],
            channels=8, num_classes=3, norm_cfg=dict(type='BN'),
        ),
        train_cfg={},
        test_cfg=dict(mode='whole'),
    )  # fmt: skip
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg).train()
    hook = TwinDistillHook(source='neck')
    runner = SimpleNamespace(model=model, hooks=[hook], cfg=Config(dict(model=cfg)), iter=0)
    hook.before_train(runner)
    labels = PixelData(data=torch.randint(3, (1, 24, 32)))
    samples = [SegDataSample(gt_sem_seg=labels) for _ in range(2)]
    data = dict(inputs=list(IMAGES[:2, :, :24]), data_samples=samples)
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    logged = model.train_step(data, optim_wrapper)
    assert {'decode.loss_ce', 'loss_gate', LOSS} <= set(logged) and logged[LOSS] > 1e-5
    assert noted_sizes(hook._teaching.images).tolist() == [[24, 32]] * 2
    hook.after_train_iter(runner, 0, outputs=logged)
    hook.after_train(runner)
    with mmtoken.token_losses() as published:
        logged = model.train_step(data, optim_wrapper)
    assert LOSS not in {*logged, *published} and 'loss_gate' in published


@pytest.mark.parametrize(
    'arguments, said',
    [
        (dict(checkpoint='dense.pth', ema=0.1), 'either checkpoint or ema.*dense.pth.*0.1'),
        (dict(ema=0), 'ema must be above 0 and below 1, got 0'),
        (dict(ema=1.0), 'ema must be above 0 and below 1'),
        (dict(source='head'), "source must be one of .*'backbone', 'neck'.*got 'head'"),
        (dict(distance='l1'), "distance must be one of .*'mse', 'cosine'.*got 'l1'"),
        (dict(loss_weight=-1), 'loss_weight must be 0 or more, got -1'),
        (dict(loss_weight=float('nan')), 'loss_weight must be 0 or more, got nan'),
    ],
)
def test_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        HOOKS.build(dict(TWIN, **arguments))


SWIN_ARCH = dict(embed_dims=8, depths=(1, 1, 6), num_heads=(1, 1, 1))
SWIN = dict(type='mmtoken.STViTRSwin', arch=SWIN_ARCH, out_indices=(0, 1, 2))
TOKENS = dict(MSVIT, out_type='tokens', gate=dict(loss=None))


@pytest.mark.parametrize(
    'cfg, hook, error, said',
    [
        (config(SWIN), TWIN, ValueError, r'STViTRSwin lacks \d+ of the \d+ .*qkv.*checkpoint='),
        (config(TOKENS, NECK), TWIN, TypeError, r"MSViT returns SparseFeatures.*source='neck'"),
        (config(), dict(TWIN, source='neck'), TypeError, 'maps of the neck, which Model lacks'),
        (
            config(SPARSE, teacher=dict(backbone=SPARSE)), TWIN, TypeError,
            'one backbone of its own; .* of Model has 2 backbones',
        ),
    ],
)  # fmt: skip
def test_models_it_cannot_teach(cfg, hook, error, said, tmp_path):
    with pytest.raises(error, match=said):
        make_runner(tmp_path, [hook], cfg=cfg).train()


def test_semi_supervised_detectors(tmp_path):
    runner = make_runner(tmp_path)
    runner.cfg = Config(dict(model=dict(type='mmdet.SoftTeacher', detector=config())))
    with pytest.raises(TypeError, match='has 1 backbones.*Semi-supervised detectors have'):
        runner.train()


def test_runners_without_a_config_and_with_two_teachers(tmp_path):
    runner = make_runner(tmp_path)
    runner.cfg = Config()
    with pytest.raises(RuntimeError, match='runner.cfg.model, which this runner does not have'):
        runner.train()
    with pytest.raises(RuntimeError, match='takes one TwinDistillHook'):
        make_runner(tmp_path, [TWIN, TWIN]).train()


def test_a_student_that_is_not_taught(tmp_path):
    class Frozen(Model):
        def extract(self, inputs):
            with torch.no_grad():
                maps = super().extract(inputs)
            return [m + self.backbone.pos_embed.mean() for m in maps]

    with pytest.raises(RuntimeError, match='Frozen was not taught: its training did not call the'):
        make_runner(tmp_path, model=Frozen(SPARSE)).train()


def test_the_dense_twin_of_a_config_has_no_teacher():
    cfg = Config(dict(
        model=config(), custom_hooks=[TWIN, dict(type='EMAHook')], default_hooks=dict(twin=TWIN)
    ))  # fmt: skip
    twin = mmtoken.dense_twin(cfg)
    assert twin.custom_hooks == [dict(type='EMAHook')] and not twin.default_hooks


def train_step(model, images):
    """One step with a share of a batch: losses, and gradients."""
    hook = TwinDistillHook(loss_weight=10.0)
    cfg = Config(dict(model=config()))
    hook.before_train(SimpleNamespace(model=model, hooks=[hook], cfg=cfg, iter=0))
    # Without a step, so that gradients can be looked at.
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    optim_wrapper.zero_grad = lambda: None
    logged = model.train_step(dict(inputs=IMAGES[images]), optim_wrapper)
    parameters = getattr(model, 'module', model).named_parameters()
    return (
        {name: value.item() for name, value in logged.items()},
        {name: p.grad.numpy() for name, p in parameters},
    )


def work(folder, rank):
    """One of two processes."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    model = MMDistributedDataParallel(make_model(), find_unused_parameters=False)
    losses, gradients = train_step(model, [rank, rank + 2])
    np.savez(f'{folder}/{rank}.npz', **losses, **gradients)
    del model  # torch 2.13 may hang if DDP is the last that holds the group
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    commands = [[sys.executable, __file__, tmp_path, str(rank)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    losses, gradients = train_step(make_model(), [0, 1, 2, 3])
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    parts = [np.load(tmp_path / f'{rank}.npz') for rank in (0, 1)]
    assert losses[LOSS] > 1e-2
    assert np.mean([part[LOSS] for part in parts]) == pytest.approx(losses[LOSS], rel=1e-4)
    for part in parts:
        for name, gradient in gradients.items():
            np.testing.assert_allclose(part[name], gradient, rtol=1e-3, atol=1e-5, err_msg=name)


if __name__ == '__main__':
    work(Path(sys.argv[1]), int(sys.argv[2]))
