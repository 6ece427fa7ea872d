"""The networks of the board: pixels to symbols (`head`), to a draft text (`draft`), to `labels`, and their bundle.

- `bundle`: the files of a model family, checked against their manifest
- `backends`: onnxruntime and LiteRT behind one protocol
- `draft_calibration`: from a draft's confidence to its quality relative to the server's text
- `preprocess`: encoded pictures to the head's input; imported by its own name, since it needs OpenCV
"""
