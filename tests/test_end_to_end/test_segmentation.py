"""Segmenters of our configs in mmseg's own tools, and a classifier in mmpretrain's."""

import re
import shutil

import mmcv
import mmseg
import numpy as np
import pytest
import torch
from end_to_end import (
    CONFIGS,
    FROM_SCRATCH,
    ONE_PROCESS,
    SHORT_SEGMENTATION,
    STOCK,
    TEST,
    TRAIN,
    run,
    run_tool,
    scores,
    train,
)
from shapes import CLASS_IDS

from mmtoken.backbones import STViTRSwin

pytestmark = pytest.mark.e2e

SHAPES = CONFIGS / 'shapes'
STVIT = SHAPES / 'upernet_stvit-r-swin-nano_1xb16-750i_shapes-128x128.py'
DGE = SHAPES / 'fpn_dge-pvt-nano_1xb16-300i_shapes-128x128.py'
MSVIT = SHAPES / 'fpn_msvit-nano_1xb16-300i_shapes-128x128.py'
SWAT = SHAPES / 'fpn_swat-deit-nano_1xb16-500i_shapes-128x128.py'
PSVIT = SHAPES / 'fpn_psvit-nano_1xb16-500i_shapes-128x128.py'
ADE20K = CONFIGS / 'stvit_r' / 'upernet_stvit-r-swin-t_8xb2-160k_ade20k-512x512.py'
IMAGENET = CONFIGS / 'stvit_r' / 'stvit-r-swin-tiny_16xb64_in1k.py'


@pytest.fixture(scope='session')
def segmenter(workspace):
    options = [*ONE_PROCESS, *SHORT_SEGMENTATION, 'train_dataloader.batch_size=4']
    return train(workspace, TRAIN, STVIT, options)


def test_segmenter_is_trained_and_tested(workspace, segmenter):
    checkpoint, output = segmenter
    assert scores(output, 'mIoU')
    tested = run(workspace, TEST, STVIT, checkpoint, options=ONE_PROCESS)
    assert scores(tested, 'mIoU') == scores(output, 'mIoU')
    for name in ('wall', 'lamp', 'box', 'bottle', 'ball', 'fan', 'plate', 'clock', 'flag'):
        assert re.search(rf'\| +{name} +\|', tested)


def test_real_ade20k_config(workspace):
    """ADE20K's layout and all 150 classes, tested on whole images and by sliding a window."""
    options = [
        *ONE_PROCESS, *SHORT_SEGMENTATION,
        'model.data_preprocessor.size=(128,128)',
        'model.decode_head.norm_cfg.type=BN', 'model.auxiliary_head.norm_cfg.type=BN',
        'train_dataloader.dataset.pipeline.2.scale=(704,128)',
        'train_dataloader.dataset.pipeline.3.crop_size=(128,128)',
        'val_dataloader.dataset.pipeline.1.scale=(704,128)',
        'test_dataloader.dataset.pipeline.1.scale=(704,128)',
    ]  # fmt: skip
    checkpoint, output = train(workspace, STOCK[mmseg] / 'train.py', ADE20K, options)
    assert scores(output, 'mIoU')  # of whole images
    slide = ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(96,96)',
             'model.test_cfg.stride=(64,64)']  # fmt: skip
    output = run(
        workspace, STOCK[mmseg] / 'test.py', ADE20K, checkpoint, options=[*options, *slide]
    )
    assert scores(output, 'mIoU')


def test_test_time_augmentation(workspace, segmenter):
    output = run(
        workspace, STOCK[mmseg] / 'test.py', STVIT, segmenter[0], '--tta', options=ONE_PROCESS
    )
    assert scores(output, 'mIoU')


def test_inference(workspace, segmenter):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    image = sorted((workspace / 'data/shapes/ade').glob('**/validation/*.jpg'))[0]
    shape = mmcv.imread(image).shape[:2]
    model = init_model(str(STVIT), str(segmenter[0]), device='cpu')
    assert model.dataset_meta['classes'][0] == 'wall'
    assert inference_model(model, str(image)).pred_sem_seg.data.shape[1:] == shape

    inferencer = MMSegInferencer(str(STVIT), str(segmenter[0]), device='cpu')
    result = inferencer(str(image), out_dir=str(workspace / 'segmented'))
    assert np.asarray(result['predictions']).shape == shape
    assert list((workspace / 'segmented' / 'vis').iterdir())


