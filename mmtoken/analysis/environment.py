"""The machine and the software of a measurement."""

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from ..stack import library_versions
from ..version import __version__

CHECKOUT = Path(__file__).resolve().parents[2]


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions, and the processor or the GPU; no host names or paths."""
    gpu = device.type == 'cuda'
    return dict(
        mmtoken=__version__,
        commit=_commit(),
        torch=torch.__version__,
        **library_versions(),
        python=platform.python_version(),
        device=torch.cuda.get_device_name(device) if gpu else _processor(),
        date=date.today().isoformat(),
    )


def _commit() -> str | None:
    """Short hash of the current commit, marked if files have changed since."""
    if not (CHECKOUT / '.git').exists():
        return None  # installed, perhaps inside another project's checkout
    try:
        result = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--exclude=*'],
            cwd=CHECKOUT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _processor() -> str:
    """The processor's model, and which vector instructions torch uses."""
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return (
                    f'{line.partition(":")[2].strip()}, {torch.backends.cpu.get_cpu_capability()}'
                )
    return platform.processor() or platform.machine()
