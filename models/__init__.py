"""The model family: networks, training recipe, export, and the trained bundles.

- `family.py`, `lookahead.py`: the networks that a server runs
- `questions.py`, `teaching.py`: questions that a user teaches with a few photos
- `tower_tail.py`, `distilling.py`: features as the image tokens of somebody's vision-language model
- `language_model.py`: a pretrained language model that reads the features
- `captions.py`: captions files, and the words that are trained on and scored
- `recipe/`: numbered scripts from photos and captions to a bundle
- `export/`: int8 files for the board
- `zoo/`: trained bundles; SHIPPED_BUNDLE is the default of the tools
"""

from pathlib import Path

SHIPPED_BUNDLE = Path(__file__).parent / "zoo" / "everyday-lite0"
