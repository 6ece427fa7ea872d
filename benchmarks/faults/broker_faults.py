"""Faults of the brokers, the servers and the link: each as the few lines that cause it and end it."""

import signal

from benchmarks.faults.scenario import Scenario
from benchmarks.faults.site import KEEPALIVE_S, SERVER, SITE, SPARE
from edge_runtime.mqtt import MqttClient, MqttConfig
from edge_runtime.wire import topics
from testbed.broker import PLAIN
from testbed.shaping import PROFILES

EXPELLED_S = 1.5 * KEEPALIVE_S + 2  # a broker drops a silent client after 1.5 keepalives (MQTT 5, 3.1.2.10)


def process_ends(name: str, number: int, scenario: Scenario) -> None:
    """The broker or a server ends by a signal, and is started again with empty state."""
    process = scenario.site.processes[name]
    scenario.begin()
    process.signal(number)
    scenario.hold_fault()
    process.start()


def broker_freezes(scenario: Scenario) -> None:
    scenario.begin()
    scenario.site.broker.freeze()
    scenario.hold_fault()
    scenario.site.broker.thaw()


def broker_forgets(scenario: Scenario) -> None:
    """Away only as long as a start takes, so that clients still send when all state is lost."""
    scenario.begin()
    scenario.site.broker.signal(signal.SIGKILL)
    scenario.hold_fault(0.0)
    scenario.site.broker.start()


def server_hangs(scenario: Scenario) -> None:
    """One of two servers hangs. The broker delivers requests to it until it drops the connection."""
    scenario.tables["board"] |= {"deadline_ms": 20_000}
    scenario.begin(SERVER, SPARE)
    scenario.site.processes[SERVER].signal(signal.SIGSTOP)
    scenario.hold_fault(max(scenario.seconds, EXPELLED_S))
    scenario.site.processes[SERVER].signal(signal.SIGCONT)


def share_member_dies(scenario: Scenario) -> None:
    """One of two servers is frozen until it holds requests, and then killed together with them."""
    scenario.tables["board"] |= {"deadline_ms": 20_000, "resend_ms": 5000}
    scenario.begin(SERVER, SPARE)
    scenario.site.processes[SERVER].signal(signal.SIGSTOP)
    scenario.interval_s = 0.1
    scenario.fault_started()
    scenario.wait(20.0, lambda: scenario.counts.unsettled >= 6)
    held = scenario.counts.unsettled
    scenario.expect(held >= 6, "requests in flight at the server that is killed")
    scenario.note(f"{held} in flight when it was killed")
    scenario.site.processes[SERVER].signal(signal.SIGKILL)
    scenario.fault_ended()  # the other server runs all the time
    scenario.hold()


def link_cut(scenario: Scenario) -> None:
    with scenario.outage():
        scenario.hold_fault()


def duplicate_id(scenario: Scenario) -> None:
    """Another client connects to the servers' broker with the board's id, and stays."""
    scenario.begin()
    intruder = MqttClient(MqttConfig(port=scenario.site.broker.port).settings(scenario.name))
    with intruder:
        scenario.hold_fault()
        connects = intruder.stats()["connects"]
    scenario.expect(connects > 0, "the other client's connection")
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
    lines = scenario.board_log().splitlines()
    raised = sorted({line.split()[-1] for line in lines if "InjectedFaultError: in " in line})
    scenario.expect(len(raised) >= 5, "five callbacks that raised")
    scenario.note("raised: " + " ".join(raised))


def loop_thread_dies(scenario: Scenario) -> None:
    scenario.begin()
    scenario.signal_board(signal.SIGUSR1)
    scenario.hold_fault(0.0)
    scenario.hold()
    scenario.expect("InjectedFaultError" in scenario.board_log(), "the exception in the network thread")


def publish_oversized(scenario: Scenario) -> None:
    """The broker accepts latents but no pictures, and the board offloads pictures."""
    restart(scenario, PLAIN + "max_packet_size 3000\n")
    scenario.tables["board"] |= {"paradigm": "offload"}
    begin_refused(scenario)
    restart(scenario, PLAIN)
    scenario.fault_ended()
    expect_answers_afterwards(scenario)


def publish_refused(scenario: Scenario) -> None:
    """The access list denies the board's requests and is corrected later."""
    rules = scenario.site.folder / "refuse.acl"
    everything = f"topic readwrite {topics.ROOT}/#\n"
    rules.write_text(everything + f"topic deny {topics.request(SITE, scenario.name)}\n")
    rules.chmod(0o644)
    restart(scenario, PLAIN + f"acl_file {rules}\n")
    begin_refused(scenario)
    rules.write_text(everything)
    scenario.fault_ended()
    scenario.site.broker.signal(signal.SIGHUP)  # mosquitto(8): it reads its access list again
    expect_answers_afterwards(scenario)


def restart(scenario: Scenario, config: str) -> None:
    scenario.site.broker.signal(signal.SIGTERM)
    scenario.site.broker.configure(config)
    scenario.site.broker.start()


def begin_refused(scenario: Scenario) -> None:
    """Starts server and board at a broker that does not take the board's requests."""
    scenario.start_servers(SERVER)
    scenario.start_board()
    scenario.send_frames()
    scenario.fault_started()
    scenario.expect(scenario.wait(30.0, lambda: scenario.counts.lost > 0), "refused requests, reported")
    scenario.hold()


def expect_answers_afterwards(scenario: Scenario) -> None:
    answered = scenario.wait(60.0, lambda: scenario.records.answers(scenario.ended_at) > 0)
    scenario.expect(answered, "answers afterwards")
    connects = scenario.board_log().count("mqtt online")
    scenario.note(f"{connects} connections of the board")
    scenario.expect(connects <= 4, "no reconnect loop")  # one to the local broker, three to the servers'
