"""Training and testing through the libraries' own tools, as a user runs them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mmcv
import mmdet
import mmseg
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from shapes import CLASS_IDS

from mmtoken.backbones import STViTRSwin

# In one process, since they share what they train
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group('e2e')]

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / 'configs'
STOCK = {library: Path(library.__file__).parent / '.mim' / 'tools' for library in (mmdet, mmseg)}
SHAPES_DETECTOR = CONFIGS / 'shapes' / 'mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'
SHAPES_SEGMENTER = CONFIGS / 'shapes' / 'upernet_stvit-r-swin-nano_1xb16-750i_shapes-128x128.py'
DGE_DETECTOR = CONFIGS / 'shapes' / 'mask-rcnn_dge-pvt-nano_fpn_1xb8-3e_shapes.py'
DGE_SEGMENTER = CONFIGS / 'shapes' / 'fpn_dge-pvt-nano_1xb16-300i_shapes-128x128.py'
MSVIT_DETECTOR = CONFIGS / 'shapes' / 'mask-rcnn_msvit-nano_sfp_1xb8-3e_shapes.py'
MSVIT_SEGMENTER = CONFIGS / 'shapes' / 'fpn_msvit-nano_1xb16-300i_shapes-128x128.py'
SWAT_DETECTOR = CONFIGS / 'shapes' / 'mask-rcnn_swat-swin-nano_fpn_1xb8-5e_shapes.py'
SWAT_SEGMENTER = CONFIGS / 'shapes' / 'fpn_swat-deit-nano_1xb16-500i_shapes-128x128.py'
PSVIT_DETECTOR = CONFIGS / 'shapes' / 'mask-rcnn_psvit-nano_fpn_1xb8-5e_shapes.py'
PSVIT_SEGMENTER = CONFIGS / 'shapes' / 'fpn_psvit-nano_1xb16-500i_shapes-128x128.py'
COCO = CONFIGS / 'stvit_r' / 'mask-rcnn_stvit-r-swin-t_fpn_8xb2-1x_coco.py'
IMAGENET = CONFIGS / 'stvit_r' / 'stvit-r-swin-tiny_16xb64_in1k.py'
ADE20K = CONFIGS / 'stvit_r' / 'upernet_stvit-r-swin-t_8xb2-160k_ade20k-512x512.py'

# What the miniature COCO calls the classes of the embedded data set.
COCO_NAMES = dict(
    lamp='umbrella', box='suitcase', bottle='bottle', ball='sports ball', fan='scissors',
    plate='frisbee', clock='clock', flag='kite',
)  # fmt: skip
COCO_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]

ONE_PROCESS = [
    f'{split}_dataloader.{key}'
    for split in ('train', 'val', 'test')
    for key in ('num_workers=0', 'persistent_workers=False')
] + ['randomness.seed=0']
# After so few steps no score is high, and without any detection mmdet reports no AP at all.
ANY_SCORE = 'model.test_cfg.rcnn.score_thr=0.0'
SHORT_DETECTION = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1', ANY_SCORE]
SHORT_SEGMENTATION = [
    'train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2',
]  # fmt: skip

FROM_SCRATCH = 'load_from=None'


@pytest.fixture(scope='module')
def workspace(shapes_root, tmp_path_factory):
    """A folder with ``data/shapes``, ``data/coco`` and ``data/ade``, as the configs expect them."""
    root = tmp_path_factory.mktemp('workspace')
    shutil.copytree(shapes_root, root / 'data' / 'shapes')
    shutil.copytree(shapes_root / 'ade', root / 'data' / 'ade')  # its ids are ADE20K's already
    shutil.copytree(shapes_root / 'coco', root / 'data' / 'coco')
    names = CocoDataset.METAINFO['classes']
    id_of = dict(zip(names, COCO_IDS, strict=True))
    new_id = {CLASS_IDS[ours]: id_of[theirs] for ours, theirs in COCO_NAMES.items()}
    for path in (root / 'data' / 'coco' / 'annotations').glob('*.json'):
        content = json.loads(path.read_text())
        content['categories'] = [dict(id=id_of[name], name=name) for name in names]
        for annotation in content['annotations']:
            annotation['category_id'] = new_id[annotation['category_id']]
        path.write_text(json.dumps(content))
    return root


def run(workspace, tool, *args, options=()):
    """Run a Python tool in the workspace; its output."""
    command = [sys.executable, tool, *args]
    if options:
        command += ['--cfg-options', *options]
    result = subprocess.run(
        list(map(str, command)), cwd=workspace, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def scores(output, name):
    return [float(value) for value in re.findall(rf'\b{name}: +([-\d.]+)', output)]


def train(workspace, tool, config, options):
    work_dir = workspace / 'work_dirs' / config.stem
    output = run(workspace, tool, config, '--work-dir', work_dir, options=options)
    return Path((work_dir / 'last_checkpoint').read_text()), output


@pytest.fixture(scope='module')
def detector(workspace):
    options = [*ONE_PROCESS, *SHORT_DETECTION]
    return train(workspace, ROOT / 'tools' / 'train.py', SHAPES_DETECTOR, options)


@pytest.fixture(scope='module')
def segmenter(workspace):
    options = [*ONE_PROCESS, *SHORT_SEGMENTATION, 'train_dataloader.batch_size=4']
    return train(workspace, ROOT / 'tools' / 'train.py', SHAPES_SEGMENTER, options)


def test_detector_is_trained_and_tested(workspace, detector):
    checkpoint, output = detector
    assert scores(output, 'coco/bbox_mAP') and scores(output, 'coco/segm_mAP')
    output = run(
        workspace, ROOT / 'tools' / 'test.py', SHAPES_DETECTOR, checkpoint,
        '--show-dir', 'drawn', options=[*ONE_PROCESS, ANY_SCORE],
    )  # fmt: skip
    assert scores(output, 'coco/bbox_mAP') and scores(output, 'coco/segm_mAP')
    assert list(workspace.glob('work_dirs/**/drawn/*.jpg'))


@pytest.fixture(scope='module')
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
    return train(workspace, ROOT / 'tools' / 'train.py', IMAGENET, [*ONE_PROCESS, *short])


def test_classifier_is_trained_and_becomes_a_detector(workspace, classifier):
    checkpoint, output = classifier
    assert scores(output, 'accuracy/top5')
    tested = run(workspace, ROOT / 'tools' / 'test.py', IMAGENET, checkpoint, options=ONE_PROCESS)
    assert scores(tested, 'accuracy/top5') == scores(output, 'accuracy/top5')
    init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    backbone = STViTRSwin('tiny', init_cfg=init_cfg)
    backbone.init_weights()
    trained = torch.load(checkpoint, weights_only=False)['state_dict']
    for name, value in backbone.state_dict().items():
        if not name.startswith(('norm0', 'norm1', 'norm2')):
            assert torch.equal(value, trained[f'backbone.{name}']), name


def test_segmenter_is_trained_and_tested(workspace, segmenter):
    checkpoint, output = segmenter
    assert scores(output, 'mIoU')
    tested = run(
        workspace, ROOT / 'tools' / 'test.py', SHAPES_SEGMENTER, checkpoint, options=ONE_PROCESS
    )
    assert scores(tested, 'mIoU') == scores(output, 'mIoU')
    for name in ('wall', 'lamp', 'box', 'bottle', 'ball', 'fan', 'plate', 'clock', 'flag'):
        assert re.search(rf'\| +{name} +\|', tested)


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
    print(re.findall(r'coco/bbox_mAP.*', output)[-1])
    assert scores(output, 'coco/bbox_mAP') and scores(output, 'coco/segm_mAP')


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
    assert scores(output, 'mIoU')
    slide = ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(96,96)',
             'model.test_cfg.stride=(64,64)']  # fmt: skip
    for test_options in (options, options + slide):
        output = run(workspace, STOCK[mmseg] / 'test.py', ADE20K, checkpoint, options=test_options)
        print(re.findall(r'mIoU: .*', output)[-1])
        assert scores(output, 'mIoU')


def test_test_time_augmentation(workspace, detector, segmenter):
    # mmdet's test-time augmentation merges boxes, and refuses models that give masks.
    boxes_only = ['model.roi_head.mask_head=None', 'model.roi_head.mask_roi_extractor=None',
                  'test_evaluator.metric=bbox', ANY_SCORE]  # fmt: skip
    output = run(
        workspace, STOCK[mmdet] / 'test.py', SHAPES_DETECTOR, detector[0], '--tta',
        options=[*ONE_PROCESS, *boxes_only],
    )  # fmt: skip
    assert scores(output, 'coco/bbox_mAP')
    output = run(
        workspace, STOCK[mmseg] / 'test.py', SHAPES_SEGMENTER, segmenter[0], '--tta',
        options=ONE_PROCESS,
    )  # fmt: skip
    assert scores(output, 'mIoU')


def test_resume(workspace, detector):
    output = run(
        workspace, STOCK[mmdet] / 'train.py', SHAPES_DETECTOR, '--resume', detector[0],
        '--work-dir', 'work_dirs/resumed',
        options=[*ONE_PROCESS, 'train_cfg.max_epochs=2', 'train_cfg.val_interval=9'],
    )  # fmt: skip
    assert 'resumed epoch: 1' in output
    assert (workspace / 'work_dirs' / 'resumed' / 'epoch_2.pth').is_file()


def test_detection_inference(workspace, detector):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    image = sorted((workspace / 'data/shapes/coco/val2017').glob('*.jpg'))[0]
    checkpoint = str(detector[0])
    model = init_detector(str(SHAPES_DETECTOR), checkpoint, device='cpu')
    assert model.dataset_meta['classes'][0] == 'lamp'
    sample = inference_detector(model, str(image))
    assert sample.pred_instances.masks.shape[1:] == mmcv.imread(image).shape[:2]

    inferencer = DetInferencer(str(SHAPES_DETECTOR), checkpoint, device='cpu')
    result = inferencer(str(image), out_dir=str(workspace / 'inferred'), pred_score_thr=0.0)
    assert set(result['predictions'][0]) >= {'bboxes', 'labels', 'scores', 'masks'}
    assert (workspace / 'inferred' / 'vis' / image.name).is_file()


def test_segmentation_inference(workspace, segmenter):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    image = sorted((workspace / 'data/shapes/ade').glob('**/validation/*.jpg'))[0]
    shape = mmcv.imread(image).shape[:2]
    model = init_model(str(SHAPES_SEGMENTER), str(segmenter[0]), device='cpu')
    assert model.dataset_meta['classes'][0] == 'wall'
    assert inference_model(model, str(image)).pred_sem_seg.data.shape[1:] == shape

    inferencer = MMSegInferencer(str(SHAPES_SEGMENTER), str(segmenter[0]), device='cpu')
    result = inferencer(str(image), out_dir=str(workspace / 'segmented'))
    assert np.asarray(result['predictions']).shape == shape
    assert list((workspace / 'segmented' / 'vis').iterdir())


@pytest.mark.parametrize(
    'library, config', [(mmdet, SHAPES_DETECTOR), (mmseg, SHAPES_SEGMENTER)],
    ids=['mmdet', 'mmseg'],
)  # fmt: skip
def test_browse_dataset_and_print_config(library, config, workspace):
    out = workspace / f'browsed_{library.__name__}'
    run(workspace, STOCK[library] / 'analysis_tools' / 'browse_dataset.py', config,
        '--output-dir', out, '--not-show')  # fmt: skip
    assert len(list(out.glob('**/*.*'))) >= 4
    printed = run(workspace, STOCK[library] / 'misc' / 'print_config.py', config)
    assert "type='mmtoken.STViTRSwin'" in printed


def test_labels_reach_the_segmenter_as_meant(workspace):
    """ADE20K's ids become classes 0 to 8, and the unlabelled specks are ignored."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    cfg = Config.fromfile(SHAPES_SEGMENTER).val_dataloader.dataset
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


