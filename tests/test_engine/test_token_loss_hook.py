"""The hook in trainings through MMEngine's runner, with a model that publishes."""

import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

import mmtoken
from mmtoken.engine import TokenLossHook
from mmtoken.losses import BudgetLoss
from mmtoken.runtime.aux_losses import publish, should_publish

TOKEN_LOSSES = dict(type='mmtoken.TokenLossHook')


class Backbone(nn.Module):
    """Its one weight is the share of its tokens that it keeps."""

    def __init__(self):
        super().__init__()
        self.kept = nn.Parameter(torch.tensor(0.9))
        self.budget = BudgetLoss(target=0.5, warmup_iters=4)

    def forward(self, x):
        if should_publish(self.training):
            static = torch.full((len(x),), 100.0, dtype=torch.float64)
            loss, ratio = self.budget(static, static * self.kept)
            publish(dict(loss_budget=loss, cost_ratio=ratio))
        return x * self.kept


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()

    def forward(self, inputs, mode='tensor'):
        if mode == 'loss':
            return self.loss(inputs)
        return [self.backbone(inputs).mean().item()]

    def loss(self, inputs):
        return dict(loss_task=(self.backbone(inputs) - 1).square().mean())


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


class Spy(Hook):
    """Keeps what the runner logs of each iteration, and the state of the model's ``loss``."""

    def __init__(self, stop_at=None):
        self.stop_at, self.outputs, self.wrapped = stop_at, [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.outputs.append({name: value.item() for name, value in outputs.items()})
        self.wrapped.append('loss' in vars(runner.model))
        if len(self.outputs) == self.stop_at:
            raise KeyboardInterrupt


def loader(sampler):
    dataset = [dict(inputs=torch.full((4,), 1.0 + i)) for i in range(4)]
    return dict(
        dataset=dataset,
        sampler=dict(type=sampler, shuffle=False),
        collate_fn=dict(type='default_collate'),
        batch_size=2,
        num_workers=0,
    )


def make_runner(
    work_dir,
    hooks=(TOKEN_LOSSES,),
    model=None,
    iters=3,
    optim_wrapper=None,
    default_hooks=None,
    **kwargs,
):
    optim_wrapper, default_hooks = optim_wrapper or {}, default_hooks or {}
    return Runner(
        model=model or Model(),
        work_dir=str(work_dir),
        train_dataloader=loader('InfiniteSampler'),
        train_cfg=dict(by_epoch=False, max_iters=iters, val_interval=iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1), **optim_wrapper),
        val_dataloader=loader('DefaultSampler'),
        val_cfg={},
        val_evaluator=[Metric()],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
            **default_hooks,
        ),
        custom_hooks=[copy.deepcopy(hook) if isinstance(hook, dict) else hook for hook in hooks],
        experiment_name=f'{work_dir.name}_{id(work_dir)}',
        log_level='WARNING',
        **kwargs,
    )


def test_losses_are_trained_and_logged_and_statistics_only_logged(tmp_path):
    spy = Spy()
    runner = make_runner(tmp_path, [TOKEN_LOSSES, spy])
    runner.train()
    assert 'loss' not in vars(runner.model)
    assert spy.wrapped == [True] * 3
    kept = 0.9
    for i, outputs in enumerate(spy.outputs):
        assert set(outputs) == {'loss', 'loss_task', 'loss_budget', 'cost_ratio'}
        x = torch.tensor([[1.0, 2.0], [3.0, 4.0]][i % 2])
        assert outputs['cost_ratio'] == pytest.approx(kept)
        assert outputs['loss_budget'] == pytest.approx(i / 4 * (kept - 0.5) ** 2)
        assert outputs['loss'] == pytest.approx(outputs['loss_task'] + outputs['loss_budget'])
        task_grad = (2 * (x * kept - 1) * x).mean().item()
        kept -= 0.1 * (task_grad + i / 4 * 2 * (kept - 0.5))
    assert runner.model.backbone.kept.item() == pytest.approx(kept)
    (log,) = tmp_path.glob('*/vis_data/*[0-9].json')
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert logged[1]['loss_budget'] > 0 and logged[1]['cost_ratio'] > 0
    assert 'mean' in logged[-1]  # the metric


def test_accumulation_divides_them_like_all_losses(tmp_path):
    runner = make_runner(tmp_path, iters=2, optim_wrapper=dict(accumulative_counts=2))
    runner.model.backbone.budget.iterations += 4
    runner.train()
    task_grad = sum(2 * (x * 0.9 - 1) * x for x in (1, 2, 3, 4)) / 4
    expected = 0.9 - 0.1 * (task_grad + 2 * (0.9 - 0.5))
    assert runner.model.backbone.kept.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('ema_first', [True, False])
def test_resume_with_ema_goes_on_as_if_never_stopped(ema_first, tmp_path):
    """In particular the warm-up does not start again."""
    hooks = [dict(type='EMAHook', momentum=0.5), TOKEN_LOSSES]
    hooks = hooks if ema_first else hooks[::-1]
    whole, first, second = Spy(), Spy(), Spy()
    make_runner(tmp_path / 'whole', [*hooks, whole], iters=4).train()
    make_runner(tmp_path / 'parts', [*hooks, first], iters=2).train()
    resumed = make_runner(
        tmp_path / 'parts', [*hooks, second], iters=4,
        load_from=str(tmp_path / 'parts' / 'iter_2.pth'), resume=True,
    )  # fmt: skip
    resumed.train()
    assert resumed.model.backbone.budget.iterations == 4
    assert first.outputs + second.outputs == whole.outputs


