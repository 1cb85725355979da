"""The test of whether perplexity tells how tasks will fare."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from qbench.report.correlation import pearson
from qbench.report.metrics import base
from qbench.report.significance import Draws
from qbench.report.takeaways.evidence import Evidence, Recipe
from qbench.report.takeaways.trial import Settings, Trial, Trials, corrected

_LEAST_RECIPES = 5


def correlation(evidence: Evidence, wanted: Settings) -> Trials:
    """Over the recipes of a model, the lower the perplexity of all texts together the higher a task's accuracy.

    Recipes of one model are not independent, which p does not know: a task's trial speaks only where that of another
    model speaks alike.

    Settings: none.
    """
    models: dict[tuple[str, str], list[Recipe]] = {}
    for recipe in evidence.recipes:
        models.setdefault((recipe.model, recipe.base), []).append(recipe)
    found, of = [], []
    for (model, _), recipes in models.items():
        texts, tasks = evidence.joint(recipes), evidence.joint(recipes, "acc/")
        both = [i for i in texts.draws if i in tasks.draws]
        if len(both) >= _LEAST_RECIPES:
            columns = _means(tasks.metrics, tasks.sizes, [tasks.draws[i] for i in both])
            wide = pd.DataFrame({"loss": [texts.draws[i].values.mean() for i in both], **columns})
            seeds = tuple(len(texts.draws[i].values) for i in both)
            for task in columns:
                # One at a time, since all models are corrected together below.
                row = pearson(wide, "loss", [task]).iloc[0]
                r, low, high, p = (float(row[name]) for name in ("r", "low", "high", "p"))
                text = f"r = {r:.2f} (95% interval {low:.2f} to {high:.2f})"
                needed = "two models or more have to agree surely"
                found.append(Trial(f"{base(task)}, {model}", 0, text, r, p, len(both), seeds, needed=needed))
                of.append((base(task), model))
    return _agreed(corrected(found), of), evidence.recipes


def _agreed(trials: Sequence[Trial], of: Sequence[tuple[str, str]]) -> list[Trial]:
    """Without what they speak for, where no other model speaks alike; `of` has the task and the model of each."""
    spoken = {(task, model, trial.speaks) for trial, (task, model) in zip(trials, of, strict=True)}
    found = []
    for trial, (task, model) in zip(trials, of, strict=True):
        others = [m for t, m, speaks in spoken if (t, speaks) == (task, trial.speaks) and m != model]
        found.append(trial if others else replace(trial, speaks=0))
    return found


def _means(metrics: Sequence[str], sizes: Sequence[int], draws: Sequence[Draws]) -> dict[str, list[float]]:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return {
        metric: [float(d.values[:, a:b].mean()) for d in draws]
        for metric, a, b in zip(metrics, starts, starts[1:], strict=False)
    }
