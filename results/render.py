"""Fill the tables of README.md and docs/ from the result files: `python results/render.py` (`--check` only compares).

A table stands between `<!-- table: results/NAME/results.json other.json … -->` and `<!-- end -->`, other files of the
same folder being baselines beside the head; an output copied from a run stands between
`<!-- file: results/NAME/FILE -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from written import table as written_table

from hybrid.bench import markdown_table
from hybrid.evaluation import accuracy_lines, harness_lines

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- (table|file): (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """The text with every block filled anew."""

    def fill(match: re.Match[str]) -> str:
        start, kind, name, more, end = match.groups()
        content = (ROOT / name).read_text()
        if kind == "table":
            results = json.loads(content)
            if "rows" in results:
                body = f"`{results['command']}`, {results['device']}:\n\n{markdown_table(results)}\n"
            elif "compared" in results:
                body = f"`{results['command']}`, scores with standard errors:\n\n{harness_lines(results)}\n"
            elif "exact_match" in results:
                body = f"`{results['command']}`, n and 95% intervals as shown:\n\n{written_table(results)}\n"
            else:
                others = [json.loads((ROOT / name).with_name(other).read_text()) for other in more.split()]
                body = f"`{results['command']}`, n and 95% intervals as shown:\n\n{accuracy_lines(results, *others)}\n"
        else:
            body = f"```\n{content.rstrip()}\n```\n"
        return f"{start}{body}{end}"

    return BLOCK.sub(fill, text)


if __name__ == "__main__":
    for page in (ROOT / "README.md", ROOT / "docs" / "speed.md"):
        rendered = render(page.read_text())
        if "--check" not in sys.argv:
            page.write_text(rendered)
        elif rendered != page.read_text():
            sys.exit(f"{page.name} is not what the result files say: run results/render.py")