@pytest.mark.skipif(mmseg.__version__ == '1.2.2', reason='browse_dataset.py of mmseg 1.2.2 fails')
def test_browse_dataset(workspace):
    out = workspace / 'browsed_segmentation'
    run(workspace, STOCK[mmseg] / 'analysis_tools' / 'browse_dataset.py', STVIT,
        '--output-dir', out, '--not-show')  # fmt: skip
    assert len(list(out.glob('**/*.*'))) >= 4


def test_print_config(workspace):
    printed = run(workspace, STOCK[mmseg] / 'misc' / 'print_config.py', STVIT)
    assert "type='mmtoken.STViTRSwin'" in printed


def test_labels_reach_the_segmenter_as_meant(workspace):
    """ADE20K's ids become classes 0 to 8, and the unlabelled specks are ignored."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    cfg = Config.fromfile(STVIT).val_dataloader.dataset
    cfg.data_root = str(workspace / cfg.data_root)
    init_default_scope('mmseg')
    dataset = DATASETS.build(cfg)
    assert type(dataset).__name__ == 'ADE20KDataset'
    seen = set()
    for i, sample in enumerate(dataset):
        labels = sample['data_samples'].gt_sem_seg.data.numpy()
        raw = mmcv.imread(dataset[i]['data_samples'].seg_map_path, 'unchanged')
        assert ((raw == 0) == (labels[0] == 255)).all() and (raw == 0).any()
        assert ((raw == 1) == (labels[0] == 0)).all()
        for name, ade_id in CLASS_IDS.items():
            expected = dataset.metainfo['classes'].index(name)
            assert ((raw == ade_id) == (labels[0] == expected)).all()
        seen |= set(np.unique(labels))
        if i == len(dataset) - 1:
            break
    assert seen <= {*range(9), 255}


@pytest.mark.parametrize(
    'config', [DGE, MSVIT, SWAT, PSVIT], ids=['dge', 'msvit', 'swat', 'psvit']
)  # fmt: skip
def test_other_segmenters(workspace, config):
    options = [*ONE_PROCESS, *SHORT_SEGMENTATION, 'train_dataloader.batch_size=4', FROM_SCRATCH]
    checkpoint, output = train(workspace, STOCK[mmseg] / 'train.py', config, options)
    assert scores(output, 'mIoU')
    output = run(
        workspace, STOCK[mmseg] / 'test.py', config, checkpoint, '--tta', options=ONE_PROCESS
    )
    assert scores(output, 'mIoU')


def test_forgotten_hook_is_an_error(workspace):
    status, output = run_tool(
        workspace, TRAIN, DGE, '--work-dir', 'nowhere',
        options=[*ONE_PROCESS, *SHORT_SEGMENTATION, FROM_SCRATCH, 'custom_hooks=[]'],
    )  # fmt: skip
    assert status != 0 and "dict(type='mmtoken.TokenLossHook')" in output


@pytest.fixture(scope='session')
def classifier(workspace):
    """A classifier of the ImageNet config, on a few images in ImageNet's layout."""
    root = workspace / 'data' / 'imagenet'
    (root / 'meta').mkdir(parents=True)
    for split in ('train', 'val'):
        folder = root / split / 'n01440764'
        shutil.copytree(workspace / 'data' / 'coco' / f'{split}2017', folder)
        labelled = [f'{folder.name}/{f.name} {i}' for i, f in enumerate(sorted(folder.iterdir()))]
        (root / 'meta' / f'{split}.txt').write_text('\n'.join(labelled))
    short = [
        'train_cfg.max_epochs=1', 'train_dataloader.batch_size=4', 'param_scheduler.1.begin=0',
    ]  # fmt: skip
    return train(workspace, TRAIN, IMAGENET, [*ONE_PROCESS, *short])


def test_classifier_is_trained_and_becomes_a_backbone(workspace, classifier):
    checkpoint, output = classifier
    assert scores(output, 'accuracy/top5')
    tested = run(workspace, TEST, IMAGENET, checkpoint, options=ONE_PROCESS)
    assert scores(tested, 'accuracy/top5') == scores(output, 'accuracy/top5')
    init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    backbone = STViTRSwin('tiny', init_cfg=init_cfg)
    backbone.init_weights()
    trained = torch.load(checkpoint, weights_only=False)['state_dict']
    for name, value in backbone.state_dict().items():
        if not name.startswith(('norm0', 'norm1', 'norm2')):
            assert torch.equal(value, trained[f'backbone.{name}']), name
