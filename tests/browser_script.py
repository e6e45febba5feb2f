"""Open a page in headless Chromium (Qt WebEngine), photograph it and print what the browser saw as JSON.

    python tests/browser_script.py PAGE.html PICTURE.png [--width 375] [--height 800] [--dark]

Without ``--height`` the picture shows the whole page.
"""

import argparse
import json
import os
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("page", type=Path)
parser.add_argument("picture")
parser.add_argument("--width", type=int, default=1200)
parser.add_argument("--height", type=int)
parser.add_argument("--dark", action="store_true")
given = parser.parse_args()

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # containers have none; the page is our own
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
    f"--disable-gpu --blink-settings=preferredColorScheme={0 if given.dark else 1}"
)

from PySide6.QtCore import QTimer, QUrl  # noqa: E402  # reads the environment
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineSettings, QWebEngineUrlRequestInterceptor  # noqa: E402
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402

TALL = 9000  # pixels: what a picture can hold of a page
SEEN = """JSON.stringify({
    title: document.title,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor,
    width: innerWidth,
    scroll_width: document.documentElement.scrollWidth,
    height: Math.ceil(document.body.getBoundingClientRect().height),
    outside: [...document.querySelectorAll("body *")].filter(element =>
        element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll, pre, svg")
    ).map(element => element.outerHTML.slice(0, 100)),
    charts: [...document.querySelectorAll("figure > svg")].map(svg => svg.getBoundingClientRect().width),
    colours: [...new Set(
        [...document.querySelectorAll("figure > svg path")].map(path => getComputedStyle(path).stroke)
    )],
    pictures: [...document.images].map(image => image.complete && image.naturalWidth),
})"""


class Requests(QWebEngineUrlRequestInterceptor):
    urls: list[str] = []  # noqa: RUF012

    def interceptRequest(self, info):
        self.urls.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    messages: list[str] = []  # noqa: RUF012

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.messages.append(message)


def photograph(seen, before=None):
    """Save a picture once the page is painted: it is not blank, and two pictures are the same."""
    height = given.height or min(json.loads(seen)["height"], TALL)
    picture = view.grab().toImage().copy(0, 0, given.width, height)
    blank = picture.copy()
    blank.fill(picture.pixelColor(0, 0))
    if picture == blank or picture != before:
        QTimer.singleShot(300, lambda: photograph(seen, picture))
        return
    picture.save(given.picture)
    print(json.dumps({**json.loads(seen), "messages": page.messages, "requests": requests.urls}))
    app.quit()


app = QApplication([])
view, requests = QWebEngineView(), Requests()
page = Page(view)
page.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)  # as on a phone
page.setUrlRequestInterceptor(requests)
view.setPage(page)
view.resize(given.width, given.height or TALL)
view.show()
page.loadFinished.connect(lambda ok: page.runJavaScript(SEEN, lambda seen: photograph(seen)) if ok else app.exit(1))
view.load(QUrl.fromLocalFile(given.page.resolve()))
raise SystemExit(app.exec())
