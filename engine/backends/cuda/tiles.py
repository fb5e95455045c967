"""Which tiles the experts' kernels use: a table by card, width of the weights and rows, kept in tiles.txt.

Rows are the tokens T of a step. The table was made for Mixtral: 8 experts, 2 of them for a token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path

import torch

log = logging.getLogger(__name__)

MIN_BLOCK_M = 16
"""The smallest side of a product that tensor cores take."""

_COLUMNS = (
    *("card", "bits", "rows", "block_m"),
    *(f"{kernel}.{name}" for kernel in ("up", "down") for name in ("n", "k", "group", "warps", "stages")),
    *("grouped", "source"),
)

_HEADER = """\
# Tiles of the experts' kernels (engine/backends/cuda/tiles.py): the line for a step is that with the smallest number of
# rows that is not below its own. up and down: output columns and depth of a tile, blocks of rows that take turns at a
# column, warps, stages of the pipeline. grouped: yes where torch's grouped product is faster, if it has one for the
# dtype. source: the card it was measured on, or a guess.
"""

_MAX_SHARED = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
"""Bytes of shared memory that one program can have, by capability; others have SMALLEST_SHARED."""

SMALLEST_SHARED = 101_376
"""What every card from sm_80 on has. The tiles of sm_80 keep to it, since they serve all cards without their own."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How one of the products is cut: see engine/kernels/triton/moe.py."""

    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """A line of the table: for steps of up to `rows` tokens."""

    card: str
    """sm_80, sm_90, …"""
    bits: int
    """Of a weight."""
    rows: int
    block_m: int
    """What assignments are grouped by."""
    up: Tile
    down: Tile
    grouped: bool
    """Whether torch's grouped products take the place of the kernels."""
    source: str

    @property
    def key(self) -> tuple[str, int, int]:
        return self.card, self.bits, self.rows


@dataclass(frozen=True, slots=True)
class TileTable:
    """The lines for one model on one card, in ascending order of rows."""

    lines: tuple[ExpertTiles, ...]

    @classmethod
    def load(
        cls,
        *,
        capability: tuple[int, int],
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        hidden_size: int,
        intermediate_size: int,
    ) -> TileTable:
        """The table that is installed, for activations of `dtype`. Says in the log when grouped products would serve,
        but cannot."""
        bits = 16 if weight_dtype == dtype else 8
        entries = [entry for entry in read_table(table_path()) if entry.bits == bits]
        own = [entry for entry in entries if entry.card == card_name(capability)]
        lines = sorted(own or (entry for entry in entries if entry.card == "sm_80"), key=lambda entry: entry.rows)
        if dtype == torch.float32:
            lines = [_for_float32(entry) for entry in lines if entry.block_m <= 64]
        if any(entry.grouped for entry in lines):
            reason = why_not_grouped(dtype, weight_dtype, hidden_size, intermediate_size)
            if reason is not None:
                log.info("the experts of large batches do without torch's grouped products: %s", reason)
                lines = [replace(entry, grouped=False) for entry in lines]
        return cls(tuple(replace(entry, block_m=MIN_BLOCK_M) if entry.grouped else entry for entry in lines))

    def choose(self, rows: int) -> ExpertTiles:
        """Tiles for a step of `rows` tokens, and whether torch's grouped products serve it."""
        return next((entry for entry in self.lines if rows <= entry.rows), self.lines[-1])


def why_not_grouped(
    dtype: torch.dtype, weight_dtype: torch.dtype, hidden_size: int, intermediate_size: int
) -> str | None:
    """What keeps torch's grouped products from these weights, on a card that has them; None if nothing does."""
    if dtype != torch.bfloat16:
        return f"they are for bfloat16, not {str(dtype).removeprefix('torch.')}"
    if weight_dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return f"there are none for weights of {str(weight_dtype).removeprefix('torch.')}"
    multiple = 16 // weight_dtype.itemsize
    if hidden_size % multiple or intermediate_size % multiple:
        return f"sizes {hidden_size} and {intermediate_size} are not multiples of {multiple}"
    return None


def card_name(capability: tuple[int, int]) -> str:
    """The card as the table calls it. Example: (9, 0) is sm_90."""
    return "sm_{}{}".format(*capability)


def table_path() -> Path:
    """The table that is installed."""
    return Path(__file__).with_name("tiles.txt")


