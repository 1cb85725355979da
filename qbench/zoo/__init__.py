"""The embedded models and corpora: what makes a newcomer's first command work offline."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
