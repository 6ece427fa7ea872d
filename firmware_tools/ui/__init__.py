"""`aiflow ui`: one page for a site, live from its broker. It only reads.

site.py is what is known: rows.py as the browser gets it, answer_view.py how an answer is shown, statuses.py as boards
and servers say it. history.py has the texts to search in. live.py tells browsers what has changed, web.py answers them,
and page/ is what they show.
"""

from firmware_tools.ui.command import add_arguments, run

__all__ = ["add_arguments", "run"]
