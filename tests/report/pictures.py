"""`python tests/report/pictures.py [NAME ...]` keeps a picture of every example page, whole, to be looked at.

At 1440 and 390 pixels, in both themes, with everything folded out that a reader folds out, in
reports/latest/screenshots.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "reports" / "examples"
SHOTS = ROOT / "reports" / "latest" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (1440, 390)


def whole(browser: Browser, page: Path, width: int, theme: str, to: Path) -> None:
    """Keep a picture of a page from top to bottom; charts are drawn where one has scrolled by."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, offline=True
    )
    tab = context.new_page()
    tab.goto(page.as_uri())
    height = tab.evaluate("document.documentElement.scrollHeight")
    for y in range(0, height, 800):
        tab.evaluate(f"scrollTo(0, {y})")
        tab.wait_for_timeout(20)
    tab.evaluate("scrollTo(0, 0)")
    tab.wait_for_timeout(50)
    tab.screenshot(path=to, full_page=True)
    context.close()


def main(names: list[str]) -> int:
    """Take all pictures, or those of some pages; 1 without a browser."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        print("no Chromium: apt-get install chromium", file=sys.stderr)
        return 1
    SHOTS.mkdir(parents=True, exist_ok=True)
    pages = [p for p in sorted(EXAMPLES.glob("*.html")) if not names or p.stem in names]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        for page in pages:
            for width in WIDTHS:
                for theme in ("light", "dark"):
                    to = SHOTS / f"{page.stem}-whole-{width}-{theme}.png"
                    whole(browser, page, width, theme, to)
        browser.close()
    print(f"{len(pages) * len(WIDTHS) * 2} pictures in {SHOTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
