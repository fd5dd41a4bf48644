"""What a page of ours carries, read without a browser."""

import html.parser


class Page(html.parser.HTMLParser):
    """The scripts of a page, and every address that it names."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.addresses, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.scripts.append("")
            self.open.append(dict(attrs).get("id"))
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        if tag == "script":
            self.open.append(None)

    def handle_data(self, data):
        if self.open and (self.open[-1] or len(self.open) % 2):
            self.scripts[-1] += data
