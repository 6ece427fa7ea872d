"""Writes trained networks as the int8 files that a board runs, in ONNX and in LiteRT format."""
