"""Every kept case to this node and to stock pynetdicom; where the two differ, and why, stands in a table.

python tests/support/differential.py    writes the table anew: known explanations stay, a new difference gets a `?`
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import hostile_cases  # noqa: E402
from listener_process import listening  # noqa: E402
from stock_scp import StockScp  # noqa: E402
from wire_replay import replay  # noqa: E402

TABLE = HERE.parent / "hostile" / "differences.md"
TIMES = 3
"""What differs only now and then is no difference."""
PATIENCE = 1.0
"""An answer that is late on a busy machine must not race with the end of the connection."""
RACE = "Race:"
"""So begins the reason of a row that is there on some days only."""
HEAD = """# This node and stock pynetdicom, case by case

Written by `python tests/support/differential.py`, explained by hand, checked by `tests/hostile/test_differential.py`.
The cases are those of `tests/support/hostile_cases.py` and of `corpus/`; what is not in the table is answered alike.
`AC(1:0)`: accepted, context 1 with result 0. `RP`: release answered. Stock: pynetdicom 3.0.4, a handler that stores
what it is given.

| case | this node | stock pynetdicom | why |
| --- | --- | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """One row."""

    case: str
    ours: str
    stock: str
    why: str = "?"


def differences(folder: Path) -> list[Difference]:
    """As they are now."""
    cases = hostile_cases.named() | hostile_cases.found()
    with (
        warnings.catch_warnings(),
        listening(folder / "ours", idle_timeout=2.0, max_associations_per_peer=64) as node,
        StockScp(folder / "stock") as stock,
        ThreadPoolExecutor(6) as pool,
    ):
        warnings.simplefilter("ignore")

        def one(name: str) -> Difference:
            for _ in range(TIMES):
                ours = str(replay(node.port, cases[name], patience=PATIENCE, timeout=15))
                theirs = _short(str(replay(stock.port, cases[name], patience=PATIENCE, timeout=15)))
                if ours == theirs:
                    break
            return Difference(name, ours, theirs)

        rows = list(pool.map(one, cases))
    return [row for row in rows if row.ours != row.stock]


def _short(words: str) -> str:
    """Stock aborts once for each six bytes that are no PDU."""
    while "ABORT ABORT" in words:
        words = words.replace("ABORT ABORT", "ABORT")
    return words


def table(path: Path = TABLE) -> list[Difference]:
    """As it is written."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            rows.append(Difference(*cells))
    return rows


def main() -> None:
    explained = {row.case: row.why for row in table()}
    with tempfile.TemporaryDirectory() as folder:
        rows = differences(Path(folder))
    lines = [f"| `{r.case}` | `{r.ours}` | `{r.stock}` | {explained.get(r.case, '?')} |" for r in rows]
    TABLE.write_text(HEAD + "\n".join(lines) + "\n")
    print("unexplained:", [row.case for row in rows if explained.get(row.case, "?") == "?"])


if __name__ == "__main__":
    main()
