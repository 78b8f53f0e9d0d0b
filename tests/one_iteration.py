"""One training iteration and one prediction of a config on noise, without data.

The model is that of the config, but without pretrained weights, with BN instead of SyncBN, and with
few proposals per image.
"""

import copy

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

from mmtoken import follow_image_sizes, token_losses
from mmtoken.arguments import entries_of, is_pretrained

HEIGHT, WIDTH = 64, 96
MAX_REGIONS = 32


def run(cfg: Config) -> tuple[int, float]:
    """One optimizer step and one prediction on a batch of noise.

    Returns:
        Parameters of the model, and the loss.

    Raises:
        ArithmeticError: The loss is not finite.
    """
    torch.manual_seed(0)
    model = build(cfg)
    model.init_weights()  # DINO's level embeddings are whatever is in memory before
    sample = SAMPLES[cfg.default_scope]
    batch = dict(
        inputs=[torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in range(2)],
        data_samples=[sample(model) for _ in range(2)],
    )
    model.train()
    data = model.data_preprocessor(batch, training=True)
    follow_image_sizes(model)  # as mmtoken.TokenLossHook does
    with token_losses() as published:
        losses = model(**data, mode='loss')
    loss, logs = model.parse_losses({**losses, **published})
    if not loss.isfinite():
        raise ArithmeticError(f'the loss is {loss.item()}: {dict(logs)}')
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    model.eval()
    model.test_step(batch)
    return sum(p.numel() for p in model.parameters()), loss.item()


def build(cfg: Config) -> torch.nn.Module:
    """The model of a config, without pretrained weights and for one CPU."""
    model = copy.deepcopy(cfg.model)
    # mmpretrain keeps it beside the model.
    model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    augments = model.data_preprocessor.get('batch_augments') or []
    for part in (model.data_preprocessor, *augments):
        if part.get('size'):
            part.size = (HEIGHT, WIDTH)
    without_weights(model)
    without_sync_bn(model)
    with_few_regions(model)
    init_default_scope(cfg.default_scope)
    return MODELS.build(model)


def without_weights(node) -> None:
    """Leave out the checkpoints that parts of a model start from."""
    if isinstance(node, dict) and any(map(is_pretrained, entries_of(node.get('init_cfg')))):
        node.pop('init_cfg')
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            without_weights(child)


def without_sync_bn(node) -> None:
    """Replace SyncBN, which cannot be trained on a CPU, by BN."""
    children = node.values() if isinstance(node, dict) else node
    for child in children:
        if isinstance(child, dict) and child.get('type') == 'SyncBN':
            child['type'] = 'BN'
        elif isinstance(child, (dict, list, tuple)):
            without_sync_bn(child)


def with_few_regions(node) -> None:
    """Limit the proposals of a detector: a thousand of noise would take most of the time."""
    if isinstance(node, dict):
        for key in ('max_per_img', 'max_per_image', 'num', 'num_queries'):  # num: samples of a head
            if isinstance(node.get(key), int):
                node[key] = min(node[key], MAX_REGIONS)
    children = node.values() if isinstance(node, dict) else node
    for child in children:
        if isinstance(child, (dict, list, tuple)):
            with_few_regions(child)


def detection_sample(model):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4.0, 4.0, 40.0, 48.0], [30.0, 12.0, 90.0, 60.0]])
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=meta())
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([0, 0]), masks=BitmapMasks(masks.numpy(), HEIGHT, WIDTH)
    )
    return sample


def segmentation_sample(model):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=meta())
    labels = torch.randint(model.num_classes, (1, HEIGHT, WIDTH))
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def classification_sample(model):
    from mmpretrain.structures import DataSample

    label = torch.randint(model.head.num_classes, ()).item()
    return DataSample(metainfo=meta()).set_gt_label(label)


def meta() -> dict:
    shape = (HEIGHT, WIDTH)
    return dict(
        img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
    )  # fmt: skip


SAMPLES = dict(mmdet=detection_sample, mmseg=segmentation_sample, mmpretrain=classification_sample)
