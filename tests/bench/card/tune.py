"""Part "tune": the tiles of the experts' kernels, from measurements on this card.

Of each line of the table the tiles that it has are timed first, then others, in an order that is another one in each
run, for as long as the line's share of the time lasts. So the table gets no worse, and more runs find more.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

import torch
from triton.runtime.errors import OutOfResources

from engine.backends.cuda.launch import Launch
from engine.backends.cuda.moe import ExpertWeights, down_launch, up_launch
from engine.backends.cuda.routing import ExpertBlocks, group_blocks
from engine.backends.cuda.tiles import (
    MIN_BLOCK_M,
    ExpertTiles,
    Tile,
    candidates,
    card_name,
    read_table,
    table_path,
    why_not_grouped,
    write_table,
)
from engine.routing.base import Routing
from tests.bench.card.bench import Bench
from tests.bench.card.expert_times import ROWS, TINY_ROWS, make_weights, runner, tile_table, weight_dtypes
from tests.bench.card.inputs import normal, simulated
from tests.bench.card.report import PART_SECONDS, Part, Setting

Choice = tuple[int, str, Tile]
"""block_m, up or down, and a tile to try for it."""
Best = dict[tuple[int, str], tuple[float, Tile]]
"""By block_m and kernel: the microseconds of a tile."""


@torch.inference_mode()
def tune(setting: Setting, part: Part) -> None:
    """Writes the lines to DIR/tiles.txt, and to the table in the checkout unless this is --tiny."""
    bench = Bench.make(setting, part)
    write_table(setting.out / "tiles.txt", read_table(table_path()))
    seed = time.time_ns()  # one for all lines: they try the same tiles first, which are compiled once
    all_rows = TINY_ROWS if bench.tiny else ROWS
    dtypes = weight_dtypes(bench)[:2]  # one of 16 bits and one of 8
    for index, weight_dtype in enumerate(dtypes):
        weights = make_weights(bench, weight_dtype)
        for number, num_rows in enumerate(all_rows):
            if not part.has_time(f"{weight_dtype} {num_rows}"):
                return
            lines_left = (len(dtypes) - index) * len(all_rows) - number
            line = Tuner(bench, weights, num_rows, seed).line((PART_SECONDS - part.seconds) / lines_left)
            write_table(setting.out / "tiles.txt", [line])
            if not bench.tiny:
                write_table(table_path(), [line])


class Tuner:
    """One line of the table: a number of rows, whose assignments are spread evenly, and weights."""

    def __init__(self, bench: Bench, weights: ExpertWeights, num_rows: int, seed: int) -> None:
        self._seed = seed
        self._bench = bench
        self._weights = weights
        self._num_rows = num_rows
        self._name = str(weights.w13.dtype).removeprefix("torch.")
        model = bench.model
        self._routing: Routing = simulated("even", num_rows, model.num_experts, model.num_experts_per_tok, bench.device)
        self._x = normal(num_rows, model.hidden_size, device=bench.device, dtype=bench.dtype)
        num_assignments = self._routing.expert_ids.numel()
        self._middle = normal(num_assignments, model.intermediate_size, device=bench.device, dtype=bench.dtype)
        self._grouped = normal(num_assignments, model.hidden_size, device=bench.device, dtype=bench.dtype)

    def line(self, seconds: float) -> ExpertTiles:
        """The best that is found in that time."""
        start = time.perf_counter()
        current = self._current()
        best: Best = {}
        for block_m, kernel, tile in [*self._choices_of(current), *self._others()]:
            if time.perf_counter() - start > seconds and _complete(best):
                break
            microseconds = self._time(block_m, kernel, tile)
            if microseconds is not None and (best.get((block_m, kernel)) or (microseconds,))[0] >= microseconds:
                best[block_m, kernel] = microseconds, tile
        block_m = min(_complete(best), key=lambda size: best[size, "up"][0] + best[size, "down"][0])
        line = ExpertTiles(
            card=card_name(self._bench.card.capability),
            bits=8 * self._weights.w13.itemsize if self._weights.w13_scale is not None else 16,
            rows=self._num_rows,
            block_m=block_m,
            up=best[block_m, "up"][1],
            down=best[block_m, "down"][1],
            grouped=False,
            source=self._source(),
        )
        return replace(line, grouped=self._prefers_grouped(line))

    def _current(self) -> ExpertTiles:
        return tile_table(self._bench, self._weights.w13.dtype).choose(self._num_rows)

    def _choices_of(self, line: ExpertTiles) -> list[Choice]:
        return [(line.block_m, "up", line.up), (line.block_m, "down", line.down)]

    def _others(self) -> Iterator[Choice]:
        """Tiles of up and of down in turns, of one block_m after another."""
        shuffle = random.Random(self._seed).shuffle
        lists: list[list[Choice]] = []
        for block_m, ups, downs in candidates(self._num_rows, self._weights.w13.dtype, self._bench.card.capability):
            for kernel, tiles in (("up", list(ups)), ("down", list(downs))):
                shuffle(tiles)
                lists.append([(block_m, kernel, tile) for tile in tiles])
        for turn in zip_longest(*lists):
            yield from (choice for choice in turn if choice is not None)

    def _time(self, block_m: int, kernel: str, tile: Tile) -> float | None:
        """Microseconds; None where the tile needs more than the card has."""
        blocks = group_blocks(self._routing.expert_ids, self._bench.model.num_experts, block_m)
        try:
            microseconds = self._bench.clock.microseconds(self._launch(blocks, kernel, tile).run)
        except OutOfResources:
            microseconds = None
        self._bench.part.row(
            "tiles",
            rows=self._num_rows,
            weights=self._name,
            block_m=block_m,
            kernel=kernel,
            tile=str(tile),
            us=microseconds,
        )
        return microseconds

    def _launch(self, blocks: ExpertBlocks, kernel: str, tile: Tile) -> Launch:
        if kernel == "up":
            num_choices = self._routing.expert_ids.shape[1]
            return up_launch(self._x, self._weights, blocks, num_choices, self._middle, tile)
        return down_launch(self._middle, self._weights, self._routing.weights, blocks, self._grouped, tile)

    def _prefers_grouped(self, line: ExpertTiles) -> bool:
        """Whether torch's grouped products, where the card has them, are faster than the line."""
        bench, weights = self._bench, self._weights
        sizes = bench.model.hidden_size, bench.model.intermediate_size
        if bench.card.capability < (9, 0) or why_not_grouped(bench.dtype, weights.w13.dtype, *sizes) is not None:
            return False
        grouped = replace(line, grouped=True, block_m=MIN_BLOCK_M)
        times = {}
        for name, tiles in (("kernels", line), ("grouped", grouped)):
            run = runner(self._x, weights, self._routing, tiles, torch.zeros_like(self._x))
            times[name] = bench.clock.microseconds(run)
        bench.part.row("grouped", rows=self._num_rows, weights=self._name, **times)
        return times["grouped"] < times["kernels"]

    def _source(self) -> str:
        device = self._bench.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def _complete(best: Best) -> list[int]:
    """The values of block_m for which both kernels have a tile."""
    return [block_m for block_m, kernel in best if kernel == "up" and (block_m, "down") in best]