def read_table(path: Path) -> list[ExpertTiles]:
    """All lines of a table. Raises ValueError for one that is not of the form."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [_parse(line) for line in lines]


def write_table(path: Path, entries: Iterable[ExpertTiles]) -> None:
    """Write `entries` over the lines of the same card, width and rows; other lines of the file stay."""
    merged = {entry.key: entry for entry in read_table(path)} if path.exists() else {}
    merged |= {entry.key: entry for entry in entries}
    order = sorted(merged, key=lambda key: (_number(key[0]), -key[1], key[2]))
    rows = [_COLUMNS, *(_fields(merged[key]) for key in order)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names, *lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    path.write_text("\n".join([f"{_HEADER}#", f"# {names}", *(f"  {line}" for line in lines)]) + "\n")


def shared_bytes(tile: Tile, block_m: int, *, matrices: int, bits: int, capability: tuple[int, int]) -> int:
    """Bytes of shared memory of a program's pipeline, with `matrices` tiles of weights in a stage: 2 for up, 1 for
    down.

    Hopper's products read shared memory while they run, which takes a stage more; 8-bit weights go through registers.
    Example, 16 by 64 by 128, 3 stages, up, on sm_90: of 16 bits 3 * 128 * 2 * (16 + 2 * 64) = 110,592; of 8 bits
    3 * 128 * 2 * 16 for activations and 2 * 128 * 2 * 64 for weights, 45,056.
    """
    hopper = capability == (9, 0)
    activation_stages = tile.num_stages if hopper else tile.num_stages - 1
    weight_stages = tile.num_stages if hopper and bits == 16 else tile.num_stages - 1
    activations = activation_stages * 2 * block_m
    return tile.block_k * (activations + weight_stages * bits // 8 * matrices * tile.block_n)


def candidates(rows: int, dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple[int, list[Tile], list[Tile]]]:
    """What is worth timing for steps of `rows` tokens with weights of `dtype`: block_m, and the tiles of up and of down
    to try with it.

    block_m is around the assignments of an expert under even routing, rows / 4. Of the stages only the most that let
    one program into a multiprocessor, and the most that let two.
    """
    mean, bits = rows / 4, 8 * dtype.itemsize
    sizes = [size for size in (16, 32, 64, 128) if min(mean / 4, 64) <= size <= max(16, 4 * mean)]
    return [
        (size, *(_tiles(rows, size, matrices, bits, capability) for matrices in (2, 1)))  # type: ignore[misc]
        for size in sizes
    ]


def _tiles(rows: int, block_m: int, matrices: int, bits: int, capability: tuple[int, int]) -> list[Tile]:
    limit = _MAX_SHARED.get(capability, SMALLEST_SHARED)
    found = []
    for block_n, block_k, num_warps in product((64, 128, 256), (64, 128, 256), (4, 8)):
        threads = 32 * num_warps
        sums, passing = matrices * block_n * block_m // threads, block_n * block_k // threads
        if capability == (9, 0) and bits == 16:
            passing = 0  # wgmma reads weights from shared memory, if they need not be widened
        if sums > 128 or sums + passing > 160 or block_n < 16 * num_warps:
            continue  # what was compiled shows that registers do not suffice; a warp has 16 columns at least
        for share, group_m in product((limit, limit // 2), (16,) if rows <= 512 else (8, 32)):
            depths = (Tile(block_n, block_k, group_m, num_warps, stages) for stages in range(6, 1, -1))
            sizes = {
                tile: shared_bytes(tile, block_m, matrices=matrices, bits=bits, capability=capability)
                for tile in depths
            }
            found += [tile for tile, size in sizes.items() if size <= share][:1]
    return list(dict.fromkeys(found))


def _for_float32(entry: ExpertTiles) -> ExpertTiles:
    """A quarter of the depth: elements are larger, and products without tensor cores take registers."""
    up, down = (replace(tile, block_k=tile.block_k // 4) for tile in (entry.up, entry.down))
    return replace(entry, up=up, down=down)


def _parse(line: str) -> ExpertTiles:
    fields = line.split(None, len(_COLUMNS) - 1)
    if len(fields) != len(_COLUMNS) or fields[14] not in ("yes", "no"):
        raise ValueError(f"not a line of the table of tiles: {line!r}")
    bits, rows, block_m, *numbers = map(int, fields[1:14])
    up, down = Tile(*numbers[:5]), Tile(*numbers[5:])
    return ExpertTiles(fields[0], bits, rows, block_m, up, down, fields[14] == "yes", fields[15])


def _fields(entry: ExpertTiles) -> tuple[str, ...]:
    numbers = (entry.bits, entry.rows, entry.block_m, *astuple(entry.up), *astuple(entry.down))
    return entry.card, *map(str, numbers), "yes" if entry.grouped else "no", entry.source


def _number(card: str) -> int:
    return int(card.removeprefix("sm_"))
