"""Programs of `support` in processes of their own, in which nothing of glm3 is loaded."""

import json
import subprocess
import sys
from types import ModuleType
from typing import Any


def printed(program: ModuleType, *arguments: object) -> Any:
    """The JSON that a program prints; its error fails the test."""
    done = subprocess.run(
        [sys.executable, str(program.__file__), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
