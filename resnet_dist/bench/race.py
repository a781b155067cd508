"""`resnet-dist bench race`: what a race of seeds costs, and how often it picks or loses the truly best point.

Points are simulated, with known means and unequal spreads, or resampled from a sweep with many seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from resnet_dist.bench.paired import markdown
from resnet_dist.config.space import Race, Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.ledger import read_ledger, replay
from resnet_dist.sweeps.racing import contenders, next_round, scores_by_seed

MAX_SEEDS = 8
_TOLERANT, _ALL = "min_difference 0.5", f"{MAX_SEEDS} runs of each"
Case = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""The points' means, and their scores by point and seed number. Higher is better."""


def _normal(rng: np.random.Generator, means: np.ndarray, spreads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return means, means[:, None] + spreads[:, None] * rng.normal(size=(len(means), MAX_SEEDS))


def _bowl(rng: np.random.Generator, depth: float) -> np.ndarray:
    """Means of 16 random points around an optimum in two dimensions."""
    return -depth * ((rng.uniform(-1, 1, (16, 2)) - rng.uniform(-0.5, 0.5, 2)) ** 2).sum(axis=1)


def _growing(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    means = _bowl(rng, 8)
    return _normal(rng, means, 0.3 - 0.5 * means)


SIMULATED: Mapping[str, Case] = {
    "16 around an optimum, spread 1": lambda rng: _normal(rng, _bowl(rng, 6), np.ones(16)),
    "the same, spreads of 0.5 to 2": lambda rng: _normal(rng, _bowl(rng, 6), np.exp(rng.normal(0, 0.7, 16))),
    "the same, spread 0.3 and more, far ones vary more": _growing,
    "one best, three worse by 0.5, twelve by 4, spread 1": lambda rng: _normal(
        rng, -np.repeat([0, 0.5, 4], [1, 3, 12]), np.ones(16)
    ),
    "the best varies by 2, the others by 0.5, 0.7 apart": lambda rng: _normal(
        rng, -0.7 * np.arange(16), np.repeat([2, 0.5], [1, 15])
    ),
    "16 equal, spread 1": lambda rng: _normal(rng, np.zeros(16), np.ones(16)),
}


def bench_race(sweeps: Sequence[Path], num_races: int) -> str:
    """A Markdown table: a row for each kind of points. Raises UserError for a sweep without seeds."""
    cases = {**SIMULATED, **{folder.name: _resampled(folder) for folder in sweeps}}
    runs, regrets = ("race", _TOLERANT, "all contenders"), ("one run of each", "equal shares", "race", _TOLERANT, _ALL)
    head = ["points", *(f"runs: {arm}" for arm in runs), *(f"regret: {arm}" for arm in regrets)]
    head += ["picks the best: equal shares", "picks the best: race", "race does not rule it out", "points left"]
    rows = []
    for name, case in cases.items():
        arms = simulate(case, num_races)
        race, equal = arms["race"], arms["equal shares"]
        cells = [f"{arms[arm][0]:.0f}" for arm in runs] + [f"{arms[arm][1]:.3f}" for arm in regrets]
        rows.append([name, *cells, f"{equal[2]:.0%}", f"{race[2]:.0%}", f"{race[3]:.1%}", f"{race[4]:.1f}"])
    return markdown(head, rows)


def simulate(case: Case, num_races: int) -> dict[str, np.ndarray]:
    """For each way to spend seeds the means of: runs, regret, whether the best point was picked, whether it was not
    ruled out, and how many points were not.
    """
    found: dict[str, list[Sequence[float]]] = {}
    for number in range(num_races):
        means, scores = case(np.random.default_rng(number))
        for arm, counts in _arms(scores):
            runs = {point: row[:count].tolist() for point, (row, count) in enumerate(zip(scores, counts, strict=True))}
            left = list(contenders(runs))
            best = int(np.argmax(means))
            judged = (sum(counts), means[best] - means[left[0]], left[0] == best, best in left, len(left))
            found.setdefault(arm, []).append(judged)
    return {arm: np.mean(judged, axis=0) for arm, judged in found.items()}


def _arms(scores: np.ndarray) -> Iterator[tuple[str, list[int]]]:
    """Ways to spend seeds, and how many runs each gives to each point."""
    num_points = len(scores)

    def raced(due: Callable[[Mapping[int, Sequence[float]]], Sequence[int]]) -> list[int]:
        runs = {point: [float(row[0])] for point, row in enumerate(scores)}
        while points := due(runs):
            for point in points:
                runs[point].append(float(scores[point, len(runs[point])]))
        return [len(by_seed) for by_seed in runs.values()]

    def all_contenders(runs: Mapping[int, Sequence[float]]) -> list[int]:
        left = list(contenders(runs))
        return [point for point in left if len(runs[point]) < MAX_SEEDS] if len(left) > 1 else []

    def of_a_race(min_difference: float = 0.0) -> list[int]:
        config = Race(max_seeds=MAX_SEEDS, min_difference=min_difference)
        return raced(lambda runs: [point for point, _ in next_round(config, runs)])

    race = of_a_race()
    share, rest = divmod(sum(race), num_points)
    yield "one run of each", [1] * num_points
    yield "race", race
    yield _TOLERANT, of_a_race(0.5)
    yield "all contenders", raced(all_contenders)
    yield "equal shares", [share + (point < rest) for point in range(num_points)]
    yield _ALL, [MAX_SEEDS] * num_points


def _resampled(sweep_dir: Path) -> Case:
    """Draws from each point's recorded runs; their mean counts as the truth."""
    state = replay(read_ledger(sweep_dir))
    if state.began is None:
        raise UserError(f"{sweep_dir}: no sweep was started here")
    by_seed = scores_by_seed(Space.model_validate(state.began.space), state.trials.values())
    pools = [[score for score in runs if score is not None] for runs in by_seed.values()]
    if not pools or min(map(len, pools)) < 3:
        raise UserError(f"{sweep_dir}: every point needs 3 runs or more; give the sweep seeds")
    means = np.array([np.mean(pool) for pool in pools])
    return lambda rng: (means, np.array([rng.choice(pool, MAX_SEEDS) for pool in pools]))
