"""Plot accuracy against milliseconds for one task of the study."""

import argparse
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rows import ROOT, read_rows, tasks
from summaries import (
    Summary,
    has_all_tokens,
    is_dense,
    summarize,
    twin_of,
    with_shared_seeds,
)

DESCRIPTION = """\
Draw docs/images/study_TASK.svg from the results in benchmarks/study/results/TASK: a panel for each
score, milliseconds of the whole model to the right, from 0 unless all are alike. The line joins the
dense network at several resolutions, which is what a method has to beat; dashes lead from a row to
its dense twin. Rows far below all resolutions are named at the bottom, with their scores; rows with
`plot: false` are left out.

The seeds are those that all rows have, or with --seeds those given, and then only rows that have
them all: docs/images/study_TASK_seeds.svg. Points are means over seeds, bars standard deviations
of what is left once the mean over a seed's points is taken away, since a seed moves all rows.
"""
DENSE, BASELINE, METHOD = 'dense', 'baseline', 'method'
FAR_BELOW = 3  # points
LINE, NEAR = 9, 7  # height of a line, in points; lines beside each other whose names would touch
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
    parser.add_argument('--seeds', type=int, nargs='+', metavar='N', help='these, not all shared')
    args = parser.parse_args()
    task, seeds = args.task, set(args.seeds or ())
    rows = read_rows(task)
    measured = [s for s in summarize(task) if s.cost and rows[s.name].plot]
    if not measured:
        raise SystemExit(f'no row of {task} has been measured: benchmarks/study/measure.py {task}')
    summaries = with_shared_seeds([s for s in measured if seeds <= set(s.seeds)], seeds)
    if not summaries:
        raise SystemExit(f'no row of {task} has all seeds {sorted(seeds)}')
    suffix = '_seeds' if seeds else ''
    out = ROOT / 'docs' / 'images' / f'study_{task}{suffix}.svg'
    draw(summaries, out)
    print(out.relative_to(ROOT))
    return 0


def draw(summaries: list[Summary], out: Path) -> None:
    """Write the SVG; the same results give the same file."""
    names = list(summaries[0].scores)
    with plt.rc_context({'svg.hashsalt': 'mmtoken', 'svg.fonttype': 'none', 'font.size': 9}):
        figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.4), squeeze=False)
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
    # Without the dense network at several resolutions nothing is far below.
    lowest = min((mean(s.scores[score]) - FAR_BELOW for s in dense), default=0)
    shown = [s for s in summaries if mean(s.scores[score]) >= lowest]
    deviations = deviations_within_seeds(shown, score)
    for pair in twins(shown):
        ax.plot(
            [milliseconds(s) for s in pair], [mean(s.scores[score]) for s in pair],
            color='0.5', linewidth=0.8, linestyle=(0, (4, 3)), zorder=1,
        )  # fmt: skip
    styles = {DENSE: ('o', '0.4'), BASELINE: ('s', 'tab:orange'), METHOD: ('D', 'tab:blue')}
    for summary in shown:
        marker, color = styles[kind(summary.name)]
        x, y = milliseconds(summary), mean(summary.scores[score])
        deviation = deviations.get(summary.name)
        ax.errorbar(x, y, deviation, fmt=marker, color=color, markersize=5, capsize=2, zorder=2)
    ax.set_xlabel('milliseconds a photograph')
    ax.set_ylabel(score)
    ax.margins(x=0.15, y=0.12)
    times = [milliseconds(s) for s in summaries]  # of all panels alike
    if min(times) < max(times) / 2:  # times that are closer would all be in one place
        ax.set_xlim(left=0)
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(alpha=0.3)
    write_names(ax, shown, score, {key: color for key, (_, color) in styles.items()})
    missing = ', '.join(
        f'{s.name}: {mean(s.scores[score]):.1f}' for s in summaries if s not in shown
    )
    if missing:
        ax.text(0.99, 0.02, f'below: {missing}', transform=ax.transAxes, ha='right', fontsize=7)


def deviations_within_seeds(summaries: list[Summary], score: str) -> dict[str, float]:
    """Standard deviations over seeds, without what a seed moves in all rows; none of one seed."""
    common = [mean(values) for values in zip(*(s.scores[score] for s in summaries), strict=True)]
    if len(common) < 2:
        return {}
    return {
        s.name: stdev(a - b for a, b in zip(s.scores[score], common, strict=True))
        for s in summaries
    }


def twins(summaries: list[Summary]) -> list[tuple[Summary, Summary]]:
    """Rows that have a dense twin of their own, with it."""
    found = ((s, twin_of(s, summaries)) for s in summaries)
    return [(s, twin) for s, twin in found if twin and twin.name != DENSE]


def write_names(ax: Axes, summaries: list[Summary], score: str, colors: dict[str, str]) -> None:
    """Names beside the points: of methods to the left, of the dense network below to the right,
    of other baselines to the right.

    Those at the height of their points are moved apart, from the highest one downwards.
    """
    ax.figure.tight_layout()
    to_pixels, line = ax.transData, LINE * ax.figure.dpi / 72
    written: dict[str, list[tuple[float, float]]] = dict(left=[], right=[])
    for summary in sorted(summaries, key=lambda s: -mean(s.scores[score])):
        point = milliseconds(summary), mean(summary.scores[score])
        x, y = to_pixels.transform(point)
        group = kind(summary.name)
        if group == DENSE:
            place, side = (x + line / 2, y - line), 'left'
        else:
            side, gap = ('right', -line / 2) if group == METHOD else ('left', line / 2)
            near = [b for a, b in written[side] if abs(a - x) < NEAR * line]
            place = x + gap, min([y, *(b - line for b in near)])
            written[side].append((x, place[1]))
        ax.annotate(
            short(summary.name), point, xytext=to_pixels.inverted().transform(place), ha=side,
            va='center', fontsize=7, color=colors[group],
            bbox=dict(facecolor='white', alpha=0.75, linewidth=0, pad=0.3),  # above lines and bars
            arrowprops=dict(arrowstyle='-', linewidth=0.4, color=colors[group], shrinkB=3),
        )  # fmt: skip


def kind(name: str) -> str:
    """Whether a row is the dense network, another baseline, or a method."""
    if has_all_tokens(name):
        return DENSE
    return BASELINE if any(word in name for word in BASELINES) else METHOD


def short(name: str) -> str:
    """``'504×336'`` of ``'dense_504x336'``; other names as they are."""
    return name.removeprefix(f'{DENSE}_').replace('x', '×') if is_dense(name) else name


def milliseconds(summary: Summary) -> float:
    """Of the whole model."""
    return summary.cost['ms']['median']


if __name__ == '__main__':
    raise SystemExit(main())
