"""Where other people's reference data lies, beside the checkout; tests skip where it is absent."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2].parent / "shared"
GOLDEN = SHARED / "golden"

needs_shared = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the reference data folder (../shared) is not here"
)
