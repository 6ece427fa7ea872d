"""The edge and cloud server; `service.py` is the path of a request and the place to start reading."""