def test_a_copy_made_in_training_computes_its_own_loss(tmp_path):
    class Copier(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            self.copy = copy.deepcopy(runner.model)

    copier = Copier()
    runner = make_runner(tmp_path, [TOKEN_LOSSES, copier])
    runner.train()
    nn.init.constant_(copier.copy.backbone.kept, 0.25)
    losses = copier.copy.loss(torch.ones(2))
    assert losses['cost_ratio'] == 0.25 and losses['loss_task'] == 0.75**2


def test_the_hook_under_a_name_of_its_own(tmp_path):
    """As the message and the docstring say, beside the hooks that a base config has."""
    spy = Spy()
    runner = make_runner(tmp_path, [spy], default_hooks=dict(token_losses=TOKEN_LOSSES))
    runner.train()
    assert set(spy.outputs[0]) == {'loss', 'loss_task', 'loss_budget', 'cost_ratio'}


RTMDET = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'


@pytest.mark.parametrize(
    'line',
    [
        "default_hooks = dict(token_losses=dict(type='mmtoken.TokenLossHook'))",
        "custom_hooks = _base_.custom_hooks + [dict(type='mmtoken.TokenLossHook')]",
    ],
)
def test_the_hooks_of_a_base_config_stay(line):
    cfg = Config.fromstring(f'_base_ = {RTMDET!r}\n{line}', '.py')
    base = Config.fromstring(f'_base_ = {RTMDET!r}', '.py')
    names = [hook['type'] for hook in [*cfg.custom_hooks, *cfg.default_hooks.values()]]
    assert names.count('mmtoken.TokenLossHook') == 1
    assert {'EMAHook', 'PipelineSwitchHook'} <= set(names)
    assert set(base.default_hooks) <= set(cfg.default_hooks)


def test_the_hooks_of_a_base_config_in_python_stay(tmp_path):
    (tmp_path / 'base.py').write_text('default_hooks = dict(timer=dict(type="IterTimerHook"))\n')
    (tmp_path / 'config.py').write_text(
        'from mmengine.config import read_base\n'
        'with read_base():\n'
        '    from .base import *\n'
        'from mmtoken.engine import TokenLossHook\n'
        'default_hooks.update(token_losses=dict(type=TokenLossHook))\n'
    )
    cfg = Config.fromfile(tmp_path / 'config.py')
    assert set(cfg.default_hooks) == {'timer', 'token_losses'}
    assert HOOKS.build(cfg.default_hooks.token_losses).__class__ is TokenLossHook


@pytest.mark.parametrize('phase', ['train', 'val', 'test'])
def test_sizes_are_followed_in_every_phase(phase, tmp_path):
    model = Model()
    runner = make_runner(
        tmp_path, model=model, test_dataloader=loader('DefaultSampler'), test_cfg={},
        test_evaluator=[Metric()],
    )  # fmt: skip
    getattr(runner, phase)()
    assert len(model._forward_pre_hooks) == 1


def test_without_the_hook_training_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match='default_hooks = .*mmtoken.TokenLossHook'):
        make_runner(tmp_path, hooks=()).train()


def test_validation_and_testing_need_no_hook(tmp_path):
    runner = make_runner(tmp_path, hooks=())
    assert runner.val()['mean'] == pytest.approx(2.5 * 0.9)


def test_an_interrupted_training_can_be_started_again(tmp_path):
    model, spy = Model(), Spy(stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path / 'a', [TOKEN_LOSSES, spy], model).train()
    spy.stop_at = None
    make_runner(tmp_path / 'b', [TOKEN_LOSSES, spy], model).train()
    assert len(spy.outputs) == 4 and set(spy.outputs[0]) == set(spy.outputs[3])
    assert 'loss' not in vars(model)
    TokenLossHook().after_train(make_runner(tmp_path / 'c', (), model))  # once more does no harm
    with mmtoken.token_losses() as published:
        assert set(model.train().loss(torch.ones(2))) == {'loss_task'}
    assert set(published) == {'loss_budget', 'cost_ratio'}


def test_names_must_not_collide(tmp_path):
    class Colliding(Model):
        def loss(self, inputs):
            return dict(super().loss(inputs), cost_ratio=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r'both Colliding.loss\(\) and a module .* cost_ratio'):
        make_runner(tmp_path, model=Colliding()).train()


def test_models_it_cannot_wrap(tmp_path):
    class Lossless(BaseModel):
        def __init__(self):
            super().__init__()
            self.loss = nn.Linear(1, 1)

        def forward(self, inputs, mode='tensor'):
            return dict(loss=self.loss(inputs[:, None]).mean())

    with pytest.raises(TypeError, match='method `loss`, which Lossless lacks'):
        make_runner(tmp_path / 'a', model=Lossless()).train()
    model = Model()
    model.loss = lambda inputs: {}
    with pytest.raises(RuntimeError, match='something else has set as `loss` of this Model'):
        make_runner(tmp_path / 'b', model=model).train()


def test_the_model_inside_a_wrapper_is_wrapped(tmp_path):
    init = f'file://{tmp_path}/init'
    torch.distributed.init_process_group('gloo', init_method=init, rank=0, world_size=1)
    try:
        runner = make_runner(tmp_path / 'run')
        model = runner.model
        runner.model = MMDistributedDataParallel(model)
        hook = TokenLossHook()
        hook.before_train(runner)
        data = dict(inputs=torch.ones(2))
        outputs = runner.model.train_step(data, runner.build_optim_wrapper(runner.optim_wrapper))
        assert set(outputs) == {'loss', 'loss_task', 'loss_budget', 'cost_ratio'}
        hook.after_train(runner)
        assert 'loss' not in vars(model)
    finally:
        torch.distributed.destroy_process_group()


def test_found_under_its_name_from_any_library():
    assert HOOKS.get('mmtoken.TokenLossHook') is TokenLossHook
