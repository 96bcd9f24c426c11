from __future__ import annotations

import itertools

import numpy as np
import pytest

from polopt.core.example import Example
from polopt.tasks.grid import Grid

TASK = Grid()


def arrives(prompt: str, moves: str) -> bool:
    """Walk on an array padded with walls."""
    rows = np.array([list(row) for row in prompt.strip().split("/")])
    padded = np.pad(rows, 1, constant_values="x")
    (here,) = np.argwhere(padded == "S")
    (goal,) = np.argwhere(padded == "G")
    for move in moves:
        here = here + {"U": [-1, 0], "D": [1, 0], "L": [0, -1], "R": [0, 1]}[move]
        if padded[tuple(here)] == "x":
            return False
    return bool((here == goal).all())


@pytest.mark.parametrize("prompt", ["S.x/..x/x.G\n", "Gx./.x./..S\n", "...\n/SxG\n/...\n".replace("\n/", "/")])
def test_all_short_walks_are_judged_as_by_a_padded_array(prompt: str) -> None:
    example = Example(id="g", prompt=prompt)
    arrived = 0
    for length in range(1, 7):
        for moves in itertools.product("UDLR", repeat=length):
            walk = "".join(moves)
            expected = arrives(prompt, walk)
            assert TASK.score(f"#{walk}", example) == float(expected)
            arrived += expected
    assert arrived > 1


def test_the_reference_is_a_shortest_path_and_its_trace_is_true() -> None:
    for example in TASK.examples(60, seed=0, levels=[3, 4]):
        prompt, moves = str(example.prompt), str(example.answer)
        assert arrives(prompt, moves)
        assert len(moves) == example.columns["shortest"] == shortest_by_powers(prompt)
        cells = [step[-2:] for step in example.steps]
        assert "".join(step[:-2] for step in example.steps) == moves
        assert prompt.split("/")[int(cells[0][0])][int(cells[0][1])] == "S"
        assert prompt.split("/")[int(cells[-1][0])][int(cells[-1][1])] == "G"


def shortest_by_powers(prompt: str) -> int:
    """Smallest k with a walk of k moves, from powers of the adjacency matrix."""
    rows = prompt.strip().split("/")
    letters = [(r, c, letter) for r, row in enumerate(rows) for c, letter in enumerate(row)]
    near = np.array(
        [[abs(r - s) + abs(c - d) == 1 and a != "x" and b != "x" for s, d, b in letters] for r, c, a in letters]
    ).astype(int)
    start = next(i for i, cell in enumerate(letters) if cell[2] == "S")
    goal = next(i for i, cell in enumerate(letters) if cell[2] == "G")
    reached = np.eye(len(letters), dtype=int)[start]
    for length in itertools.count(1):
        reached = np.minimum(reached @ near, 1)
        if reached[goal]:
            return length
    raise AssertionError


def test_a_reference_does_not_depend_on_the_draw() -> None:
    pools = [TASK.examples(400, seed=seed, levels=[3]) for seed in (0, 1)]
    first, second = ({example.prompt: example for example in pool} for pool in pools)
    shared = first.keys() & second.keys()
    assert shared
    assert all(first[prompt] == second[prompt] for prompt in shared)
