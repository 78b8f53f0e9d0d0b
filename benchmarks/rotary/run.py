"""Is a token of several patches better turned to their mean position, or by their mean rotation?"""

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms import v2

from mmtoken import routing_override
from mmtoken.analysis.environment import describe_environment
from mmtoken.backbones.merge_vit import MergeViT
from mmtoken.backbones.msvit import MSViT
from mmtoken.files import replacing
from mmtoken.layers.common.rotary import ROTARY, Rotation, grid_angles

DESCRIPTION = """\
Teach a ViT-S/14 whose positions are rotary, as in DINOv3, to give the features of one whose
positions are learned, from the weights of that one. Then reduce its tokens, with the rotation of a
coarse or merged token

  at the mean position   angles are averaged
  by the mean rotation   as the package does: cosines and sines are averaged

and print how far the features of all patches are from those of the full network: 1 - cosine
similarity, mean over patches and photographs. Written to benchmarks/rotary/results.json.
"""
RESULTS = Path(__file__).resolve().parent / 'results.json'
TRUNK = dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536)
ROTARY_TRUNK = dict(TRUNK, rotary='dinov3', pos_embed=False)
SIZE = (420, 280)  # of a photograph, height and width in pixels
CROP = 280
NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def main() -> int:
    """Teach, compare and write; return 0."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('photos', type=Path, help='a folder with JPEG files')
    parser.add_argument('weights', help="of ViT-S/14, such as DINOv2's")
    parser.add_argument('--steps', type=int, default=600, help='default: 600')
    parser.add_argument('--test', type=int, default=30, help='photographs (default: 30)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = sorted(args.photos.rglob('*.jpg'))
    random.Random(0).shuffle(files)
    test, train = files[: args.test], files[args.test :]
    student = make(MergeViT, ROTARY_TRUNK, merge_blocks=())
    teach(student, args.weights, train, args.steps)
    found = compare(student.eval(), test)
    with replacing(RESULTS) as new:
        environment = describe_environment(torch.device('cpu'))
        settings = dict(steps=args.steps, photos=len(test), size=SIZE)
        new.write_text(json.dumps(settings | dict(rows=found, environment=environment), indent=2))
    table = Table('tokens', 'at the mean position', 'by the mean rotation', box=SIMPLE_HEAD)
    for name, distances in found.items():
        table.add_row(name, *(f'{distance:.3f}' for distance in distances))
    Console().print(table)
    return 0


def make(network: type[nn.Module], arch: dict, **kwargs) -> nn.Module:
    """A ViT-S/14 with a class token."""
    sizes = dict(coarse_size=28, fine_size=14) if network is MSViT else dict(patch_size=14)
    return network(arch, **sizes, cls_token=True, layer_scale=1e-5, img_size=518, **kwargs)


def teach(student: nn.Module, weights: str, files: list[Path], steps: int) -> None:
    """Start from weights without their positions, and learn the features of the whole network."""
    init = dict(type='Pretrained', checkpoint=weights)
    teacher = make(MergeViT, TRUNK, merge_blocks=(), init_cfg=init).eval()
    teacher.init_weights()
    state = {name: x for name, x in teacher.state_dict().items() if name in student.state_dict()}
    student.load_state_dict(state)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, steps)
    augment = v2.Compose([v2.RandomCrop(CROP), v2.RandomHorizontalFlip()])
    for step in track(range(steps), 'Teaching'):
        images = torch.stack([augment(image[0]) for image in read(random.sample(files, 2))])
        with torch.autocast('cpu', torch.bfloat16):
            with torch.no_grad():
                wanted = teacher(images)[-1]
            loss = F.mse_loss(student(images)[-1].float(), wanted.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            similar = F.cosine_similarity(student(images)[-1], wanted.float()).mean()
            print(f'step {step}: loss {loss:.4f}, cosine similarity {similar:.4f}', flush=True)


@torch.no_grad()
def compare(student: nn.Module, files: list[Path]) -> dict[str, list[float]]:
    """Distances from the full network at the mean position and by the mean rotation."""
    mixed = make(MSViT, ROTARY_TRUNK)
    twice = make(MergeViT, ROTARY_TRUNK, merge_blocks=(2, 5))
    often = make(MergeViT, ROTARY_TRUNK, merge_blocks=(2, 4, 6, 8))
    rows = {  # networks and the share of coarse regions, of which MPM has none
        'MSViT, 25 % fine': (mixed, 0.75),
        'MSViT, all coarse': (mixed, 1.0),
        'MPM, before two blocks': (twice, 0.0),
        'MPM, before four blocks': (often, 0.0),
    }
    found = {name: [[], []] for name in rows}
    for network in (mixed, twice, often):
        network.load_state_dict(student.state_dict(), strict=False)
        network.eval()
    for image in track(list(read(files)), 'Comparing'):
        full = student(image)[-1]
        for name, (network, coarse_ratio) in rows.items():
            for rotations, distances in zip(
                (mean_positions, nullcontext), found[name], strict=True
            ):
                torch.manual_seed(0)
                with routing_override(coarse_ratio=coarse_ratio), rotations():
                    got = network(image)[-1]
                distances.append(1 - F.cosine_similarity(got, full).mean().item())
    return {
        name: [sum(values) / len(values) for values in columns] for name, columns in found.items()
    }


class MeanPosition(Rotation):
    """Turns by averages of angles, which ``cos_sin`` has in place of cosines and sines."""

    @classmethod
    def by(cls, angles: Tensor, interleaved: bool) -> Rotation:
        """The rotation by angles, ``(N, d / 2)``."""
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return cls(angles, *Rotation.by(cos_sin, interleaved)[1:])

    def like(self, angles: Tensor) -> Rotation:
        """Likewise."""
        return MeanPosition.by(angles, self.interleaved)


def mean_positions() -> AbstractContextManager:
    """Within it, coarse and merged tokens are turned to the mean position of their patches."""

    def of_grid(
        kind: str, grid: tuple[int, int], num_prefix_tokens: int, dims: int, device: torch.device
    ) -> Rotation:
        angles = F.pad(grid_angles(kind, grid, dims), (0, 0, num_prefix_tokens, 0))
        return MeanPosition.by(angles.to(device), ROTARY[kind].interleaved)

    return patch('mmtoken.backbones.vit_base.grid_rotation', of_grid)


def read(files: list[Path]) -> Iterator[Tensor]:
    """Photographs as networks see them, ``(1, 3, H, W)``."""
    for file in files:
        image = v2.functional.pil_to_tensor(Image.open(file).convert('RGB').resize(SIZE[::-1]))
        yield NORMALIZE(image[None].float() / 255)


if __name__ == '__main__':
    raise SystemExit(main())
