"""What a report was measured on."""

import subprocess

import torch

from mmtoken.analysis.environment import describe_environment


def describe_setup(device: torch.device, quick: bool) -> dict:
    """The kind of report, versions, and the processor or the GPU; no date."""
    environment = describe_environment(device)
    del environment['date']
    gpu = describe_gpu(device) if device.type == 'cuda' else {}
    return dict(quick=quick, environment=environment, **gpu)


def describe_gpu(device: torch.device) -> dict:
    """Driver, CUDA version, multiprocessors and memory of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    gpu = dict(
        cuda=torch.version.cuda,
        driver=_driver(),
        multiprocessors=properties.multi_processor_count,
        memory_mb=properties.total_memory // 2**20,
        capability=f'{properties.major}.{properties.minor}',
    )
    return dict(gpu=gpu)


def _driver() -> str | None:
    """Version of the driver, None where ``nvidia-smi`` does not tell."""
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()[0].strip() if result.stdout else None
