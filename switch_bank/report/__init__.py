"""One page, report.html, that shows what a run did: its curves, its routers' loads and where each token of a text went.

`runs` reads what a run wrote, `charts` draws it, `microscope` follows a text through the routers, `page` puts all of it
into one file, and `command` is `python -m switch_bank report`.
"""

from switch_bank.report.command import main

__all__ = ["main"]
