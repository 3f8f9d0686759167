"""What the tests of pages share: a page as a parser and as a browser see it, and what a user may write."""

import io
import json
from html.parser import HTMLParser

from PIL import Image

HOSTILE = """</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'"&{{data}}<!--"""


def encoded(colour, kind="PNG", size=(48, 32)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


class Elements(HTMLParser):
    """(tag, attributes) of every element; the text of the page outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text, self.data = [("", {})], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found[-1][1].get("id") == "data" and not self.data:
            self.data = data
        elif self.found[-1][0] not in ("script", "style"):
            self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def data_of(page):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(Elements(page).data, parse_constant=refuse)


def seen(tab, where="#first img"):
    """The colour in the middle of the element as the screen shows it."""
    with Image.open(io.BytesIO(tab.locator(where).screenshot())) as shot:
        return shot.convert("RGB").getpixel((shot.width // 2, shot.height // 2))


def wait_until(tab, expression):
    """As Playwright's wait_for_function, which the page's policy forbids for it needs eval."""
    while not tab.evaluate(expression):
        tab.wait_for_timeout(20)
