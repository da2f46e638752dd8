"""A report as a picture: `python -m loadtest.picture REPORT.html [PICTURE.png]`. Needs Chromium or Chrome on the machine.

Owns the call of the browser, without a window or a network. Knows nothing of what is on the page.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
WIDTH: Final = 880
HEIGHT: Final = 1400  # the verdicts and the first charts
TIMEOUT_S: Final = 60.0


def picture(page: Path, out: Path, *, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Writes the upper part of the page as PNG. Raises FileNotFoundError without a browser, CalledProcessError if it fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"none of these is installed: {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        words += [f"--window-size={width},{height}", f"--screenshot={out.resolve()}", page.resolve().as_uri()]
        subprocess.run([browser, *words], check=True, capture_output=True, timeout=TIMEOUT_S)
    if not out.exists():
        raise FileNotFoundError(f"{browser} has written no {out}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.picture", description="A report as PNG.")
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path, nargs="?", help="the picture (the page's name with .png)")
    parser.add_argument("--height", type=int, default=HEIGHT, help=f"in pixels, from the top ({HEIGHT})")
    arguments = parser.parse_args()
    out = arguments.out or arguments.page.with_suffix(".png")
    picture(arguments.page, out, height=arguments.height)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
