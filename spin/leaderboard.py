"""The paper's tables and figures, beside what a run's evaluations gave."""


def results_table(summary: dict) -> str:
    """Markdown: the metrics of one evaluation, with standard errors."""
    lines = ["| task | metric | value | standard error | documents | few-shot | harness |", "|---|---|---|---|---|---|---|"]
    for name, task in summary["tasks"].items():
        for metric in (key.removesuffix("_stderr") for key in task if key.endswith("_stderr")):
            values = [f"{task[metric]:.4f}", f"{task[f'{metric}_stderr']:.4f}", str(task["documents"])]
            lines.append(f"| {name} | {metric} | {' | '.join(values)} | {task['few_shot']} | {task['harness']} |")
    return "\n".join(lines)
