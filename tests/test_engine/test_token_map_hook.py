"""Pictures of choices, drawn in validations and tests of MMEngine's runner."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from mmtoken.engine import TokenMapHook

SIZE = (64, 96)
PREPROCESSOR = dict(mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True)
SEGMENTOR = dict(
    type='mmseg.EncoderDecoder',
    data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size=SIZE, **PREPROCESSOR),
    backbone=dict(
        type='mmtoken.MSViT',
        arch=dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16),
        gate=dict(fine_ratio=0.5),
    ),
    decode_head=dict(
        type='mmseg.FCNHead', in_channels=16, channels=16, num_convs=0, concat_input=False,
        num_classes=3, norm_cfg=dict(type='BN'),
    ),
    test_cfg=dict(mode='whole'),
)  # fmt: skip
DETECTOR = dict(
    type='mmdet.RPN',
    data_preprocessor=dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=32, **PREPROCESSOR),
    backbone=dict(
        type='mmtoken.DGEPVT', out_indices=(0, 1), arch=dict(
            embed_dims=(16, 16), depths=(1, 2), num_heads=(1, 1), mlp_ratios=(1, 1),
            sr_ratios=(2, 1),
        ),
    ),
    neck=dict(type='mmdet.FPN', in_channels=[16, 16], out_channels=16, num_outs=2),
    rpn_head=dict(
        type='mmdet.RPNHead', in_channels=16, feat_channels=16,
        anchor_generator=dict(
            type='mmdet.AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8]
        ),
    ),
    train_cfg=None,
    test_cfg=dict(rpn=dict(nms_pre=10, max_per_img=5, nms=dict(type='nms', iou_threshold=0.7))),
)  # fmt: skip
MODELS_BY_SCOPE = dict(mmseg=SEGMENTOR, mmdet=DETECTOR)


class Predictions(BaseMetric):
    """Keeps what a model predicts."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            kind = 'pred_sem_seg' if 'pred_sem_seg' in sample else 'pred_instances'
            values = sample[kind]
            self.seen.append((values.get('data', values.get('bboxes'))).clone())
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(images=len(results))


def sample_of(scope):
    meta = dict(
        img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, batch_input_shape=SIZE,
        scale_factor=(1.0, 1.0),
    )  # fmt: skip
    if scope == 'mmseg':
        labels = PixelData(data=torch.zeros(1, *SIZE, dtype=torch.long))
        return SegDataSample(metainfo=meta, gt_sem_seg=labels)
    return DetDataSample(metainfo=meta, gt_instances=InstanceData())


def make_runner(scope, folder, hook, model=None):
    init_default_scope(scope)
    rng = torch.Generator().manual_seed(0)
    data = [
        dict(
            inputs=torch.randint(256, (3, *SIZE), generator=rng, dtype=torch.uint8),
            data_samples=sample_of(scope),
        )
        for _ in range(5)
    ]
    loader = dict(
        dataset=data, batch_size=2, num_workers=0, collate_fn=dict(type='pseudo_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )  # fmt: skip
    torch.manual_seed(0)
    metric = Predictions()
    runner = Runner(
        model=MODELS.build(ConfigDict(model or MODELS_BY_SCOPE[scope])), work_dir=str(folder),
        val_dataloader=loader, val_cfg={}, val_evaluator=[metric],
        test_dataloader=loader, test_cfg={}, test_evaluator=[metric],
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        default_hooks=dict(logger=None), custom_hooks=[hook] if hook else [],
        default_scope=scope, log_level='ERROR', experiment_name=Path(folder).name,
    )  # fmt: skip
    return runner, metric


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(Path(folder).rglob('*tokens*.png'))}


@pytest.mark.parametrize('scope', MODELS_BY_SCOPE)
def test_the_first_images_are_drawn_and_predictions_stay(scope, tmp_path):
    runner, metric = make_runner(scope, tmp_path / 'drawn', TokenMapHook(num_images=3))
    runner.val()
    runner.test()
    drawn = pictures(tmp_path / 'drawn')
    names = [f'{part}_tokens_{i}_0.png' for part in ('test', 'val') for i in range(3)]
    assert list(drawn) == names
    assert all(p.shape[2] == 3 and p.std() > 10 for p in drawn.values())
    assert not np.array_equal(drawn[names[0]], drawn[names[1]])
    assert np.array_equal(drawn[names[0]], drawn[names[3]])  # the same image
    runner, plain = make_runner(scope, tmp_path / 'plain', None)
    runner.val()
    runner.test()
    assert len(plain.seen) == len(metric.seen) == 10
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, metric.seen, strict=True))


def test_interval_and_blocks(tmp_path):
    hook = dict(type='mmtoken.TokenMapHook', num_images=1, interval=2, per_block=True)
    runner, _ = make_runner('mmdet', tmp_path, hook)
    steps = []
    runner.visualizer.add_image = lambda name, image, step: steps.append(step)
    for _ in range(4):
        runner.val()
    assert len(steps) == 2


def test_models_that_choose_nothing_are_named(tmp_path):
    backbone = dict(SEGMENTOR['backbone'], gate=None)
    runner, _ = make_runner('mmseg', tmp_path, TokenMapHook(), dict(SEGMENTOR, backbone=backbone))
    with pytest.raises(ValueError, match='no part of this EncoderDecoder chooses its tokens'):
        runner.val()


@pytest.mark.parametrize('name', ['num_images', 'interval'])
def test_numbers_are_positive(name):
    with pytest.raises(ValueError, match=f'{name} must be 1 or more, got 0'):
        TokenMapHook(**{name: 0})
