"""Detectors of our configs in mmdet's own tools."""

import re

import mmcv
import mmdet
import pytest
import torch
from end_to_end import (
    ANY_SCORE,
    CONFIGS,
    FROM_SCRATCH,
    ONE_PROCESS,
    SHORT_DETECTION,
    STOCK,
    TEST,
    TRAIN,
    logged_steps,
    run,
    scores,
    train,
)

pytestmark = pytest.mark.e2e

SHAPES = CONFIGS / 'shapes'
STVIT = SHAPES / 'mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'
DGE = SHAPES / 'mask-rcnn_dge-pvt-nano_fpn_1xb8-3e_shapes.py'
MSVIT = SHAPES / 'mask-rcnn_msvit-nano_sfp_1xb8-3e_shapes.py'
SWAT = SHAPES / 'mask-rcnn_swat-swin-nano_fpn_1xb8-5e_shapes.py'
PSVIT = SHAPES / 'mask-rcnn_psvit-nano_fpn_1xb8-5e_shapes.py'
COCO = CONFIGS / 'stvit_r' / 'mask-rcnn_stvit-r-swin-t_fpn_8xb2-1x_coco.py'


@pytest.fixture(scope='session')
def detector(workspace):
    return train(workspace, TRAIN, STVIT, [*ONE_PROCESS, *SHORT_DETECTION])


def test_detector_is_trained_and_tested(workspace, detector):
    checkpoint, output = detector
    assert scores(output, 'coco/bbox_mAP') and scores(output, 'coco/segm_mAP')
    output = run(
        workspace, TEST, STVIT, checkpoint, '--show-dir', 'drawn',
        options=[*ONE_PROCESS, ANY_SCORE],
    )  # fmt: skip
    assert scores(output, 'coco/bbox_mAP') and scores(output, 'coco/segm_mAP')
    assert list(workspace.glob('work_dirs/**/drawn/*.jpg'))


def test_real_coco_config(workspace):
    """The COCO layout and all 80 classes; the config is shrunk through options alone."""
    scale = '(176,128)'
    options = [
        *ONE_PROCESS, *SHORT_DETECTION,
        f'train_dataloader.dataset.pipeline.2.scale={scale}',
        f'val_dataloader.dataset.pipeline.1.scale={scale}',
        f'test_dataloader.dataset.pipeline.1.scale={scale}',
    ]  # fmt: skip
    checkpoint, output = train(workspace, STOCK[mmdet] / 'train.py', COCO, options)
    assert scores(output, 'coco/bbox_mAP') and scores(output, 'coco/segm_mAP')
    output = run(workspace, STOCK[mmdet] / 'test.py', COCO, checkpoint, options=options)
    assert scores(output, 'coco/bbox_mAP') and scores(output, 'coco/segm_mAP')


def test_test_time_augmentation(workspace, detector):
    # mmdet's test-time augmentation merges boxes, and refuses models that give masks.
    boxes_only = ['model.roi_head.mask_head=None', 'model.roi_head.mask_roi_extractor=None',
                  'test_evaluator.metric=bbox', ANY_SCORE]  # fmt: skip
    output = run(
        workspace, STOCK[mmdet] / 'test.py', STVIT, detector[0], '--tta',
        options=[*ONE_PROCESS, *boxes_only],
    )  # fmt: skip
    assert scores(output, 'coco/bbox_mAP')


def test_resume(workspace, detector):
    output = run(
        workspace, STOCK[mmdet] / 'train.py', STVIT, '--resume', detector[0],
        '--work-dir', 'work_dirs/resumed',
        options=[*ONE_PROCESS, 'train_cfg.max_epochs=2', 'train_cfg.val_interval=9'],
    )  # fmt: skip
    assert 'resumed epoch: 1' in output
    assert (workspace / 'work_dirs' / 'resumed' / 'epoch_2.pth').is_file()


def test_inference(workspace, detector):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    image = sorted((workspace / 'data/shapes/coco/val2017').glob('*.jpg'))[0]
    checkpoint = str(detector[0])
    model = init_detector(str(STVIT), checkpoint, device='cpu')
    assert model.dataset_meta['classes'][0] == 'lamp'
    sample = inference_detector(model, str(image))
    assert sample.pred_instances.masks.shape[1:] == mmcv.imread(image).shape[:2]

    inferencer = DetInferencer(str(STVIT), checkpoint, device='cpu')
    result = inferencer(str(image), out_dir=str(workspace / 'inferred'), pred_score_thr=0.0)
    assert set(result['predictions'][0]) >= {'bboxes', 'labels', 'scores', 'masks'}
    assert (workspace / 'inferred' / 'vis' / image.name).is_file()


