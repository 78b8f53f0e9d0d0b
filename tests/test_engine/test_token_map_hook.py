"""The hook in validations and tests of MMEngine's runner, with whole small models."""

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from PIL import Image

from mmtoken.engine import TokenMapHook, token_map_hook

PYRAMID = dict(
    arch=dict(
        embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(8, 4)
    ),
    out_indices=(0, 1),
)
DGE = dict(type='mmtoken.DGEPVT', **PYRAMID)
DENSE = dict(DGE, granularities=(1,))
STVIT_R = dict(
    type='mmtoken.STViTRSwin',
    arch=dict(embed_dims=8, depths=(1, 1, 6), num_heads=(1, 1, 1)),
    out_indices=(1, 2),
)
SIDES = (64, 80)
IMAGES = 3


def segmentor(backbone=DGE):
    return dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', test_cfg=dict(size_divisor=32)),
        backbone=backbone,
        decode_head=dict(
            type='mmseg.FPNHead', in_channels=[8, 16], in_index=[0, 1], feature_strides=[4, 8],
            channels=8, num_classes=3, norm_cfg=dict(type='BN'), align_corners=False,
        ),
        test_cfg=dict(mode='whole'),
    )  # fmt: skip


def detector():
    return dict(
        type='mmdet.RetinaNet',
        data_preprocessor=dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=32),
        backbone=STVIT_R,
        neck=dict(type='mmdet.FPN', in_channels=[16, 32], out_channels=8, num_outs=2),
        bbox_head=dict(
            type='mmdet.RetinaHead', num_classes=3, in_channels=8, feat_channels=8,
            stacked_convs=1, anchor_generator=dict(
                type='mmdet.AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16]
            ),
            bbox_coder=dict(type='mmdet.DeltaXYWHBBoxCoder'),
        ),
        test_cfg=dict(
            nms_pre=20, score_thr=0.0, max_per_img=5, nms=dict(type='nms', iou_threshold=0.5)
        ),
    )  # fmt: skip


def images(scope):
    """Images of different sizes, with their data samples."""
    from mmdet.structures import DetDataSample
    from mmseg.structures import SegDataSample

    sample = dict(mmdet=DetDataSample, mmseg=SegDataSample)[scope]
    generator = torch.Generator().manual_seed(0)
    shapes = [(SIDES[0], SIDES[1] - 8 * i) for i in range(IMAGES)]
    return [
        dict(
            inputs=torch.randint(256, (3, *shape), generator=generator, dtype=torch.uint8),
            data_samples=sample(
                metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))
            ),
        )
        for shape in shapes
    ]


class Metric(BaseMetric):
    """Keeps what the model predicts."""

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            found = sample['pred_instances' if 'pred_instances' in sample else 'seg_logits']
            self.results.append({name: value.clone() for name, value in found.items()})

    def compute_metrics(self, results):
        self.kept = results
        return dict(images=len(results))


def make_runner(work_dir, model, *hooks, batch_size=1):
    scope = model['type'].partition('.')[0]
    import_modules_from_strings([f'{scope}.models', f'{scope}.visualization'])
    init_default_scope(scope)
    loader = dict(
        dataset=images(scope), sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='pseudo_collate'), batch_size=batch_size, num_workers=0,
    )  # fmt: skip
    return Runner(
        model=ConfigDict(model),
        work_dir=str(work_dir),
        val_dataloader=loader,
        val_cfg={},
        val_evaluator=[Metric()],
        test_dataloader=loader,
        test_cfg={},
        test_evaluator=[Metric()],
        custom_hooks=list(hooks),
        visualizer=dict(
            type='Visualizer', name=f'{work_dir}', vis_backends=[dict(type='LocalVisBackend')]
        ),
        default_scope=scope,
        randomness=dict(seed=0),
        experiment_name=f'run_{id(work_dir)}',
        log_level='WARNING',
    )


def pictures(work_dir):
    return sorted(work_dir.glob('*/vis_data/vis_image/*.png'))


