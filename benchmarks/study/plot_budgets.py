"""Plot the scores of trained networks against the budget of tokens that they are given."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt
from rows import RESULTS, ROOT, tasks
from summaries import SCORES, points

DESCRIPTION = """\
Draw docs/images/budgets_TASK.svg from benchmarks/study/results/TASK/budgets_*.json, which
budgets.py writes: a panel for each score and a line for each network, one checkpoint at several
budgets. The dashed line is the dense network with the same seed.
"""
SHOWN = ('mIoU', 'boundary/mIoU')


def main() -> int:
    """Draw the plot; return 0."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=tasks())
    task = parser.parse_args().task
    files = sorted((RESULTS / task).glob('budgets_*.json'))
    if not files:
        raise SystemExit(f'no budgets of {task} are known: benchmarks/study/budgets.py {task} ROW')
    out = ROOT / 'docs' / 'images' / f'budgets_{task}.svg'
    draw(task, [json.loads(file.read_text()) for file in files], out)
    print(out.relative_to(ROOT))
    return 0


def draw(task: str, found: list[dict], out: Path) -> None:
    """Write the SVG; the same results give the same file."""
    with plt.rc_context({'svg.hashsalt': 'mmtoken', 'svg.fonttype': 'none', 'font.size': 9}):
        figure, axes = plt.subplots(1, len(SHOWN), figsize=(4.6 * len(SHOWN), 3.2))
        for ax, score in zip(axes, SHOWN, strict=True):
            for i, network in enumerate(found):
                color = f'C{i}'
                budgets = {float(tokens): b['scores'] for tokens, b in network['budgets'].items()}
                values = [points(score, scores[score]) for scores in budgets.values()]
                ax.plot([*budgets], values, 'o-', color=color, markersize=4, label=network['row'])
                dense = RESULTS / task / f'dense_seed{network["seed"]}.json'
                level = points(score, json.loads(dense.read_text())['scores'][score])
                ax.axhline(
                    level, color=color, linestyle='--', linewidth=0.8,
                    label=f'dense, seed {network["seed"]}',
                )  # fmt: skip
            ax.set_xlabel('tokens (MSViT) or queries (DGE), share of the dense network')
            ax.set_ylabel(SCORES[score])
            ax.set_xlim(0, 1.05)
            ax.spines[['top', 'right']].set_visible(False)
            ax.grid(alpha=0.3)
        axes[0].legend(fontsize=7, loc='lower right')
        figure.tight_layout()
        figure.savefig(out, metadata=dict(Date=None))
        plt.close(figure)


if __name__ == '__main__':
    raise SystemExit(main())
