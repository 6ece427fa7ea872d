"""Faults of the brokers, the servers and the link: each as the few lines that cause it and end it."""

import signal

from benchmarks.faults.scenario import Scenario
from benchmarks.faults.site import KEEPALIVE_S, SERVER, SITE, SPARE
from edge_runtime.mqtt import MqttClient, MqttConfig
from edge_runtime.wire import topics
from testbed.broker import PLAIN
from testbed.shaping import PROFILES

EXPELLED_S = 1.5 * KEEPALIVE_S + 2  # a broker drops a silent client after 1.5 keepalives (MQTT 5, 3.1.2.10)


def broker_ends(number: int, scenario: Scenario) -> None:
    scenario.begin()
    scenario.site.broker.signal(number)
    scenario.fault_started()
    scenario.hold()
    scenario.fault_ended()
    scenario.site.broker.start()


def broker_freezes(scenario: Scenario) -> None:
    scenario.begin()
    scenario.site.broker.freeze()
    scenario.fault_started()
    scenario.hold()
    scenario.fault_ended()
    scenario.site.broker.thaw()


def broker_forgets(scenario: Scenario) -> None:
    """Away only as long as a start takes, so that clients still send when all state is lost."""
    scenario.begin()
    scenario.site.broker.signal(signal.SIGKILL)
    scenario.fault_started()
    scenario.fault_ended()
    scenario.site.broker.start()


def server_dies(scenario: Scenario) -> None:
    scenario.begin()
    scenario.site.servers[SERVER].signal(signal.SIGKILL)
    scenario.fault_started()
    scenario.hold()
    scenario.fault_ended()
    scenario.site.servers[SERVER].start()


def server_hangs(scenario: Scenario) -> None:
    """One of two servers hangs. The broker delivers requests to it until it drops the connection."""
    scenario.tables["board"] |= {"deadline_ms": 20_000}
    scenario.begin(SERVER, SPARE)
    scenario.site.servers[SERVER].signal(signal.SIGSTOP)
    scenario.fault_started()
    scenario.hold(max(scenario.seconds, EXPELLED_S))
    scenario.fault_ended()
    scenario.site.servers[SERVER].signal(signal.SIGCONT)


def share_member_dies(scenario: Scenario) -> None:
    """One of two servers is frozen until it holds requests, and then killed together with them."""
    scenario.tables["board"] |= {"deadline_ms": 20_000, "resend_ms": 5000}
    scenario.begin(SERVER, SPARE)
    scenario.site.servers[SERVER].signal(signal.SIGSTOP)
    scenario.interval_s = 0.1
    scenario.fault_started()
    scenario.wait(20.0, lambda: scenario.records.counts().unsettled >= 6)
    held = scenario.records.counts().unsettled
    scenario.expect(held >= 6, "requests in flight at the server that is killed")
    scenario.note(f"{held} in flight when it was killed")
    scenario.site.servers[SERVER].signal(signal.SIGKILL)
    scenario.fault_ended()  # the other server runs all the time
    scenario.hold()


def link_cut(scenario: Scenario) -> None:
    link = scenario.add_link()
    scenario.begin()
    link.set(PROFILES["outage"])
    scenario.fault_started()
    scenario.hold()
    scenario.fault_ended()
    link.set(PROFILES["wifi"])


def duplicate_id(scenario: Scenario) -> None:
    """Another client connects to the servers' broker with the board's id, and stays."""
    scenario.begin()
    intruder = MqttClient(MqttConfig(port=scenario.site.broker.port).settings(scenario.name))
    with intruder:
        scenario.fault_started()
        scenario.hold()
        connects = intruder.stats()["connects"]
        scenario.expect(connects > 0, "the other client's connection")
        scenario.fault_ended()
    evicted = scenario.board_log().count("mqtt offline")
    scenario.note(f"the other client connected {connects} times, the board logged {evicted} losses")


def callbacks_raise(scenario: Scenario) -> None:
    """Every callback raises once, also those of connecting and disconnecting, since the link is reset."""
    link = scenario.add_link(cut_in_outage=True)
    scenario.begin()
    scenario.signal_board(signal.SIGUSR1)
    scenario.fault_started()
    scenario.hold(2.0)
    link.set(PROFILES["outage"])
    scenario.hold(1.0)
    scenario.fault_ended()
    link.set(PROFILES["wifi"])
    scenario.hold(max(scenario.seconds, 15.0))
    raised = sorted(
        {line.split()[-1] for line in scenario.board_log().splitlines() if "InjectedFaultError: in " in line}
    )
    scenario.expect(len(raised) >= 5, "five callbacks that raised")
    scenario.note("raised: " + " ".join(raised))


def loop_thread_dies(scenario: Scenario) -> None:
    scenario.begin()
    scenario.signal_board(signal.SIGUSR1)
    scenario.fault_started()
    scenario.fault_ended()
    scenario.hold()
    scenario.expect("InjectedFaultError" in scenario.board_log(), "the exception in the network thread")


def publish_oversized(scenario: Scenario) -> None:
    """The broker accepts latents but no pictures, and the board offloads pictures."""
    restart(scenario, PLAIN + "max_packet_size 3000\n")
    scenario.tables["board"] |= {"paradigm": "offload"}
    scenario.start_servers(SERVER)
    scenario.start_board()
    scenario.send_frames()
    scenario.fault_started()
    scenario.expect(scenario.wait(30.0, lambda: scenario.records.counts().lost > 0), "refused pictures, reported")
    scenario.hold()
    restart(scenario, PLAIN)
    scenario.fault_ended()
    scenario.expect(scenario.wait(60.0, lambda: scenario.records.answers(scenario.ended_at) > 0), "answers afterwards")
    note_connects(scenario, at_most=3)


def publish_refused(scenario: Scenario) -> None:
    """The access list denies the board's requests and is corrected later."""
    rules = scenario.site.folder / "refuse.acl"
    everything = f"topic readwrite {topics.ROOT}/#\n"
    rules.write_text(everything + f"topic deny {topics.request(SITE, scenario.name)}\n")
    rules.chmod(0o644)
    restart(scenario, PLAIN + f"acl_file {rules}\n")
    scenario.start_servers(SERVER)
    scenario.start_board()
    scenario.send_frames()
    scenario.fault_started()
    scenario.expect(scenario.wait(30.0, lambda: scenario.records.counts().lost > 0), "refused requests, reported")
    scenario.hold()
    rules.write_text(everything)
    scenario.fault_ended()
    scenario.site.broker.signal(signal.SIGHUP)  # mosquitto(8): it reads its access list again
    scenario.expect(scenario.wait(60.0, lambda: scenario.records.answers(scenario.ended_at) > 0), "answers afterwards")
    restart(scenario, PLAIN)
    note_connects(scenario, at_most=3)


def restart(scenario: Scenario, config: str) -> None:
    scenario.site.broker.signal(signal.SIGTERM)
    scenario.site.broker.configure(config)
    scenario.site.broker.start()


def note_connects(scenario: Scenario, at_most: int) -> None:
    connects = scenario.board_log().count("mqtt online")  # one of them to the local broker
    scenario.note(f"{connects} connections of the board")
    scenario.expect(connects <= at_most + 1, "no reconnect loop")
