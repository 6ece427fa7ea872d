"""Models that answer: what decides the text of a reply."""
