"""From photos and captions to a bundle, in numbered stages. Each can be read alone and continues after an interruption.

python -m models.recipe --images DIR_OR_TAR ... --captions TSV ... --unlabelled DIR_OR_TAR ... --texts FILE ...
    --labelled DIR_OR_TAR ... --out models/zoo/NAME
"""
