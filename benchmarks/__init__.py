"""Measurements, one file per part: quality, speed, the case study and the fault matrix. `aiflow bench` runs them.

- `quality`: captions and labels against what people wrote; `aiflow evaluate` runs it
- `rate`: quality over bytes, against picture codecs
- `codec`, `static`, `capture`, `device`, `server`, `gateway`: the speed of one part
- `users`: the live page's memory, and what Home Assistant and Prometheus cost a board
- `e2e`: the case study: board, brokers and servers over simulated links
- `faults`: real processes, one fault after the other, and the outcome of every request
"""
