"""A GPU machine may have no more than torch and pytest: training's tests skip there."""

import importlib.util

NEEDED = ("numpy", "tqdm", "sklearn", "PIL", "matplotlib")
MISSING = [package for package in NEEDED if importlib.util.find_spec(package) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str | None:
    """Says what is left out."""
    return f"left out, {', '.join(MISSING)} not installed: tests/train" if MISSING else None
