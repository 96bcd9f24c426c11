"""A path through a small grid: ``S.x/..x/x.G`` -> ``00D10R11D21R22#DRDR``. Every path that arrives is right."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polopt.core.example import Example
from polopt.tasks.task import draw_examples, example_id, final_answer, with_answer

Cell = tuple[int, int]

_MOVES: Mapping[str, Cell] = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
_WALL_SHARE = 0.4
_LONGEST_PATH = 10
_LONGEST_ANSWER = 100
_PATH = re.compile(rf"[UDLR]{{1,{_LONGEST_ANSWER}}}")
_TRACED = re.compile(r"[0-9]{2}([UDLR][0-9]{2})+#[^0-9]*")


@dataclass(frozen=True)
class Grid:
    """Level = side of the square grid. ``S`` start, ``G`` goal, ``x`` wall, ``.`` free; moves ``U D L R``.

    The grid is what can be seen of the task (column ``observation``). Steps are the start cell and then each move with
    the cell it leads to (row and column from 0). The reference is a shortest path, but any path without leaving the
    grid or entering a wall that ends on the goal is right, up to 100 moves. Strategies: ``worked`` (a shortest path,
    traced), ``blind`` (traced, but walls are ignored: ``?`` in front), ``direct`` (moves only, walls ignored).
    """

    name: str = "grid"
    levels: tuple[int, ...] = (3, 4, 5)
    max_new_tokens: int = 48
    strategies: tuple[str, ...] = ("worked", "blind", "direct")
    shares: tuple[float, ...] = (0.25, 0.25, 0.5)

    def examples(
        self, count: int, *, seed: int, split: str = "train", levels: Sequence[int] | None = None
    ) -> list[Example]:
        return draw_examples(self, self._make, count, seed=seed, split=split, levels=levels)

    def _make(self, level: int, rng: random.Random) -> Example | None:
        cells = [(row, column) for row in range(level) for column in range(level)]
        start, goal = rng.sample(cells, 2)
        walls = {cell for cell in cells if cell not in (start, goal) and rng.random() < _WALL_SHARE}
        letters = dict.fromkeys(walls, "x") | {start: "S", goal: "G"}
        prompt = (
            "/".join("".join(letters.get((row, column), ".") for column in range(level)) for row in range(level)) + "\n"
        )
        # Seeded by the prompt, so that one prompt has one reference path.
        moves = _shortest_path(_free_cells(prompt), start, goal, random.Random(prompt))
        if moves is None or not 3 <= len(moves) <= _LONGEST_PATH:
            return None
        return Example(
            id=example_id(self.name, level, prompt),
            prompt=prompt,
            answer=moves,
            steps=tuple(_trace(start, moves)),
            columns={"level": level, "shortest": len(moves), "observation": prompt.rstrip("\n")},
        )

    def score(self, completion: str, example: Example) -> float:
        """1.0 if the text after the last ``#`` is a walk over free cells that ends on the goal."""
        moves = final_answer(completion)
        if moves is None or not _PATH.fullmatch(moves):
            return 0.0
        prompt = str(example.prompt)
        free, here = _free_cells(prompt), _find(prompt, "S")
        for move in moves:
            here = _step(here, move)
            if here not in free:
                return 0.0
        return float(here == _find(prompt, "G"))

    def grade(self, completion: str, example: Example) -> float:
        """1 if right; else half the share of the moves that are made before the first one into a wall or out."""
        if self.score(completion, example):
            return 1.0
        moves = final_answer(completion)
        if moves is None or not _PATH.fullmatch(moves):
            return 0.0
        prompt = str(example.prompt)
        free, here, made = _free_cells(prompt), _find(prompt, "S"), 0
        for move in moves:
            here = _step(here, move)
            if here not in free:
                break
            made += 1
        return 0.5 * made / len(moves)

    def demonstration(self, example: Example, strategy: str, rng: random.Random) -> str:
        prompt = str(example.prompt)
        start, goal = _find(prompt, "S"), _find(prompt, "G")
        if strategy == "worked":
            moves = _shortest_path(_free_cells(prompt), start, goal, rng)
            assert moves is not None, "an example has a path by construction"
            return with_answer(_trace(start, moves), moves)
        down, right = goal[0] - start[0], goal[1] - start[1]
        straight = ["D" if down > 0 else "U"] * abs(down) + ["R" if right > 0 else "L"] * abs(right)
        rng.shuffle(straight)
        moves = "".join(straight)
        return with_answer(["?", *_trace(start, moves)] if strategy == "blind" else (), moves)

    def strategy_of(self, completion: str) -> str:
        if completion.startswith("#"):
            return "direct"
        if completion.startswith("?") and _TRACED.fullmatch(completion[1:]):
            return "blind"
        return "worked" if _TRACED.fullmatch(completion) else "other"


def _free_cells(prompt: str) -> frozenset[Cell]:
    rows = prompt.strip().split("/")
    return frozenset((r, c) for r, row in enumerate(rows) for c, letter in enumerate(row) if letter != "x")


def _find(prompt: str, letter: str) -> Cell:
    rows = prompt.strip().split("/")
    return next((r, row.index(letter)) for r, row in enumerate(rows) if letter in row)


def _step(cell: Cell, move: str) -> Cell:
    down, right = _MOVES[move]
    return cell[0] + down, cell[1] + right


def _trace(start: Cell, moves: str) -> list[str]:
    steps, here = [f"{start[0]}{start[1]}"], start
    for move in moves:
        here = _step(here, move)
        steps.append(f"{move}{here[0]}{here[1]}")
    return steps


def _shortest_path(free: frozenset[Cell], start: Cell, goal: Cell, rng: random.Random) -> str | None:
    """One shortest path, ties broken at random; None if the goal cannot be reached."""
    distance = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for move in _MOVES:
            near = _step(cell, move)
            if near in free and near not in distance:
                distance[near] = distance[cell] + 1
                queue.append(near)
    if start not in distance:
        return None
    moves, here = "", start
    while here != goal:
        options = [move for move in _MOVES if distance.get(_step(here, move), -1) == distance[here] - 1]
        moves += rng.choice(options)
        here = _step(here, moves[-1])
    return moves