def test_browse_dataset_and_print_config(workspace):
    out = workspace / 'browsed_detection'
    run(workspace, STOCK[mmdet] / 'analysis_tools' / 'browse_dataset.py', STVIT,
        '--output-dir', out, '--not-show')  # fmt: skip
    assert len(list(out.glob('**/*.*'))) >= 4
    printed = run(workspace, STOCK[mmdet] / 'misc' / 'print_config.py', STVIT)
    assert "type='mmtoken.STViTRSwin'" in printed


@pytest.fixture(scope='session')
def dge_detector(workspace):
    """Trained with accumulated gradients and averaged weights; the budget warms up."""
    options = [
        *ONE_PROCESS, *SHORT_DETECTION, 'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1', 'default_hooks.ema.type=EMAHook',
        'optim_wrapper.accumulative_counts=2', 'model.backbone.budget.warmup_iters=8', FROM_SCRATCH,
    ]  # fmt: skip
    return *train(workspace, STOCK[mmdet] / 'train.py', DGE, options), options


def test_token_losses_are_ordinary_losses(workspace, dge_detector):
    _, output, _ = dge_detector
    steps = logged_steps(workspace / 'work_dirs' / DGE.stem)
    assert len(steps) == 4 and scores(output, 'coco/bbox_mAP')
    for step in steps:
        losses = [value for name, value in step.items() if 'loss' in name and name != 'loss']
        assert step['loss'] == pytest.approx(sum(losses), rel=1e-4)
        assert all(0 < step[f'query_ratio_s{i}'] <= 1 for i in range(4))
        assert 0 < step['budget_ratio'] <= 1
    # The log smooths over the steps so far; the budget's weight begins at 0.
    assert steps[0]['loss_budget'] == 0 < steps[-1]['loss_budget']


def test_dge_detector_resumes_and_is_tested(workspace, dge_detector):
    checkpoint, output, options = dge_detector
    saved = torch.load(checkpoint, weights_only=False)
    assert saved['state_dict']['backbone.budget.iterations'] == 4
    resumed = run(
        workspace, STOCK[mmdet] / 'train.py', DGE, '--resume', checkpoint,
        '--work-dir', 'work_dirs/dge', options=[*options, 'train_cfg.max_epochs=2'],
    )  # fmt: skip
    assert 'resumed epoch: 1' in resumed
    saved = torch.load(workspace / 'work_dirs/dge/epoch_2.pth', weights_only=False)
    assert saved['state_dict']['backbone.budget.iterations'] == 8
    tested = run(workspace, STOCK[mmdet] / 'test.py', DGE, checkpoint, options=options)
    assert scores(tested, 'coco/bbox_mAP') == scores(output, 'coco/bbox_mAP')


def test_mixed_scale_detector(workspace):
    """Trained with learning rates by layer and averaged weights."""
    options = [
        *ONE_PROCESS, *SHORT_DETECTION, 'train_dataloader.batch_size=2', FROM_SCRATCH,
        'default_hooks.logger.interval=1', 'default_hooks.ema.type=EMAHook',
        'optim_wrapper.constructor=mmtoken.LayerDecayOptimWrapperConstructor',
        'optim_wrapper.paramwise_cfg.layer_decay_rate=0.7',
    ]  # fmt: skip
    checkpoint, output = train(workspace, STOCK[mmdet] / 'train.py', MSVIT, options)
    assert 'backbone 7' in output and re.search(r'loss_gate: [\d.]+  coarse_ratio: [\d.]+', output)
    tested = run(workspace, STOCK[mmdet] / 'test.py', MSVIT, checkpoint, options=options)
    assert scores(tested, 'coco/bbox_mAP') == scores(output, 'coco/bbox_mAP')


@pytest.mark.parametrize('config', [SWAT, PSVIT], ids=['swat', 'psvit'])
def test_detectors_without_token_losses(workspace, config):
    options = [*ONE_PROCESS, *SHORT_DETECTION, 'train_dataloader.batch_size=4']
    checkpoint, output = train(workspace, STOCK[mmdet] / 'train.py', config, options)
    tested = run(workspace, STOCK[mmdet] / 'test.py', config, checkpoint, options=options)
    assert scores(tested, 'coco/segm_mAP') == scores(output, 'coco/segm_mAP') != []
