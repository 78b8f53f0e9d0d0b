"""A step of every backbone in two processes is one in a single process with the same images.

Each trains in a detector and in a segmentor, with the losses that it publishes, without
``find_unused_parameters``. Noise of routers is fixed for each image, so that choices do not depend
on the process, and batch norms are synchronized.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel, convert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import import_modules_from_strings
from torch import nn
from torch.distributed.nn.functional import all_reduce

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS)] * (str(TESTS) not in sys.path)
from families import FAMILIES, SMALL_VIT  # noqa: E402
from helpers import wake  # noqa: E402

from mmtoken.engine import TokenLossHook  # noqa: E402
from mmtoken.layers.common import routing  # noqa: E402

IMAGES, SIDE, CLASSES, DIMS = 4, 80, 5, 8
NORM = dict(type='GN', num_groups=2)  # batch norm would see other images in each process
LABELS = dict(type='mmtoken.LabelPurityLoss')
RATE = dict(type='mmtoken.CoarseRatioLoss', target_coarse_ratio=0.3)
BACKBONES = {
    **{name: dict(type=f'mmtoken.{name}', **family.small) for name, family in FAMILIES.items()},
    'MSViT, a rate': dict(
        type='mmtoken.MSViT', arch=SMALL_VIT, img_size=SIDE, gate=dict(loss=RATE, input='patches')
    ),
}
TAUGHT = {  # by labels, which segmentors have
    'DGEPVT, taught': BACKBONES['DGEPVT'] | dict(router=dict(query_ratio=0.5, label_loss=LABELS)),
    'MSViT, taught': BACKBONES['MSViT'] | dict(gate=dict(fine_ratio=0.5, label_loss=LABELS)),
}
CASES = [
    *((f'detector, {name}', cfg) for name, cfg in BACKBONES.items()),
    *((f'segmentor, {name}', cfg) for name, cfg in (BACKBONES | TAUGHT).items()),
]  # fmt: skip
# What is published of the images of all processes
GATHERED = ('loss_budget', 'budget_ratio', 'loss_gate')


def noise_of_images(images):
    """Gumbel noise that depends on the image alone, in place of that of the process."""

    def noise(scores):
        generator = torch.Generator().manual_seed(scores[0].numel())
        shape = IMAGES, *scores.shape[1:]
        uniform = torch.empty(shape).exponential_(generator=generator)
        return -uniform.log()[list(images)].to(scores)

    return noise


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """``SyncBatchNorm`` by its definition, for equal batches; PyTorch has it for GPUs alone."""

    def forward(self, x):
        mean, square = (
            all_reduce(moment.mean((0, 2, 3))) / dist.get_world_size() for moment in (x, x.square())
        )
        variance = square - mean.square()
        values = dist.get_world_size() * x.numel() / len(mean)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * values / (values - 1), self.momentum)
        mean, variance = mean[:, None, None], variance[:, None, None]
        x = (x - mean) * (variance + self.eps).rsqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def make_model(case, cfg):
    library = 'mmdet' if case.startswith('detector') else 'mmseg'
    import_modules_from_strings([f'{library}.models'])
    DefaultScope.get_instance(library, scope_name=library)
    torch.manual_seed(0)
    backbone = MODELS.build(dict(cfg, drop_path_rate=0.0))
    channels, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
    with DefaultScope.overwrite_default_scope(library):
        model = MODELS.build(globals()[f'{library}_config'](cfg, channels, strides))
    model.backbone = wake(backbone)
    return model.train()


def mmdet_config(cfg, channels, strides):
    """FCOS, whose losses are divided by the number of positives of all processes."""
    return dict(
        type='FCOS',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=cfg,
        neck=dict(type='FPN', in_channels=channels, out_channels=DIMS, num_outs=len(channels)),
        bbox_head=dict(
            type='FCOSHead', num_classes=CLASSES, in_channels=DIMS, feat_channels=DIMS,
            stacked_convs=1, norm_cfg=NORM, strides=strides,
            regress_ranges=[(-1, 1e8)] * len(strides),
        ),
    )  # fmt: skip


def mmseg_config(cfg, channels, strides):
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(SIDE, SIDE)),
        backbone=cfg,
        decode_head=dict(
            type='FCNHead', in_channels=channels, in_index=list(range(len(channels))),
            input_transform='resize_concat', channels=DIMS, num_convs=1, dropout_ratio=0.0,
            num_classes=CLASSES, norm_cfg=NORM,
        ),
        train_cfg={},
        test_cfg=dict(mode='whole'),
    )  # fmt: skip


def make_batch(case, images):
    """Images of one batch, and what is known of them."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator)
    corners = torch.randint(SIDE // 2, (IMAGES, 3, 2), generator=generator)
    sizes = torch.randint(8, SIDE // 2, (IMAGES, 3, 2), generator=generator)
    classes = torch.randint(CLASSES, (IMAGES, 3), generator=generator)
    size = dict(img_shape=(SIDE, SIDE), pad_shape=(SIDE, SIDE), scale_factor=(1.0, 1.0))
    samples = []
    for i in images:
        boxes = torch.cat([corners[i], corners[i] + sizes[i]], dim=1)
        if case.startswith('detector'):
            from mmdet.structures import DetDataSample

            found = InstanceData(bboxes=boxes.float(), labels=classes[i])
            samples.append(DetDataSample(gt_instances=found, metainfo=size))
        else:
            from mmseg.structures import SegDataSample

            labels = torch.zeros(1, SIDE, SIDE, dtype=torch.long)
            for (left, top, right, bottom), label in zip(boxes, classes[i], strict=True):
                labels[:, top:bottom, left:right] = label
            samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=size))
    return dict(inputs=[inputs[i] for i in images], data_samples=samples)