def names(work_dir):
    return [path.name for path in pictures(work_dir)]


HOOK = dict(type='mmtoken.TokenMapHook', num_images=2, dpi=30)


@pytest.mark.parametrize('model', [segmentor(), detector()], ids=['segmentor', 'detector'])
def test_pictures_of_validations_and_tests(model, tmp_path):
    runner = make_runner(tmp_path, model, HOOK)
    runner.val()
    runner.test()
    assert names(tmp_path) == [
        'test_tokens_0_0.png', 'test_tokens_1_0.png', 'val_tokens_0_0.png', 'val_tokens_1_0.png',
    ]  # fmt: skip
    first, second = (np.asarray(Image.open(path)) for path in pictures(tmp_path)[2:])
    assert first.std() > 10 and first.shape[1] > first.shape[0]
    assert first.shape != second.shape  # the images have different sizes


@pytest.mark.parametrize('model, batch_size', [(segmentor(), 1), (detector(), 2)])
def test_results_and_random_numbers_are_those_without_it(model, batch_size, tmp_path):
    kept = []
    for folder, hooks in (('without', []), ('with', [HOOK])):
        runner = make_runner(tmp_path / folder, model, *hooks, batch_size=batch_size)
        runner.val()
        (metric,) = runner.val_evaluator.metrics
        kept.append((metric.kept, torch.rand(4), {k: v.clone() for k, v in state(runner)}))
    assert len(names(tmp_path / 'with')) == 2 and not names(tmp_path / 'without')
    (results, numbers, weights), (theirs, their_numbers, their_weights) = kept
    assert len(results) == IMAGES
    for ours, other in zip(results, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0)
    assert numbers.equal(their_numbers)
    torch.testing.assert_close(weights, their_weights, rtol=0, atol=0)


def state(runner):
    return runner.model.state_dict().items()


def test_interval_counts_validations(tmp_path):
    hook = TokenMapHook(num_images=1, interval=2, dpi=20)
    runner = make_runner(tmp_path, segmentor(), hook)
    drawn = []
    for _ in range(4):
        runner.val()
        drawn.append(len(pictures(tmp_path)))
        for path in pictures(tmp_path):
            path.unlink()
    assert drawn == [1, 0, 1, 0]
    runner.test()
    assert names(tmp_path) == ['test_tokens_0_0.png']


def test_other_processes_draw_nothing(tmp_path, monkeypatch):
    runner = make_runner(tmp_path, segmentor(), HOOK)
    monkeypatch.setattr(token_map_hook, 'is_main_process', lambda: False)
    runner.val()
    assert not names(tmp_path)


def test_of_test_time_augmentation_the_first_view_is_drawn(tmp_path):
    class Augmented(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            return [views[0] for views in data_samples_list]

    model = segmentor()
    runner = make_runner(tmp_path, model, HOOK)
    runner.model = Augmented(runner.model)
    dataset = runner.test_dataloader.dataset
    for item in dataset:
        item['inputs'] = [item['inputs'], item['inputs'].flip(-1)]
        item['data_samples'] = [item['data_samples'], item['data_samples'].clone()]
    runner.test()
    assert names(tmp_path) == ['test_tokens_0_0.png', 'test_tokens_1_0.png']


def test_a_dense_model_is_reported_once(tmp_path, caplog):
    runner = make_runner(tmp_path, segmentor(DENSE), HOOK)
    said = []
    runner.logger.warning = said.append
    runner.val()
    assert len(said) == 1 and 'TokenMapHook draws nothing' in said[0]
    assert not names(tmp_path)


def test_models_without_features(tmp_path):
    class Plain(BaseModel):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            return []

    runner = make_runner(tmp_path, segmentor(), HOOK)
    runner.model = Plain()
    with pytest.raises(TypeError, match='a method `extract_feat`.* which Plain lacks'):
        runner.val()


@pytest.mark.parametrize('name', ['num_images', 'interval', 'dpi'])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f'{name} must be 1 or more, got 0'):
        TokenMapHook(**{name: 0})
