"""The parts of docs/extending.md, as a plug-in for the tests."""

import re

from tests.conftest import REPOSITORY

_page = (REPOSITORY / "docs" / "extending.md").read_text("utf-8")
exec(
    compile("\n".join(re.findall(r"```python\n(.*?)```", _page, re.DOTALL)), "extending.md", "exec")
)
