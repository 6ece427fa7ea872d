"""Run by MicroPython or CPython: vectors.py EXAMPLE_FOLDER GOLDEN_FOLDER. Prints how many vectors have passed."""

import binascii
import json
import sys

sys.path.insert(0, sys.argv[1])
import aiflow_board

USED = [name for _, name, _, _ in aiflow_board.FIELDS]


def read(name):
    with open(f"{sys.argv[2]}/{name}.json") as file:
        return json.load(file)


def raw(value):
    """A vector's value: bytes are written as an object with the key hex."""
    if isinstance(value, list):
        return [raw(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "hex" in value:
        return binascii.unhexlify(value["hex"])
    return {key: raw(item) for key, item in value.items()}


def is_refused(data):
    try:
        aiflow_board.read_reply(data)
    except ValueError:
        return True
    return False


passed = 0
for vector in read("envelope"):
    name, data, array = vector["name"], binascii.unhexlify(vector["bytes"]), raw(vector["array"])
    is_present = "read_as" not in vector
    assert aiflow_board.unpack(data) == array, name
    assert aiflow_board.unpack(aiflow_board.pack(array)) == array, name
    for size in range(len(data)):
        assert is_refused(data[:size]), name
    if name.startswith("reply"):
        reply = aiflow_board.read_reply(data)
        assert [reply[name] for name in ("id", "status", "final", "label")] == [
            array[1],
            array[2],
            True,
            reply["label"],
        ]
        assert len(array) < 15 or reply["label"] == array[14], name
    elif array[6] == 1 and is_present:
        _, request_id, bundle, _, age_ms, budget_ms, _, jpeg, _, options, _ = array
        again = aiflow_board.pack_request(request_id, jpeg, age_ms, budget_ms, options, bundle)
        # MicroPython does not keep the order of a map.
        assert again == data or (len(options) > 1 and aiflow_board.unpack(again) == array), name
    passed += 1
for vector in read("refused")["replies"]:
    if vector.get("field", "id") in USED:
        assert is_refused(binascii.unhexlify(vector["bytes"])), vector["name"]
        passed += 1
print(passed)
