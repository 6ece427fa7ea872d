"""Newer bundles on a board: signed, received, tried, kept or given up.

The room exports nothing: a running board imports `updates`, and what only signs, checks or lists bundles imports
`signature` and `store`.

- `signature`: who has signed a bundle, its version and its expiry date
- `store`: the installed bundles, which of them runs, and the way back
- `archive`: a bundle in a tar file
- `incoming`: the files of a bundle on their way into the store
- `self_test`: whether a bundle works here, in a process of its own
- `updates`: the same over MQTT, for `aiflow bundle push`

docs/bundles.md says how it is used, docs/protocol.md, section 14, what crosses the network.
"""
