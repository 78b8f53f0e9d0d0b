"""Every backbone under the libraries' own detectors and segmentors, and the checks these run."""

import pytest
import torch
from families import FAMILIES
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmtoken import token_losses
from mmtoken.analysis.configs import load_config

SIDE = 128
WIDTH = 32  # channels of the maps that a pyramid makes from a plain one
SCALES = (4.0, 2.0, 1.0, 0.5)
# The library's config, and as few of its layers, queries and proposals as show a mistake
PROPOSALS = {'model.test_cfg.rpn.max_per_img': 20, 'model.train_cfg.rpn_proposal.max_per_img': 20}
DETECTORS = {
    'retinanet/retinanet_r50_fpn_1x_coco.py': {},
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': PROPOSALS,
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': PROPOSALS,
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': PROPOSALS,
    'atss/atss_r50_fpn_1x_coco.py': {},
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py': {},
    'dino/dino-4scale_r50_8xb2-12e_coco.py': {
        'model.num_queries': 20,
        'model.encoder.num_layers': 1,
        'model.decoder.num_layers': 2,
    },
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': {
        'model.data_preprocessor.batch_augments': None,  # which pads to 1024 x 1024
        'model.panoptic_head.num_queries': 20,
        'model.train_cfg.num_points': 256,
        'model.panoptic_head.pixel_decoder.encoder.num_layers': 1,
        'model.panoptic_head.transformer_decoder.num_layers': 1,
    },
}
SEGMENTORS = {
    'sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py': {},
    'upernet/upernet_r50_4xb4-160k_ade20k-512x512.py': {
        'model.decode_head.channels': 64,
        'model.auxiliary_head.channels': 64,
    },
    'segmenter/segmenter_vit-s_mask_8xb1-160k_ade20k-512x512.py': {},
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': {},
    'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py': {
        'model.decode_head.num_queries': 20,
        'model.decode_head.train_cfg.num_points': 256,
        'model.decode_head.pixel_decoder.encoder.num_layers': 1,
        'model.decode_head.transformer_decoder.num_layers': 1,
    },
}
pytestmark = pytest.mark.filterwarnings('ignore')


def build(path, changes, name):
    """A library's model on one of our backbones."""
    cfg = load_config(path)
    cfg.merge_from_dict(changes)
    init_default_scope(cfg.default_scope)
    model = cfg.model
    model.pop('pretrained', None)
    heads = ('panoptic_head', 'decode_head', 'auxiliary_head')
    takers = [model[part] for part in (['neck'] if 'neck' in model else heads) if part in model]
    first = takers[0].in_channels
    model.backbone, pyramid, channels = maps_of(name, len(first) if isinstance(first, list) else 1)
    for taker in takers:
        one = not isinstance(taker.in_channels, list)
        taker.in_channels = channels[taker.get('in_index', -1)] if one else channels
    necks = [neck for neck in (pyramid, model.get('neck')) if neck is not None]
    if necks:
        model.neck = necks
    torch.manual_seed(0)
    built = revert_sync_batchnorm(MODELS.build(model))
    built.init_weights()
    return built


def maps_of(name, number):
    """Config of a backbone with some maps, of the neck that makes them, and their channels.

    They are the last ones of the strides 4, 8, 16 and 32, a single one any.
    """
    config = dict(type=f'mmtoken.{name}', **FAMILIES[name].variants[0])
    if number == 1:
        config['out_indices'] = (FAMILIES[name].num_stages - 1,)
    elif len(set(FAMILIES[name].strides)) == 1:
        width = config['arch']['embed_dims']
        pyramid = dict(
            type='mmtoken.SimpleFeaturePyramid', in_channels=width, out_channels=WIDTH,
            scales=SCALES[-number:], num_outs=number,
        )  # fmt: skip
        return config, pyramid, [WIDTH] * number
    elif name == 'PSViT':
        config['finest_map'] = number == 4
    else:
        config['out_indices'] = tuple(range(4 - number, 4))
    return config, None, list(MODELS.build(config).out_channels)


def check_gradients(model, losses):
    """The sum of the losses is finite and reaches every parameter of the backbone."""
    total = sum(
        torch.stack(value).sum() if isinstance(value, list) else value.sum()
        for key, value in losses.items()
        if 'loss' in key
    )
    assert torch.isfinite(total)
    total.backward()
    for key, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('path', DETECTORS, ids=lambda path: path.split('/')[1].split('_')[0])
def test_detector(path, name):
    from mmdet.testing import demo_mm_inputs

    model = build(f'mmdet::{path}', DETECTORS[path], name)
    sizes = [(3, SIDE, SIDE), (3, SIDE - 3, SIDE - 40)]
    if 'rtmdet' in path:  # which does not pad masks
        sizes[1] = sizes[0]
    data = demo_mm_inputs(2, sizes, num_items=[2, 0], with_mask=True)
    with token_losses() as published:
        batch = model.data_preprocessor(data, True)
        losses = model(**batch, mode='loss')
    check_gradients(model, losses | dict(published))
    model.eval()
    with torch.no_grad():
        batch = model.data_preprocessor(demo_mm_inputs(2, sizes), False)
        results = model(**batch, mode='predict')
        model(batch['inputs'], batch['data_samples'], mode='tensor')
    assert len(results) == 2
    for result in results:
        assert torch.isfinite(result.pred_instances.bboxes).all()


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('path', SEGMENTORS, ids=lambda path: path.split('/')[0])
def test_segmentor(path, name):
    from mmseg.structures import SegDataSample

    model = build(f'mmseg::{path}', SEGMENTORS[path], name)
    shape = (SIDE, SIDE + 32)
    labels = torch.randint(150, (2, 1, *shape))
    meta = dict(ori_shape=shape, img_shape=shape, pad_shape=shape)
    samples = [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label)) for label in labels]
    images = torch.rand(2, 3, *shape)
    with token_losses() as published:
        losses = model(images, samples, mode='loss')
    check_gradients(model, losses | dict(published))
    model.eval()
    model.test_cfg.mode = 'whole'
    with torch.no_grad():
        results = model(images, samples, mode='predict')
    assert [result.pred_sem_seg.data.shape for result in results] == [(1, *shape)] * 2
