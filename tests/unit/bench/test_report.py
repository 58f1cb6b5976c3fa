"""Do tables, ratios and JSON say what was measured?"""

from __future__ import annotations

import json

from pdtasks.bench.report import Row, format_report, format_size, to_json

_MIB = 1 << 20


def _rows(path: str, put: list[float], get: list[float]) -> list[Row]:
    """Figures for 1 MiB on one and on four connections."""
    return [
        Row(path, op, _MIB, connections, figure)
        for op, figures in (("put", put), ("get", get))
        for connections, figure in zip((1, 4), figures, strict=True)
    ]


def test_each_operation_has_a_table_of_sizes_and_connections_by_path() -> None:
    rows = [*_rows("pdtasks-tcp", [1, 2], [3, 4]), *_rows("valkey-glide-sync", [5, 6], [7, 8.126])]

    put, get, _ = format_report(rows).split("\n\n")

    assert put.splitlines() == [
        "put, GB/s  pdtasks-tcp  valkey-glide-sync",
        "1 MiB × 1         1.00               5.00",
        "1 MiB × 4         2.00               6.00",
    ]
    assert get.splitlines() == [
        "get, GB/s  pdtasks-tcp  valkey-glide-sync",
        "1 MiB × 1         3.00               7.00",
        "1 MiB × 4         4.00               8.13",
    ]


def test_ratios_are_the_geometric_mean_and_the_lowest_with_its_place() -> None:
    rows = [
        *_rows("pdtasks-tcp", [1, 4], [2, 2]),
        *_rows("pdtasks-unix", [3, 3], [4, 4]),
        *_rows("socket-tcp", [2, 2], [4, 2]),
        *_rows("socket-unix", [4, 4], [4, 5]),
        *_rows("valkey-py", [0.5, 1], [9, 9]),
    ]

    ratios = format_report(rows).split("\n\n")[-1]

    one = "1.00 (lowest 0.50 at 1 MiB × 1)"
    two = "0.75 (lowest 0.75 at 1 MiB × 1)"
    assert ratios.splitlines() == [
        f"pdtasks-tcp / socket-tcp: put {one}, get 0.71 (lowest 0.50 at 1 MiB × 1)",
        f"pdtasks-unix / socket-unix: put {two}, get 0.89 (lowest 0.80 at 1 MiB × 4)",
        "pdtasks-tcp / valkey-py: put 2.83 (lowest 2.00 at 1 MiB × 1)",
    ]


def test_a_figure_that_is_not_there_is_a_dash_and_in_no_ratio() -> None:
    rows = [*_rows("pdtasks-tcp", [1, 2], [3, 4]), *_rows("socket-tcp", [1, 2], [3, 4])[:1]]

    put, _, ratios = format_report(rows).split("\n\n")

    assert put.splitlines()[-1].split()[-2:] == ["2.00", "-"]
    assert ratios == "pdtasks-tcp / socket-tcp: put 1.00 (lowest 1.00 at 1 MiB × 1)"


def test_json_is_a_list_of_rows() -> None:
    assert json.loads(to_json([Row("socket-tcp", "get", _MIB, 8, 5.25)])) == [
        {
            "path": "socket-tcp",
            "op": "get",
            "value_bytes": _MIB,
            "connections": 8,
            "gb_per_s": 5.25,
        }
    ]


def test_sizes_are_in_the_unit_that_fits() -> None:
    assert [format_size(size) for size in (512, 65536, _MIB, 16 * _MIB)] == [
        "0.5 KiB", "64 KiB", "1 MiB", "16 MiB",
    ]  # fmt: skip
