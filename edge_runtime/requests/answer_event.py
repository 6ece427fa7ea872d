"""The event that a server's reply is to the board's users: a function of values."""

import msgspec

from edge_runtime.wire import AnsweredBy, Event, EventHop, Reply, Tier, decode_object


def answer_event(event: Event, reply: Reply, text: str) -> Event:
    """The frame's event so far, with the answer in its place. text: that of the reply, or of its tokens.

    Raises EnvelopeError if the reply claims a JSON object that its text is not.
    """
    checked = reply.checked
    return msgspec.structs.replace(
        event,
        type="update",
        final=reply.final,
        tokens=tuple(reply.token_ids),
        text=text,
        answered_by=AnsweredBy("cloud" if reply.tier is Tier.CLOUD else "edge", reply.server),
        accepted=reply.accepted,
        proposed=reply.proposed,
        passes=reply.passes,
        hops=tuple(EventHop.from_hop(hop) for hop in reply.hops),
        label=reply.label,
        scores=reply.scores or {},
        confidence=reply.confidence,
        unsure=reply.unsure,
        cut=reply.is_cut,
        answers=reply.answers or {},
        object=decode_object(reply.text) if checked and checked.valid else None,
        schema=checked.schema if checked else "",
        valid=checked.valid if checked else None,
    )
