"""Runs many command lines in one interpreter that has imported the slow libraries once.

`python -m tests.command_lines` reads requests from stdin, one JSON object a line, and answers with
one JSON object a line. Each command line runs in a forked process of its own, so none sees what
another has done to Hydra, to logging or to torch.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

from tests.moments import kill_at

SCRIPTS = Path(__file__).parent.parent / "scripts"


class Ended(NamedTuple):
    """How a command line ended."""

    status: int
    out: str
    error: str


class CommandLines:
    """The other side of the pipe."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.command_lines"],
            cwd=SCRIPTS.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, cwd: Path = SCRIPTS.parent, killed=None):
        """One command line; `killed` are the arguments of `kill_at`."""
        request = {"script": script, "arguments": arguments, "cwd": str(cwd), "killed": killed}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """No more requests."""
        self.process.communicate()


def _answer(request):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            os._exit(_run(request))
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
        return Ended(os.waitstatus_to_exitcode(status), *texts)


def _run(request):
    """What the interpreter does with a script, its exit status included."""
    script = str(SCRIPTS / request["script"])
    sys.argv = [script, *request["arguments"]]
    os.chdir(request["cwd"])
    if request["killed"]:
        kill_at(*request["killed"])
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _serve():
    import hydra  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchvision  # noqa: F401

    import vae_torch.evaluate  # noqa: F401

    sys.path.insert(0, str(SCRIPTS))
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))._asdict()), flush=True)


if __name__ == "__main__":
    _serve()
