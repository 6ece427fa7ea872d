"""From photos and captions to a bundle: numbered stages, each readable alone, each resumed where it stopped.

python -m models.recipe --images DIR_OR_TAR ... --captions TSV --classes DIR_OR_TAR ... --out models/zoo/NAME
"""
