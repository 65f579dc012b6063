"""pmerge averages the checkpoints of one training run: streamed, exact, crash-safe.

    from merge_cli import average, open_checkpoint, plan_average, coefficients

    result = average(["run/ckpt_1000", "run/ckpt_2000"], "merged", method="ema", alpha=0.2)

The library does everything that the command does and prints nothing. Importing it is cheap: torch
is imported when it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merge_cli.version import __version__

if TYPE_CHECKING:
    from merge_cli.features.analyze import AnalysisPlan, analyze, plan_analysis, run_analysis
    from merge_cli.features.average import AveragePlan, AverageResult, average, plan_average, run_average
    from merge_cli.features.evaluate import EvaluationPlan, EvaluationResult, evaluate, plan_evaluation, run_evaluation
    from merge_cli.features.finalize import finalize
    from merge_cli.features.forecast import forecast
    from merge_cli.features.push import Pushed, push
    from merge_cli.features.report import report
    from merge_cli.features.sweep import SweepResult, run_sweep, sweep
    from merge_cli.features.sweep_plan import SweepPlan, plan_sweep
    from merge_cli.features.verify import Verification, verify
    from merge_cli.features.watch import watch
    from merge_cli.features.watch_plan import WatchPlan, plan_watch
    from merge_cli.formats.checkpoint import Checkpoint
    from merge_cli.formats.opening import open_checkpoint
    from merge_cli.output.progress import Progress
    from merge_cli.ranks.launcher import Rank, find_rank
    from merge_cli.request.coefficients import Coefficients
    from merge_cli.request.methods import coefficients
    from merge_cli.trajectory.analysis import Analysis
    from merge_cli.trajectory.evaluators import CommandEvaluator
    from merge_cli.trajectory.forecast import Forecast
    from merge_cli.trajectory.heldout import TextEvaluator

__all__ = [
    "Analysis",
    "AnalysisPlan",
    "AveragePlan",
    "AverageResult",
    "Checkpoint",
    "Coefficients",
    "CommandEvaluator",
    "EvaluationPlan",
    "EvaluationResult",
    "Forecast",
    "Progress",
    "Pushed",
    "Rank",
    "SweepPlan",
    "SweepResult",
    "TextEvaluator",
    "Verification",
    "WatchPlan",
    "__version__",
    "analyze",
    "average",
    "coefficients",
    "evaluate",
    "finalize",
    "find_rank",
    "forecast",
    "open_checkpoint",
    "plan_analysis",
    "plan_average",
    "plan_evaluation",
    "plan_sweep",
    "plan_watch",
    "push",
    "report",
    "run_analysis",
    "run_average",
    "run_evaluation",
    "run_sweep",
    "sweep",
    "verify",
    "watch",
]

_HOMES = {
    **dict.fromkeys(["AnalysisPlan", "analyze", "plan_analysis", "run_analysis"], "features.analyze"),
    "Analysis": "trajectory.analysis",
    **dict.fromkeys(["AveragePlan", "AverageResult", "average", "plan_average", "run_average"], "features.average"),
    "Checkpoint": "formats.checkpoint",
    "open_checkpoint": "formats.opening",
    "Coefficients": "request.coefficients",
    "coefficients": "request.methods",
    **dict.fromkeys(["Rank", "find_rank"], "ranks.launcher"),
    **dict.fromkeys(["EvaluationPlan", "EvaluationResult", "evaluate", "plan_evaluation", "run_evaluation"], "features.evaluate"),
    "forecast": "features.forecast",
    "report": "features.report",
    "CommandEvaluator": "trajectory.evaluators",
    "Forecast": "trajectory.forecast",
    "TextEvaluator": "trajectory.heldout",
    "finalize": "features.finalize",
    **dict.fromkeys(["Pushed", "push"], "features.push"),
    "Progress": "output.progress",
    **dict.fromkeys(["SweepResult", "run_sweep", "sweep"], "features.sweep"),
    **dict.fromkeys(["SweepPlan", "plan_sweep"], "features.sweep_plan"),
    **dict.fromkeys(["Verification", "verify"], "features.verify"),
    "watch": "features.watch",
    **dict.fromkeys(["WatchPlan", "plan_watch"], "features.watch_plan"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"merge_cli.{_HOMES[name]}"), name)