def train_step(case, model, images):
    """One step; what was logged, and the weights behind it."""
    routing.gumbel_noise = noise_of_images(images)
    TokenLossHook().before_train(SimpleNamespace(model=model))
    # A large step, so that weights show the gradients
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    logged = model.train_step(make_batch(case, images), optimizer)
    logged = {name: value.item() for name, value in logged.items()}
    return logged, getattr(model, 'module', model).state_dict()


def work(folder, rank):
    """One of two processes."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    nn.modules.batchnorm.SyncBatchNorm = CPUSyncBatchNorm  # which MMEngine looks up
    results = {}
    for case, cfg in CASES:
        model = convert_sync_batchnorm(make_model(case, cfg))
        model = MMDistributedDataParallel(model, find_unused_parameters=False)
        results[case] = train_step(case, model, range(rank, IMAGES, 2))
    torch.save(results, f'{folder}/{rank}.pth')
    del model  # torch 2.13 may hang if DDP is the last that holds the group
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """What both logged, and their weights."""
    folder = tmp_path_factory.mktemp('two_processes')
    commands = [[sys.executable, __file__, folder, str(rank)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    return [torch.load(folder / f'{rank}.pth') for rank in (0, 1)]


@pytest.mark.parametrize('case, cfg', CASES, ids=[case for case, _ in CASES])
def test_two_processes_are_one(case, cfg, two_processes, monkeypatch):
    monkeypatch.setattr(routing, 'gumbel_noise', routing.gumbel_noise)  # which a step replaces
    model = make_model(case, cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logged, weights = train_step(case, model, range(IMAGES))
    assert any((weights[name] - before[name]).abs().max() > 1e-3 for name in weights)
    (first, first_weights), (second, second_weights) = (part[case] for part in two_processes)
    torch.testing.assert_close(first_weights, weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second_weights, first_weights, rtol=0, atol=0)
    for name, value in logged.items():
        assert (first[name] + second[name]) / 2 == pytest.approx(value, rel=1e-4), name
    if cfg['type'] == 'mmtoken.DGEPVT' and cfg not in TAUGHT.values():
        assert logged['loss_budget'] > 0 and 0 < logged['query_ratio_s0'] < 1
    for name in logged.keys() & set(GATHERED):
        assert first[name] == pytest.approx(second[name], rel=1e-6), name


if __name__ == '__main__':
    work(Path(sys.argv[1]), int(sys.argv[2]))
