"""Plot accuracy against milliseconds for one task of the study."""

import argparse
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rows import ROOT, tasks
from summaries import Summary, is_dense, summarize, with_shared_seeds

DESCRIPTION = """\
Draw docs/images/study_TASK.svg from the results in benchmarks/study/results/TASK: a panel for each
score, milliseconds of the whole model to the right. The line joins the dense network at several
resolutions, which is what a method has to beat. Bars are standard deviations over seeds.
"""
DENSE = 'dense'
BASELINES = (
    'uniform',
    'layers',
    'random',
    'low-resolution',
)  # words in names of rows that are baselines too


def main() -> int:
    """Draw the plot; return 0."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=tasks())
    task = parser.parse_args().task
    summaries = with_shared_seeds([s for s in summarize(task) if s.cost])
    if not summaries:
        raise SystemExit(f'no row of {task} has been measured: benchmarks/study/measure.py {task}')
    out = ROOT / 'docs' / 'images' / f'study_{task}.svg'
    draw(summaries, out)
    print(out.relative_to(ROOT))
    return 0


def draw(summaries: list[Summary], out: Path) -> None:
    """Write the SVG; the same results give the same file."""
    names = list(summaries[0].scores)
    with plt.rc_context({'svg.hashsalt': 'mmtoken', 'svg.fonttype': 'none', 'font.size': 9}):
        figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.6), squeeze=False)
        for ax, name in zip(axes[0], names, strict=True):
            draw_panel(ax, summaries, name)
        figure.tight_layout()
        figure.savefig(out, metadata=dict(Date=None))
        plt.close(figure)


def draw_panel(ax: Axes, summaries: list[Summary], score: str) -> None:
    """One score against milliseconds."""
    dense = sorted((s for s in summaries if is_dense(s.name)), key=milliseconds)
    ax.plot(
        [milliseconds(s) for s in dense], [mean(s.scores[score]) for s in dense],
        color='0.5', linewidth=1, zorder=1, label='dense, lower resolutions',
    )  # fmt: skip
    styles = dict(dense=('o', '0.4'), baseline=('s', 'tab:orange'), method=('D', 'tab:blue'))
    for summary in summaries:
        marker, color = styles[kind(summary.name)]
        values = summary.scores[score]
        deviation = stdev(values) if len(values) > 1 else None
        x, y = milliseconds(summary), mean(values)
        ax.errorbar(x, y, deviation, fmt=marker, color=color, markersize=5, capsize=2, zorder=2)
        below = kind(summary.name) == DENSE
        ax.annotate(
            short(summary.name), (x, y), xytext=(5, -9) if below else (-4, 4),
            ha='left' if below else 'right', textcoords='offset points', fontsize=7, color=color,
        )  # fmt: skip
    ax.set_xlabel('milliseconds a photograph')
    ax.set_ylabel(score)
    ax.set_xlim(left=0)
    ax.margins(x=0.15, y=0.12)
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(alpha=0.3)


def kind(name: str) -> str:
    """Whether a row is the dense network, another baseline, or a method."""
    if DENSE in name.split('_'):
        return DENSE
    return 'baseline' if any(word in name for word in BASELINES) else 'method'


def short(name: str) -> str:
    """``'504×336'`` of ``'dense_504x336'``; other names as they are."""
    return name.removeprefix(f'{DENSE}_').replace('x', '×') if is_dense(name) else name


def milliseconds(summary: Summary) -> float:
    """Of the whole model."""
    return summary.cost['ms']['median']


if __name__ == '__main__':
    raise SystemExit(main())
