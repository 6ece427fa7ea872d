"""The options that name a broker are the same everywhere, and TLS is the default for one on another machine."""

import argparse
from types import ModuleType

import pytest

from firmware_tools import bundle, run, setup, ui, watch
from firmware_tools.broker_arguments import add_broker_arguments, mqtt_table


def options(module: ModuleType, *path: str) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    for name in path:
        (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = action.choices[name]
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("where", [(run,), (setup,), (watch,), (ui,), (bundle, "push")])
def test_each_command_has_all_of_them(where: tuple[ModuleType, str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_broker_arguments(parser)
    assert {option for action in parser._actions for option in action.option_strings} <= options(*where)


@pytest.mark.parametrize(
    ("given", "host", "port", "tls"),
    [
        ("", "127.0.0.1", 1883, False),
        ("--tls", "127.0.0.1", 8883, True),
        ("--ca-file ca.pem", "127.0.0.1", 8883, False),  # which implies it
        ("--broker broker.lan", "broker.lan", 8883, True),
        ("--broker broker.lan --insecure", "broker.lan", 1883, False),
        ("--broker broker.lan --ca-file ca.pem --broker-port 1884", "broker.lan", 1884, False),
    ],
)
def test_a_broker_elsewhere_has_tls_and_its_port_follows(given: str, host: str, port: int, tls: bool) -> None:
    parser = argparse.ArgumentParser()
    add_broker_arguments(parser)
    table = mqtt_table(parser.parse_args(given.split()))
    assert (table["host"], table["port"], table.get("tls", False)) == (host, port, tls)
