"""Which requests a server refuses before it works on them, and why: a function of values."""

from typing import NamedTuple

from edge_runtime.wire import ContentKind, Request, Status
from server.escalation import is_loop
from server.targets import Abilities


class Refusal(NamedTuple):
    """UNKNOWN_BUNDLE: another server of the pool may answer. BAD_REQUEST: this one never can."""

    status: Status
    why: str
    counted: tuple[str, str] | None = None  # name and label of a counter


def refusal_of(request: Request, can: Abilities, server: str, takes_pictures: bool) -> Refusal | None:
    """can: of the target. server: its id. None: the request is admitted."""
    options, is_latent = request.options, request.content_kind is ContentKind.LATENT
    if is_latent and request.bundle not in can.bundles:
        theirs, ours = request.bundle.hex(), " and ".join(each.hex() for each in can.bundles)
        if not ours:
            why = f"the target of this server takes pictures only, no latents of bundle {theirs}: send pictures"
        else:
            why = f"bundle {theirs} is not here, {ours} is: ask again for another server, or install one"
        return Refusal(Status.UNKNOWN_BUNDLE, why)
    if options and options.prompt and options.prompt not in can.prompts:
        have = f"it has {', '.join(can.prompts)}" if can.prompts else "its target reads no prompts"
        advice = "write it into [prompts] of a server whose target reads prompts"
        why = f"prompt {options.prompt!r} is not here, {have}: {advice}"
        return Refusal(Status.UNKNOWN_BUNDLE, why, ("prompts", "unknown"))
    if options and not options.is_greedy and not can.sample:
        why = "the target of this server does not sample: want no temperature and no other options of sampling"
        return Refusal(Status.UNKNOWN_BUNDLE, why)
    if options and is_loop(options, server):
        way = " -> ".join((*options.via, server))
        why = f"a loop, or too many tiers: {way}: let [upstream] name a tier above"
        return Refusal(Status.BAD_REQUEST, why, ("loop", ""))
    if not is_latent and not takes_pictures:
        why = "this server takes no pictures, only latents: choose another paradigm than offload, or another server"
        return Refusal(Status.UNKNOWN_BUNDLE, why, ("pictures", "not_taken"))
    return None
