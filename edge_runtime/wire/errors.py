"""What wire raises: one base, and a class for each thing that a peer or a file can get wrong."""

from edge_runtime.errors import AiflowError


class WireError(AiflowError, ValueError):
    """Something from outside breaks the protocol; the message says what was found, what was wanted, what to do."""


class BitstreamError(WireError):
    """Symbols that cannot be coded, or bytes that no encoder with these tables has written."""


class EnvelopeError(WireError):
    """A request, a reply, an event or token ids outside the protocol or its bounds."""


class TablesError(WireError):
    """A table file or counts that cannot be static frequency tables."""


class TopicError(WireError):
    """A topic outside the scheme, or an id that cannot be part of a topic."""
