"""Write the rows of a configuration to a file, and with them published Knights & Knaves puzzles to train on.

    python results/puzzles.py configs/islanders_smollm2.yaml --output runs/islanders.jsonl \
        --published ../shared/data/knights_knaves.jsonl

Generated puzzles need not be generated again where the file is read (`--data.path`), and one run can read both kinds.
Of the published training puzzles those with as many people as the configuration generates are taken, each `--copies`
times, in training alone: validation keeps to the generated ones, and the published test puzzles stay unseen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rows import read_rows, write_rows

from hybrid.cli import run_config
from hybrid.data import Example, load_examples


def main(arguments: Sequence[str]) -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--published", type=Path)
    parser.add_argument("--copies", type=int, default=2)
    parsed, flags = parser.parse_known_args(arguments)
    data = run_config([parsed.config, *flags], "train")[0].data
    rows = [to_row(example, split) for split in ("train", "valid", "test") for example in load_examples(data, split)]
    if parsed.published:
        depths = {row["depth"] for row in rows}
        chosen = [row for row in read_rows(parsed.published) if row["split"] == "train" and row["depth"] in depths]
        rows += [row | {"id": f"{row['id']}+{copy}"} for copy in range(parsed.copies) for row in chosen]
    write_rows(parsed.output, rows)
    print(f"{len(rows)} rows")


def to_row(example: Example, split: str) -> dict[str, Any]:
    """An example in canonical columns."""
    answer = {field.name: value for field, value in example.answered}
    fields = [asdict(field) for field in example.fields]
    texts = {"context": example.context, "question": example.question}
    return {"id": example.id, "split": split, "depth": example.depth, **texts, "fields": fields, "answer": answer}


if __name__ == "__main__":
    main(sys.argv[1:])
