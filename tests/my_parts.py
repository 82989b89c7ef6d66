"""The parts that the how-to pages write, as a plug-in for the tests."""

import re

from tests.conftest import REPOSITORY

for _kind in ("network", "posterior", "prior", "likelihood", "objective", "metric", "data-source"):
    _page = REPOSITORY / "docs" / "how-to" / f"add-{_kind}.md"
    for _block in re.findall(r"```python\n(.*?)```", _page.read_text("utf-8"), re.DOTALL):
        exec(compile(_block, _page.name, "exec"))
