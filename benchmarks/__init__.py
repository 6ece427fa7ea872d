"""Measurements, one file per part: quality, speed, the case study and the fault matrix. `aiflow bench` runs them.

- `quality`: captions and labels compared with those of people; `aiflow evaluate` runs it
- `codec`, `head`, `device`, `server`, `gateway`, `policy`: the speed of one part, or its choices
- `e2e`: the case study: board, brokers and servers over simulated links
- `faults`: real processes, one fault after the other, and the outcome of every request
"""