@pytest.fixture(scope='module')
def grained_detector(workspace):
    """Trained with accumulated gradients and averaged weights; the budget warms up."""
    options = [
        *ONE_PROCESS, *SHORT_DETECTION, 'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1', 'default_hooks.ema.type=EMAHook',
        'optim_wrapper.accumulative_counts=2', 'model.backbone.budget.warmup_iters=8', FROM_SCRATCH,
    ]  # fmt: skip
    return *train(workspace, STOCK[mmdet] / 'train.py', DGE_DETECTOR, options), options


def test_token_losses_are_ordinary_losses(workspace, grained_detector):
    _, output, _ = grained_detector
    logs = (workspace / 'work_dirs' / DGE_DETECTOR.stem).glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    assert len(steps) == 4 and scores(output, 'coco/bbox_mAP')
    for step in steps:
        losses = [value for name, value in step.items() if 'loss' in name and name != 'loss']
        assert step['loss'] == pytest.approx(sum(losses), rel=1e-4)
        assert all(0 < step[f'query_ratio_s{i}'] <= 1 for i in range(4))
        assert 0 < step['budget_ratio'] <= 1
    # The log smooths over the steps so far; the budget's weight begins at 0.
    assert steps[0]['loss_budget'] == 0 < steps[-1]['loss_budget']


