"""Draw what benchmarks/soak/run.py recorded: docs/images/soak.svg."""

import json
from pathlib import Path

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt
from run import MODELS

HERE = Path(__file__).resolve().parent
OUT = HERE.parent.parent / 'docs' / 'images' / 'soak.svg'
PANELS = dict(
    resident_mb='memory of the process, MiB',
    plans_mb='kept index tables, MiB',
    probe_ms='one image of 96×128, ms',
)


def main() -> int:
    """Draw one row of panels for requests and one for training; return 0."""
    runs = [json.loads((HERE / f'{kind}.json').read_text()) for kind in ('requests', 'training')]
    with plt.rc_context({'svg.hashsalt': 'mmtoken', 'svg.fonttype': 'none', 'font.size': 9}):
        figure, axes = plt.subplots(len(runs), len(PANELS), figsize=(11, 5.6), squeeze=False)
        for row, run in zip(axes, runs, strict=True):
            draw_run(row, run)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc='lower center', ncols=5)
        figure.tight_layout(rect=(0, 0.1, 1, 1))
        figure.savefig(OUT, metadata=dict(Date=None))
        plt.close(figure)
    print(OUT.relative_to(HERE.parent.parent))
    return 0


def draw_run(row: list[plt.Axes], run: dict) -> None:
    """The panels of a run."""
    for ax, (key, label) in zip(row, PANELS.items(), strict=True):
        for name, records in run['models'].items():
            values = records[key]
            steps = [run['every'] * (i + 1) for i in range(len(values))]
            ax.plot(steps, values, linewidth=0.8, color=f'C{MODELS.index(name)}', label=name)
        ax.set_xlabel(run['kind'])
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.spines[['top', 'right']].set_visible(False)


if __name__ == '__main__':
    raise SystemExit(main())
