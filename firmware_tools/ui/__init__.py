"""`aiflow ui`: one page for a site, live from its broker. It only reads.

site.py is what is known (rows.py: as the browser gets it; statuses.py: as boards and servers say it), history.py the
texts to search in, live.py tells browsers what has changed, web.py answers them, page/ is what they show.
"""

from firmware_tools.ui.command import add_arguments, run

__all__ = ["add_arguments", "run"]
