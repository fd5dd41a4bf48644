"""What a page carries, read without a browser."""

import html.parser


class Page(html.parser.HTMLParser):
    """The text of a page, and every address that it names.

    Attributes:
      text: what stands outside of styles and scripts.
      addresses: of its links, pictures and scripts.
    """

    def __init__(self, text):
        super().__init__()
        self.text, self.addresses, self.open = "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open = tag
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        if self.open not in ("script", "style"):
            self.text += data
