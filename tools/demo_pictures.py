"""Pictures of the demo: what its models see in scenes they were not trained on."""

from itertools import islice
from pathlib import Path

import mmcv
import numpy as np
from torch import Tensor

SCALE = 3  # the scenes are small; enlarged, outlines and names can be read
NUM_SCENES = 6


def draw_detections(run, data: Path, out: Path) -> Path:
    """Scenes beside their detections and masks, into ``detections.png``."""
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS
    from mmengine.registry import init_default_scope

    model = init_detector(str(run.config), str(run.checkpoint), device='cpu')
    init_default_scope('mmdet')
    visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='demo_detections'))
    visualizer.dataset_meta = model.dataset_meta
    rows = []
    for path in scenes(data / 'coco' / 'val2017'):
        predicted = inference_detector(model, str(path)).cpu()
        instances = predicted.pred_instances
        instances.bboxes = instances.bboxes * SCALE
        instances.masks = enlarged(instances.masks)
        image = enlarged_image(path)
        visualizer.add_datasample(
            'scene', image, predicted, draw_gt=False, pred_score_thr=0.5, show=False
        )
        rows.append(np.hstack([image, visualizer.get_image()]))
    return save_sheet(rows, out / 'detections.png')


def draw_segmentations(run, data: Path, out: Path) -> Path:
    """Scenes beside their segmentation, into ``segmentations.png``."""
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.apis import inference_model, init_model
    from mmseg.registry import VISUALIZERS

    model = init_model(str(run.config), str(run.checkpoint), device='cpu')
    init_default_scope('mmseg')
    visualizer = VISUALIZERS.build(
        dict(type='SegLocalVisualizer', name='demo_segmentations', alpha=0.6)
    )
    visualizer.dataset_meta = model.dataset_meta
    rows = []
    for path in scenes(data / 'ade' / 'ADEChallengeData2016' / 'images' / 'validation'):
        predicted = inference_model(model, str(path)).cpu()
        predicted.pred_sem_seg = PixelData(data=enlarged(predicted.pred_sem_seg.data))
        image = enlarged_image(path)
        visualizer.add_datasample('scene', image, predicted, draw_gt=False, show=False)
        rows.append(np.hstack([image, visualizer.get_image()]))
    return save_sheet(rows, out / 'segmentations.png')


def scenes(folder: Path) -> list[Path]:
    """The first scenes of a folder in landscape orientation."""
    landscape = (
        path for path in sorted(folder.glob('*.jpg')) if np.argmax(mmcv.imread(path).shape[:2])
    )
    return list(islice(landscape, NUM_SCENES))


def enlarged(maps: Tensor) -> Tensor:
    """Repeat pixels: ``(N, H, W) -> (N, SCALE * H, SCALE * W)``."""
    return maps.repeat_interleave(SCALE, dim=1).repeat_interleave(SCALE, dim=2)


def enlarged_image(path: Path) -> np.ndarray:
    """An image in RGB, ``(SCALE * H, SCALE * W, 3)``."""
    image = mmcv.imread(path, channel_order='rgb')
    return mmcv.imrescale(image, float(SCALE), interpolation='bicubic')


def save_sheet(rows: list[np.ndarray], path: Path) -> Path:
    """Two scenes a row, with a white gap."""
    gap = np.full((rows[0].shape[0], 12, 3), 255, np.uint8)
    pairs = [np.hstack([a, gap, b]) for a, b in zip(rows[::2], rows[1::2], strict=False)]
    mmcv.imwrite(mmcv.rgb2bgr(np.vstack(pairs)), str(path))
    return path
