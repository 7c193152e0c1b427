"""Comparisons: the arithmetic of a difference, the choice of the arm to compare with, and what is committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'dicom-node[train]')")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from engines.training import cohort, compare, recipe  # noqa: E402

ENGINES = Path(__file__).parents[2] / "engines"
PLANS = sorted(p for p in ENGINES.glob("*/training.yaml") if "comparisons" in yaml.safe_load(p.read_text("utf-8")))


def _units(n: int, seed: int) -> cohort.Cohort:
    y = np.arange(n) % 2
    x = np.random.default_rng(seed).normal(y, 1.0).astype(np.float16)
    nothing = np.zeros((n, 1))
    return cohort.Cohort(x[:, None], np.ones(n, np.int64), y, nothing.astype(np.float16), np.arange(n), nothing, ())


def test_the_same_scores_differ_by_nothing() -> None:
    y, score = _units(60, 1).y, np.random.default_rng(1).normal(size=60)
    found = compare.difference(y, [score, score], [score, score])
    assert found.value == found.low == found.high == 0


def test_the_interval_holds_what_another_cohort_and_another_training_would_say() -> None:
    """Scores with a known AUC: N(d, 1) against N(0, 1) separate with Phi(d / sqrt 2)."""
    rng, y = np.random.default_rng(2), np.arange(400) % 2
    strong = [rng.normal(1.5 * y, 1.0) for _ in range(5)]
    weak = [rng.normal(0.8 * y, 1.0) for _ in range(5)]
    found = compare.difference(y, strong, weak)
    assert 0 < found.low < 0.856 - 0.714 < found.high < 0.25


def test_few_units_give_a_wider_interval() -> None:
    rng = np.random.default_rng(3)

    def width(n: int) -> float:
        y = np.arange(n) % 2
        arms = [[rng.normal(y, 1.0) for _ in range(3)] for _ in range(2)]
        found = compare.difference(y, *arms)
        return found.high - found.low

    assert width(40) > 1.5 * width(1000)


def test_every_arm_sees_the_same_units_of_a_seed_and_another_seed_sees_others() -> None:
    train = _units(100, 4)
    once, again, other = (compare.drawn(train, 20, seed).seeds.tolist() for seed in (1, 1, 2))
    assert once == again != other
    assert sorted(s % 2 for s in once) == [0] * 10 + [1] * 10


def test_the_second_arm_is_chosen_on_validation_and_never_on_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "flatterer" is the best on test units, "honest" on validation units: the latter is compared with."""
    cohorts = {"train": _units(40, 5), "validation": _units(80, 6), "test": _units(80, 7)}

    def arm(_run: Any, _question: Any, name: str, seed: int, units: compare.Trio, _folder: Path) -> compare.Margins:
        assert len(units.train.y) == 20
        rng = np.random.default_rng([seed, len(name)])
        strength = {"first": (1.0, 1.0), "flatterer": (0.0, 9.0), "honest": (2.0, 0.5)}[name]
        held, test = (s * part.y + rng.normal(size=80) for s, part in zip(strength, units[1:3], strict=True))
        return compare.Margins(held, test)

    monkeypatch.setattr(compare.importlib, "import_module", lambda _name: type("Arms", (), {"arm": staticmethod(arm)}))
    question = compare.Question("which", ("first", "flatterer", "honest"), 3, 20, {})
    answer = compare._answer(recipe.Run("thyroid_cine", "demo", tmp_path, tmp_path), question, cohorts)
    assert answer["compared"] == ["first", "honest"]
    assert answer["arms"]["flatterer"]["auc"] > 0.95  # reported all the same
    assert answer["difference"]["value"] == pytest.approx(
        answer["arms"]["first"]["auc"] - answer["arms"]["honest"]["auc"], abs=2e-4
    )
    assert len(answer["arms"]["first"]["by_seed"]) == 3


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.parent.name)
def test_what_is_committed_answers_every_question_with_enough_seeds(plan: Path) -> None:
    asked = yaml.safe_load(plan.read_text("utf-8"))["comparisons"]
    found = json.loads(plan.with_name(compare.RESULTS).read_text("utf-8"))
    assert found["cohorts"] == asked["cohorts"]
    for question, answer in zip(asked["questions"], found["answers"], strict=True):
        assert question["ask"] == answer["ask"]
        assert question["arms"] == list(answer["arms"])
        assert all(len(arm["by_seed"]) == question["seeds"] for arm in answer["arms"].values())
        assert question["seeds"] >= (10 if "pre-training" in question["ask"] else 5)
        assert answer["test_units"] >= 380  # of 400; what the engine refuses is left out for every arm


def test_cohorts_of_comparisons_are_no_cohorts_of_the_packages() -> None:
    for path in PLANS:
        plan = yaml.safe_load(path.read_text("utf-8"))

        def seeds(cohorts: dict[str, Any]) -> set[int]:
            return {s for c in cohorts.values() for s in range(c["first_seed"], c["first_seed"] + c["count"])}

        assert not seeds(plan["cohorts"]) & seeds(plan["comparisons"]["cohorts"])


def test_a_still_is_one_frame_as_often_as_a_clip_has_frames() -> None:
    from engines.thyroid_cine import arms

    x = np.arange(16, dtype=np.float16)[None, None, None, :, None, None] * np.ones((2, 1, 1, 1, 4, 4), np.float16)
    place = np.arange(4, dtype=np.float16)[None, :, None, None] * np.ones((2, 1, 2, 2), np.float16)
    still, where = arms._still(x, place)
    assert still.shape == x.shape
    assert set(np.unique(still)) == {8}
    assert set(np.unique(where)) == {2}


def test_a_single_phase_stands_in_the_place_of_every_other_and_the_outline_stays() -> None:
    from engines.liver_dce import arms

    x = np.arange(5, dtype=np.float16)[None, None, :, None, None, None] * np.ones((2, 1, 1, 2, 2, 2), np.float16)
    one, _ = arms._only(arms.SINGLE.index("portal venous"))(x, x)
    assert one[0, 0, :, 0, 0, 0].tolist() == [2, 2, 2, 2, 4]
