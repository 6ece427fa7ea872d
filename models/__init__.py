"""The model family: definitions (`family.py`), training recipe, export, and the trained bundles in `zoo/`."""
