"""The networks of the board: pixels to symbols (`head`), to a draft text (`draft`), to `labels`, and their bundle.

The room exports nothing: import from its modules. A server uses `bundle`, `preprocess` and `sampling` without the rest.

- `bundle`: the files of a model family, checked against their manifest
- `networks`: all of them, loaded from the bundle; `backends`: onnxruntime and LiteRT behind one protocol
- `choice`: which backend runs them, tried in the child processes of `probe`
- `draft_calibration`: from a draft's confidence to its quality relative to the server's text
- `sampling`, `noise`: which token comes next if it is not the likeliest one
- `rate`, `references`, `reuse`: fewer bytes for a frame: coarser, coded against an earlier one, or not sent
- `preprocess`: decoded pictures to the head's input, or to a JPEG; needs OpenCV
"""
