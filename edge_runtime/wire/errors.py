"""The errors of `wire`: one base, and a class for each kind of invalid input."""

from edge_runtime.errors import AiflowError


class WireError(AiflowError, ValueError):
    """Input breaks the protocol. The message says what was found, what was wanted, what to do."""


class BitstreamError(WireError):
    """Symbols that cannot be coded, or bytes that no encoder with these tables writes."""


class ReferenceLostError(BitstreamError):
    """A frame is coded against an earlier one that is not here, or is another one: ask for the frame alone."""


class EnvelopeError(WireError):
    """A request, a reply, an event or token ids outside the protocol or its bounds."""


class TablesError(WireError):
    """A file or counts that are not valid frequency tables."""


class TopicError(WireError):
    """A topic that is not part of the scheme, or an id that cannot be part of a topic."""
