"""Design choices compared: every arm is fitted anew for each seed on the same units, and judged on the same others.

`comparisons` of training.yaml is the plan, `engines/<task>/arms.py` says what an arm does, and what came out, whichever
way it fell, stands in `engines/<task>/comparisons.json` (docs/comparisons.md shows it). The first arm of a question is
compared with the second; where there are more, with the one of the others that is best on validation units, so that the
choice costs the test units nothing. The interval of the difference is a percentile bootstrap over seeds and test units
at once: it holds the luck of a training and of a cohort.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engines.training import cohort, fit, stats
from engines.training.cohort import Cohort
from engines.training.recipe import Run, task_folder
from engines.training.stats import Array, Labels

Inputs: TypeAlias = NDArray[np.float16]
"""`Cohort.x` or `Cohort.place`."""
ROUNDS = 2000
RESULTS = "comparisons.json"


@dataclass(frozen=True)
class Question:
    """One entry of `comparisons.questions`."""

    ask: str
    arms: tuple[str, ...]
    seeds: int
    units: int
    """Training units drawn for each seed, the same for every arm."""
    settings: Mapping[str, Any]
    """For the arms: `fit.Settings` without the seed, or what else the task knows."""

    @property
    def each(self) -> range:
        return range(1, self.seeds + 1)


class Trio(NamedTuple):
    """Units of one seed."""

    train: Cohort
    validation: Cohort
    test: Cohort
    unlabelled: Cohort
    """All training units: an arm may use their images, not their labels."""


class Margins(NamedTuple):
    """Log-odds of class 1."""

    validation: Array
    test: Array


class Arm(Protocol):
    """`arm` of `engines/<task>/arms.py`."""

    def __call__(self, run: Run, question: Question, name: str, seed: int, units: Trio, folder: Path) -> Margins: ...


def compare(run: Run) -> dict[str, Any]:
    """Answer every question of a task; arms that stand finished in the work folder are read."""
    plan = run.plan["comparisons"]
    cohorts = {
        name: cohort.build(cohort.Spec(run.task, **plan["cohorts"][name]), run.work, run.processes)
        for name in ("train", "validation", "test")
    }
    answers = []
    for said in plan["questions"]:
        question = Question(said["ask"], tuple(said["arms"]), said["seeds"], said["units"], said["settings"])
        answers.append(_answer(run, question, cohorts))
        print(sentence(answers[-1]), flush=True)
    found = {"task": run.task, "cohorts": plan["cohorts"], "answers": answers}
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    (task_folder(run.task) / RESULTS).write_text(text, "utf-8")
    return found


def network_arm(run: Run, preset: str, settings: fit.Settings, units: Trio, folder: Path) -> Margins:
    """Margins of a network of the task's plain kind."""
    model = fit.fit(run.task, preset, settings, units.train, units.validation, folder)
    return Margins(*(fit.clip_margins(model, part, run.device) for part in (units.validation, units.test)))


def settings_of(run: Run, question: Question, seed: int) -> fit.Settings:
    """For an arm that is one fit."""
    return fit.Settings(**question.settings, seed=seed, threads=run.threads, device=run.device)


def drawn(train: Cohort, units: int, seed: int) -> Cohort:
    """So many units, both classes equally often."""
    rng = np.random.default_rng([seed, units])
    chosen = [rng.permutation(np.flatnonzero(train.y == label))[: units // 2] for label in (0, 1)]
    return train.part(np.sort(np.concatenate(chosen)))


def difference(y: Labels, first: Sequence[Array], second: Sequence[Array], seed: int = 0) -> stats.Interval:
    """Mean difference of AUC over the seeds, with the bootstrap interval over seeds and units (both arms the same)."""
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(y == label) for label in (0, 1)]
    values = []
    for _ in range(ROUNDS):
        units = np.concatenate([rng.choice(members, len(members)) for members in classes])
        seeds = rng.integers(0, len(first), len(first))
        gains = [stats.auc(y[units], first[s][units]) - stats.auc(y[units], second[s][units]) for s in seeds]
        values.append(np.mean(gains))
    low, high = np.quantile(values, (0.025, 0.975))
    mean = np.mean([stats.auc(y, a) - stats.auc(y, b) for a, b in zip(first, second, strict=True)])
    return stats.Interval(float(mean), float(low), float(high))


def sentence(answer: Mapping[str, Any]) -> str:
    """An answer in one line."""
    first, second = answer["compared"]
    found = answer["difference"]
    low, high = found["ci95"]
    reading = "no difference shown" if low <= 0 <= high else f"{first if low > 0 else second} is better"
    return (
        f"{answer['ask']}: {first} {answer['arms'][first]['auc']:.3f}, {second} {answer['arms'][second]['auc']:.3f}, "
        f"difference {found['value']:+.3f} ({low:+.3f} to {high:+.3f}), {answer['seeds']} seeds: {reading}"
    )


def _answer(run: Run, question: Question, cohorts: Mapping[str, Cohort]) -> dict[str, Any]:
    arm: Arm = importlib.import_module(f"engines.{run.task}.arms").arm
    found: dict[str, list[Margins]] = {name: [] for name in question.arms}
    for seed in question.each:
        train = drawn(cohorts["train"], question.units, seed)
        units = Trio(train, cohorts["validation"], cohorts["test"], cohorts["train"])
        for name in question.arms:
            folder = run.work / "compare" / run.task / f"{question.units}-{seed}" / name.replace(" ", "-")
            found[name].append(arm(run, question, name, seed, units, folder))
    held, y = cohorts["validation"].y, cohorts["test"].y
    aucs = {name: [stats.auc(y, m.test) for m in margins] for name, margins in found.items()}
    on_validation = {name: np.mean([stats.auc(held, m.validation) for m in margins]) for name, margins in found.items()}
    first, others = question.arms[0], question.arms[1:]
    second = max(others, key=lambda name: float(on_validation[name]))
    apart = difference(y, [m.test for m in found[first]], [m.test for m in found[second]])
    return {
        "ask": question.ask,
        "seeds": question.seeds,
        "units": len(drawn(cohorts["train"], question.units, 1).y),
        "test_units": len(y),
        "arms": {
            name: {"auc": round(float(np.mean(v)), 4), "by_seed": [round(a, 4) for a in v]} for name, v in aucs.items()
        },
        "compared": [first, second],
        "difference": apart.to_json(),
        "seeds_won": int(sum(a > b for a, b in zip(aucs[first], aucs[second], strict=True))),
    }


def with_inputs(units: Trio, change: Callable[[Inputs, Inputs], tuple[Inputs, Inputs]]) -> Trio:
    """The same units, inputs and places changed by `change(x, place) -> (x, place)`."""

    def changed(part: Cohort) -> Cohort:
        x, place = change(part.x, part.place)
        return replace(part, x=x, place=place)

    return Trio(changed(units.train), changed(units.validation), changed(units.test), units.unlabelled)
