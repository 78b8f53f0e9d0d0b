"""Networks as files that run without this package: ONNX, and programs of ``torch.export``.

Needs torch 2.6 or later; onnx, onnxscript and onnxruntime for ONNX only (the extra ``export``).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .backbones.msvit import MSViT
from .runtime.budget import Budgeted

Format = Literal['onnx', 'torch-export']
Run = Callable[[Tensor], tuple[Tensor, ...]]
SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2'}
TOLERANCE = 1e-3  # of the largest value of an output
OLDEST_TORCH = '2.6'  # the first whose ONNX exporter takes translations of operators


class FeatureExtractor(nn.Module):
    """Backbone and neck of a model.

    Args:
        model: With ``extract_feat``, as all models of the libraries.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalized images ``(B, C, H, W)`` to maps ``(B, C_i, H_i, W_i)``."""
        return tuple(self.model.extract_feat(images))


class Segmentor(nn.Module):
    """A segmentor of mmseg up to its scores.

    Args:
        model: An ``EncoderDecoder``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalized images ``(B, C, H, W)`` to scores ``(B, classes, H', W')`` of the head."""
        return (self.model(images, mode='tensor'),)


class OutputCheck(NamedTuple):
    """One output of an exported network, compared with PyTorch's.

    Attributes:
        shape: Of the output.
        error: Largest difference over the largest value.
    """

    shape: tuple[int, ...]
    error: float


def check_torch() -> None:
    """Refuse a torch that is too old, before any work.

    Raises:
        ValueError: It is older than :data:`OLDEST_TORCH`.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise ValueError(
            f'export needs torch {OLDEST_TORCH} or later, this is torch {torch.__version__}'
        )


def check_exportable(model: nn.Module, single: bool) -> None:
    """Refuse what a file cannot hold, before any work.

    Args:
        model: A detector, segmentor, classifier or backbone.
        single: Whether the file is to take one image at a time.

    Raises:
        ValueError: Tokens are chosen and there are several images, or attention windows.
    """
    for name, module in model.named_modules():
        part = f'{name or "the model"} ({type(module).__name__})'
        if isinstance(module, MSViT) and module.window is not None:
            raise ValueError(
                f'{part} has attention windows, whose numbers of tokens differ: it can be '
                'exported with window_size=None only'
            )
        if isinstance(module, Budgeted) and module.least_budget and not single:
            raise ValueError(
                f'{part} chooses its tokens image by image, and several images have several '
                'numbers of them: export it with a batch size of 1 that is not dynamic, or its '
                'dense twin (mmtoken.dense_twin(cfg))'
            )


def export(
    network: nn.Module, images: Tensor, file: Path, form: Format, dynamic_batch: bool = False
) -> None:
    """Write a network to a file.

    Args:
        network: In eval mode, images to a tuple of tensors.
        images: ``(B, C, H, W)``; height and width are fixed by it, and the batch size too, unless
            ``dynamic_batch``.
        file: To write.
        form: ``'onnx'`` or ``'torch-export'``.
        dynamic_batch: Leave the batch size open.

    Raises:
        ValueError: It cannot be exported, or torch is too old; the message says why.
    """
    check_torch()
    shapes = [{0: torch.export.Dim('batch')}] if dynamic_batch else None
    try:
        with torch.no_grad():
            if form == 'onnx':
                program = torch.onnx.export(
                    network, (images,), dynamo=True, verbose=False, dynamic_shapes=shapes,
                    input_names=['images'],
                    custom_translation_table={torch.ops.aten.sort.stable: sort_for_onnx},
                )  # fmt: skip
                program.save(file)
            else:
                program = torch.export.export(
                    network, (images,), strict=False, dynamic_shapes=shapes
                )
                torch.export.save(program, file)
    except Exception as error:  # exporters raise anything
        reason = str(error).strip().splitlines() or ['']
        raise ValueError(f'{type(error).__name__}: {reason[0]}') from error


def sort_for_onnx(values, stable=True, dim=-1, descending=False):
    """``torch.sort`` with ``stable``, which torch does not translate; TopK is stable, too."""
    from onnxscript import opset18

    length = opset18.Gather(opset18.Shape(values), [dim])
    return opset18.TopK(values, length, axis=dim, largest=int(descending))


def load(file: Path, form: Format) -> Run:
    """An exported network, on the CPU with torch's number of threads."""
    if form == 'torch-export':
        return torch.export.load(file).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    (name,) = (given.name for given in session.get_inputs())
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {name: images.numpy()})))


@torch.no_grad()
def compare(exported: Run, network: Run, images: Tensor) -> list[OutputCheck]:
    """Compare the outputs of an exported network with those of the network.

    Raises:
        ValueError: An output differs by more than :data:`TOLERANCE` of its largest value, or the
            exported network does not run.
    """
    expected = network(images)
    try:
        given = exported(images)
    except Exception as error:  # runtimes raise anything
        raise ValueError(f'it does not run on {tuple(images.shape)}: {error}') from error
    checks = [
        OutputCheck(tuple(a.shape), ((a - b).abs().max() / b.abs().max()).item())
        for a, b in zip(given, expected, strict=True)
    ]
    worst = max(check.error for check in checks)
    if not worst <= TOLERANCE:
        raise ValueError(f"its outputs differ from PyTorch's by {worst:.1e}, above {TOLERANCE}")
    return checks
