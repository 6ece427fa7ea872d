"""Everything that runs on a board; `pipeline.py` is the path of a frame and the place to start reading."""

__version__ = "0.2.0.dev0"
