"""From trained networks to the int8 files that a board runs, once as ONNX and once as LiteRT."""