def test_grained_detector_resumes_and_is_tested(workspace, grained_detector):
    checkpoint, output, options = grained_detector
    saved = torch.load(checkpoint, weights_only=False)
    assert saved['state_dict']['backbone.budget.iterations'] == 4
    resumed = run(
        workspace, STOCK[mmdet] / 'train.py', DGE_DETECTOR, '--resume', checkpoint,
        '--work-dir', 'work_dirs/grained', options=[*options, 'train_cfg.max_epochs=2'],
    )  # fmt: skip
    assert 'resumed epoch: 1' in resumed
    saved = torch.load(workspace / 'work_dirs/grained/epoch_2.pth', weights_only=False)
    assert saved['state_dict']['backbone.budget.iterations'] == 8
    tested = run(workspace, STOCK[mmdet] / 'test.py', DGE_DETECTOR, checkpoint, options=options)
    assert scores(tested, 'coco/bbox_mAP') == scores(output, 'coco/bbox_mAP')


@pytest.mark.parametrize(
    'config',
    [DGE_SEGMENTER, MSVIT_SEGMENTER, SWAT_SEGMENTER, PSVIT_SEGMENTER],
    ids=['dge', 'msvit', 'swat', 'psvit'],
)
def test_other_segmenters(workspace, config):
    options = [*ONE_PROCESS, *SHORT_SEGMENTATION, 'train_dataloader.batch_size=4', FROM_SCRATCH]
    checkpoint, output = train(workspace, STOCK[mmseg] / 'train.py', config, options)
    assert scores(output, 'mIoU')
    output = run(
        workspace, STOCK[mmseg] / 'test.py', config, checkpoint, '--tta', options=ONE_PROCESS
    )
    assert scores(output, 'mIoU')


