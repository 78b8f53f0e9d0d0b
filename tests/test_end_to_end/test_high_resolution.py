"""Configs for large images in the libraries' own tools, on miniatures in the real layouts.

Sizes are shrunk through options alone.
"""

import mmcv
import mmdet
import mmseg
import numpy as np
import pytest
from end_to_end import CONFIGS, ONE_PROCESS, SHORT_DETECTION, STOCK, run, scores, train
from shapes import CLASS_IDS

pytestmark = pytest.mark.e2e

SIDE = '(128,128)'
CITYSCAPES = [
    'msvit/segmenter_msvit-s_linear_8xb2-80k',
    'msvit/segmenter_msvit-s-windowed_linear_8xb2-80k',
    'dge/fpn_dge-pvt-s_8xb2-80k',
    'merge/segmenter_merge-vit-s-dinov3_linear_8xb2-80k',
]
COCO = [
    'msvit/mask-rcnn_msvit-s_sfp_8xb2-lsj-100e',
    'dge/mask-rcnn_dge-pvt-s_fpn_8xb2-1x',
    'merge/mask-rcnn_merge-vit-s-dinov3_sfp_8xb2-1x',
]


@pytest.fixture(scope='session')
def cityscapes(workspace):
    """Adds ``data/cityscapes``: the embedded scenes, whose classes become the first ones."""
    train_ids = np.full(256, 255, np.uint8)
    train_ids[[1, *CLASS_IDS.values()]] = range(len(CLASS_IDS) + 1)  # 1 is the wall
    scenes = workspace / 'data' / 'ade' / 'ADEChallengeData2016'
    for split, scenes_of in (('train', 'training'), ('val', 'validation')):
        for path in sorted((scenes / 'images' / scenes_of).glob('*.jpg')):
            labels = mmcv.imread(
                scenes / 'annotations' / scenes_of / f'{path.stem}.png', 'unchanged'
            )
            frame = f'{split}/bonn/bonn_{path.stem}'
            root = workspace / 'data' / 'cityscapes'
            mmcv.imwrite(mmcv.imread(path), str(root / f'leftImg8bit/{frame}_leftImg8bit.png'))
            target = root / f'gtFine/{frame}_gtFine_labelTrainIds.png'
            mmcv.imwrite(train_ids[labels], str(target))
    return workspace


def pipelines(scale, train_dataset='train_dataloader.dataset'):
    """Options that set the scale of the pipelines of a config."""
    splits = (f'{train_dataset}.pipeline.2', 'val_dataloader.dataset.pipeline.1',
              'test_dataloader.dataset.pipeline.1')  # fmt: skip
    return [f'{transform}.scale={scale}' for transform in splits]


@pytest.mark.parametrize('name', CITYSCAPES, ids=lambda name: name.split('/')[1])
def test_cityscapes(cityscapes, name):
    config = CONFIGS / f'{name}_cityscapes-1024x1024.py'
    options = [
        *ONE_PROCESS, *pipelines('(256,128)'), 'model.backbone.init_cfg=None',
        f'model.data_preprocessor.size={SIDE}',
        f'train_dataloader.dataset.pipeline.3.crop_size={SIDE}',
        'train_cfg.max_iters=1', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=1',
    ]  # fmt: skip
    if name.startswith('dge'):
        options.append('model.decode_head.norm_cfg.type=BN')
    else:
        options += [f'model.test_cfg.crop_size={SIDE}', 'model.test_cfg.stride=(96,96)']
    checkpoint, _ = train(cityscapes, STOCK[mmseg] / 'train.py', config, options)
    output = run(cityscapes, STOCK[mmseg] / 'test.py', config, checkpoint, options=options)
    assert scores(output, 'mIoU') and '| traffic light |' in output


@pytest.mark.parametrize('name', COCO, ids=lambda name: name.split('/')[1])
def test_coco(workspace, name):
    config = CONFIGS / f'{name}_coco-1280x1280.py'
    options = [
        *ONE_PROCESS, *SHORT_DETECTION, 'model.backbone.init_cfg=None',
        'train_cfg.val_interval=2', 'test_dataloader.dataset.indices=2',
        'model.test_cfg.rcnn.max_per_img=10', 'model.test_cfg.rpn.max_per_img=20',
    ]  # fmt: skip
    dataset = 'train_dataloader.dataset'
    if 'lsj' in name:
        options += [
            'train_dataloader.dataset.times=1', f'{dataset}.dataset.pipeline.3.crop_size={SIDE}',
            f'model.data_preprocessor.batch_augments.0.size={SIDE}',
        ]  # fmt: skip
        dataset += '.dataset'
    options += [*pipelines(SIDE, dataset), f'{dataset}.indices=2']
    checkpoint, _ = train(workspace, STOCK[mmdet] / 'train.py', config, options)
    output = run(workspace, STOCK[mmdet] / 'test.py', config, checkpoint, options=options)
    assert scores(output, 'coco/bbox_mAP') and scores(output, 'coco/segm_mAP')
