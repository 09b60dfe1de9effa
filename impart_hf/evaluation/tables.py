"""Results as Markdown tables whose columns are aligned on a terminal, too."""

from collections.abc import Mapping, Sequence

from .task_scores import TaskScore


def markdown_table(rows: Sequence[Mapping[str, str]], left: int = 1) -> str:
    """Return a table.

    Args:
        rows: cells by column, all with the first one's columns; at least one.
        left: number of columns that are aligned at their left, as names are; the others are numbers.
    """
    columns = list(rows[0])
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, [width * "-" if i < left else (width - 1) * "-" + ":" for i, width in enumerate(widths)])
    return "\n".join(
        f"| {' | '.join(_aligned(line[i], width, i < left) for i, width in enumerate(widths))} |" for line in lines
    )


def _aligned(cell: str, width: int, at_left: bool) -> str:
    return cell.ljust(width) if at_left else cell.rjust(width)


def score_table(scores: Mapping[str, Sequence[TaskScore]]) -> str:
    """Return a table with a line for each score.

    Args:
        scores: of each model; one has some.
    """
    return markdown_table([_cells(model, score) for model, found in scores.items() for score in found], left=4)


def _cells(model: str, score: TaskScore) -> dict[str, str]:
    arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
    return {
        "model": model,
        "task": score.task,
        "filter": score.filter,
        "metric": score.metric + arrow,
        "value": f"{score.value:.4f}",
        "± stderr": "–" if score.stderr is None else f"{score.stderr:.4f}",
        "questions": str(score.samples),
        "examples": "–" if score.num_fewshot is None else str(score.num_fewshot),
        "version": score.version,
    }
