"""Fuzzing of everything that comes from outside: see run.py for how, and one file per subject for what.

- wire.py: requests, replies, events, bitstreams, tables, topics
- manifest.py: a bundle's manifest
- update.py: what comes before a new bundle is trusted: its signature, its archive, what crosses the network
- pictures.py: JPEG, PNG, WebP
- configuration.py: board.toml, server.toml, motion masks, link traces
"""