def test_mixed_scale_detector(workspace):
    """Trained with learning rates by layer and averaged weights."""
    options = [
        *ONE_PROCESS, *SHORT_DETECTION, 'train_dataloader.batch_size=2', FROM_SCRATCH,
        'default_hooks.logger.interval=1', 'default_hooks.ema.type=EMAHook',
        'optim_wrapper.constructor=mmtoken.LayerDecayOptimWrapperConstructor',
        'optim_wrapper.paramwise_cfg.layer_decay_rate=0.7',
    ]  # fmt: skip
    checkpoint, output = train(workspace, STOCK[mmdet] / 'train.py', MSVIT_DETECTOR, options)
    assert 'backbone 7' in output and re.search(r'loss_gate: [\d.]+  coarse_ratio: [\d.]+', output)
    tested = run(workspace, STOCK[mmdet] / 'test.py', MSVIT_DETECTOR, checkpoint, options=options)
    assert scores(tested, 'coco/bbox_mAP') == scores(output, 'coco/bbox_mAP')


@pytest.mark.parametrize('config', [SWAT_DETECTOR, PSVIT_DETECTOR], ids=['swat', 'psvit'])
def test_detectors_without_losses_of_tokens(workspace, config):
    options = [*ONE_PROCESS, *SHORT_DETECTION, 'train_dataloader.batch_size=4']
    checkpoint, output = train(workspace, STOCK[mmdet] / 'train.py', config, options)
    tested = run(workspace, STOCK[mmdet] / 'test.py', config, checkpoint, options=options)
    assert scores(tested, 'coco/segm_mAP') == scores(output, 'coco/segm_mAP') != []


def test_forgotten_hook_is_an_error(workspace):
    command = [
        sys.executable, ROOT / 'tools' / 'train.py', DGE_SEGMENTER, '--work-dir', 'nowhere',
        '--cfg-options', *ONE_PROCESS, *SHORT_SEGMENTATION, FROM_SCRATCH, 'custom_hooks=[]',
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), cwd=workspace, capture_output=True, text=True)
    assert result.returncode != 0 and "dict(type='mmtoken.TokenLossHook')" in result.stderr
