"""The parts of docs/extending.md, as a plug-in for the tests."""

import re

from tests.conftest import REPOSITORY

_page = (REPOSITORY / "docs" / "extending.md").read_text("utf-8")
_blocks = re.findall(r"```python\n(.*?)```", _page, re.DOTALL)
exec(compile("\n".join(_blocks), "extending.md", "exec"))
