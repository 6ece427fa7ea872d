"""Parts that tools, benchmarks and tests share to run a site on one machine.

- `broker`: starts an MQTT broker, Mosquitto or the one in the `iotcore` wheel
- `processes`: starts boards and servers as child processes with generated configurations
- `link_simulator`, `shaping`: a TCP proxy that behaves like a thin link
- `chat_server`, `vllm_server`: other people's servers, which do as they are told
- `arm64`, `emulation`, `board_outputs`: the board's part on emulated arm64, compared with this machine
- `sample_photos`: photos to run on
- `argument_types`: types of command-line arguments; `terminal`: tables and progress bars

It imports `edge_runtime` and nothing else of this project.
"""
