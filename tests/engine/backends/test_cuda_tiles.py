"""The table of tiles: what is chosen, how it is written, and what is tried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.backends.cuda.tiles import (
    SMALLEST_SHARED,
    ExpertTiles,
    Tile,
    TileTable,
    candidates,
    read_table,
    shared_bytes,
    table_path,
    write_table,
)

E4M3 = torch.float8_e4m3fn
BUCKETS = [2**power for power in range(13)]
ENTRY = ExpertTiles("sm_90", 16, 8, 16, Tile(64, 128, 16, 4, 3), Tile(64, 256, 8, 8, 5), True, "a card of 80 GB")


def load(
    capability: tuple[int, int] = (9, 0),
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    sizes: tuple[int, int] = (4096, 14336),
) -> TileTable:
    return TileTable.load(
        capability=capability,
        dtype=dtype,
        weight_dtype=weight_dtype or dtype,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
    )


def test_installed_table_has_a_line_for_every_power_of_two_and_is_as_written(tmp_path: Path) -> None:
    entries = read_table(table_path())
    for card, bits in (("sm_80", 8), ("sm_80", 16), ("sm_90", 8), ("sm_90", 16)):
        assert [entry.rows for entry in entries if (entry.card, entry.bits) == (card, bits)] == BUCKETS
    write_table(tmp_path / "again", reversed(entries))
    assert (tmp_path / "again").read_text() == table_path().read_text()


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (4096, 4096), (9999, 4096)])
def test_choice_is_the_smallest_line_that_suffices(rows: int, bucket: int) -> None:
    assert load().choose(rows).rows == bucket


def test_cards_without_lines_have_those_of_sm_80() -> None:
    for capability in ((8, 0), (8, 6), (8, 9), (12, 0)):
        assert {entry.card for entry in load(capability).lines} == {"sm_80"}
    assert {entry.card for entry in load().lines} == {"sm_90"}


@pytest.mark.parametrize(("weight_dtype", "bits"), [(None, 16), (torch.int8, 8), (E4M3, 8)])
def test_lines_are_those_of_the_width(weight_dtype: torch.dtype | None, bits: int) -> None:
    assert {entry.bits for entry in load(weight_dtype=weight_dtype).lines} == {bits}


@pytest.mark.parametrize("weight_dtype", [None, E4M3])
def test_grouped_products_above_the_rows_of_the_table_in_blocks_of_16(weight_dtype: torch.dtype | None) -> None:
    table = load(weight_dtype=weight_dtype)
    assert not table.choose(512).grouped
    assert table.choose(513).grouped
    assert table.choose(513).block_m == 16
    assert not load((8, 0), weight_dtype=weight_dtype).choose(4096).grouped


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float16}, "they are for bfloat16, not float16"),
        ({"weight_dtype": torch.int8}, "there are none for weights of int8"),
        ({"sizes": (4100, 14336)}, "sizes 4100 and 14336 are not multiples of 8"),
        ({"sizes": (4096, 14344), "weight_dtype": E4M3}, "sizes 4096 and 14344 are not multiples of 16"),
    ],
)
def test_no_grouped_products_where_torch_has_none_and_the_log_says_why(
    options: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        table = load(**options)  # type: ignore[arg-type]
    assert not any(entry.grouped for entry in table.lines)
    assert table.choose(4096).block_m == 128
    assert [record.message.partition(": ")[2] for record in caplog.records] == [reason]


def test_nothing_is_said_where_the_table_has_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load((8, 0), torch.float16)
    assert not caplog.records


def test_float32_has_a_quarter_of_the_depth_and_no_large_blocks() -> None:
    assert load(dtype=torch.float32).choose(1).up.block_k * 4 == load().choose(1).up.block_k
    assert max(entry.block_m for entry in load(dtype=torch.float32).lines) == 64


def test_writing_replaces_lines_of_the_same_key_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "table"
    other, better = replace(ENTRY, card="sm_120"), replace(ENTRY, block_m=32, grouped=False)
    write_table(path, [ENTRY, other])
    write_table(path, [better, replace(ENTRY, rows=4)])
    assert read_table(path) == [replace(ENTRY, rows=4), better, other]


@pytest.mark.parametrize("line", ["sm_90 16 1", "sm_90 16 1 16 64 128 16 4 3 64 128 16 4 5 maybe guess", "a " * 16])
def test_a_line_that_is_none(line: str, tmp_path: Path) -> None:
    (tmp_path / "table").write_text(line)
    with pytest.raises(ValueError, match=r"table of tiles|invalid literal"):
        read_table(tmp_path / "table")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, E4M3])
@pytest.mark.parametrize(("capability", "limit"), [((8, 0), 166_912), ((8, 6), SMALLEST_SHARED), ((9, 0), 232_448)])
def test_candidates_fit(dtype: torch.dtype, capability: tuple[int, int], limit: int) -> None:
    bits = 8 * dtype.itemsize
    for rows in BUCKETS:
        found = candidates(rows, dtype, capability)
        assert found
        for block_m, up, down in found:
            for matrices, tiles in ((2, up), (1, down)):
                assert 0 < len(set(tiles)) == len(tiles) <= 60
                for tile in tiles:
                    size = shared_bytes(tile, block_m, matrices=matrices, bits=bits, capability=capability)
                    assert size <= limit
    assert [block_m for block_m, *_ in candidates(1, dtype, capability)] == [16]
    assert [block_m for block_m, *_ in candidates(4096, dtype, capability)] == [64, 128]
