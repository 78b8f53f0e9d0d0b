"""Refuse to start more processes than this machine has devices, before they fail one by one.

Without any device, processes share the CPU, which suits small tests alone.
"""

import sys

import torch
from mmengine.device import get_device


def main(launcher: str, processes: str) -> None:
    """Exit with a message if the processes do not fit.

    Args:
        launcher: Name of the script that starts them, such as ``dist_train.sh``.
        processes: How many it is to start here. ``gpu`` or ``auto`` leave it to PyTorch.
    """
    device = get_device()
    if device == 'mps':
        tool = launcher.removeprefix('dist_').removesuffix('.sh')
        sys.exit(
            f'{launcher}: processes cannot share a GPU of Apple. For one process: '
            f'python tools/{tool}.py CONFIG ...'
        )
    if device == 'cpu':
        print(f'{launcher}: PyTorch sees no GPU, {processes} processes share the CPU (gloo)')
        return
    available = torch.cuda.device_count()
    if device == 'cuda' and processes.isdecimal() and int(processes) > available:
        sys.exit(
            f'{launcher}: {processes} processes need a GPU each, but PyTorch sees {available} on '
            'this machine (CUDA_VISIBLE_DEVICES can hide some)'
        )


if __name__ == '__main__':
    main(*sys.argv[1:])
