"""Templates that Home Assistant renders over a board's events: text in Jinja's language with Home Assistant's filters.

Nothing that a model, a server or a file wrote is ever part of a template's text. It only appears in `value_json`, which
a template prints and never evaluates. Fields that are empty, zero or false are left out of events: each expression here
says what it is then, since Home Assistant logs each use of an undefined value.
"""

from collections.abc import Mapping

# Control characters and those that turn the direction of writing, in the syntax of a string in a template.
UNPRINTABLE = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
PRINTABLE = f"regex_replace('{UNPRINTABLE}', ' ')"
# A template cannot say "no change". So a state that is text stays by being repeated. None: unknown.
KEEP = "this.state if this.state not in ('unknown', 'unavailable') else 'None'"


def shown(name: str) -> str:
    """A field that is text, as an expression without unprintable characters; '' if it is left out."""
    return f"value_json.{name} | default('') | {PRINTABLE}"


def fields(*names: str, **defaults: str) -> dict[str, str]:
    """Fields of an event as expressions. names: those that are in every event. defaults: the others."""
    optional = {name: f"value_json.{name} | default({default})" for name, default in defaults.items()}
    return {name: f"value_json.{name}" for name in names} | optional


def quoted(name: str) -> str:
    """A name from the checked configuration, which has letters, digits, `_` and `-` only, as a string."""
    assert name.replace("_", "").replace("-", "").isalnum(), name  # nothing else may become part of a template
    return f"'{name}'"


def number(condition: str, value: str) -> str:
    """A state that is a number. Home Assistant ignores an empty text then, so the state stays."""
    return f"{{% if {condition} %}}{{{{ {value} }}}}{{% endif %}}"


def text(condition: str, value: str) -> str:
    """A state that is text: the value if the condition holds, else what it was."""
    return f"{{% if {condition} %}}{{{{ {value} }}}}{{% else %}}{{{{ {KEEP} }}}}{{% endif %}}"


def event(condition: str, values: Mapping[str, str]) -> str:
    """The JSON of an event entity. Home Assistant ignores an empty text."""
    return number(condition, printable_json(values))


def attributes(condition: str, values: Mapping[str, str]) -> str:
    """The attributes of an entity: these values if the condition holds, else what they were."""
    kept = as_json({name: f"this.attributes.{name} | default(none)" for name in values})
    return f"{{% if {condition} %}}{{{{ {printable_json(values)} }}}}{{% else %}}{{{{ {kept} }}}}{{% endif %}}"


def printable_json(values: Mapping[str, str]) -> str:
    """As `as_json`, without characters that turn the direction of writing, also in keys of objects that servers name.

    JSON escapes the control characters: `shown` removes them.
    """
    return f"{as_json(values)} | {PRINTABLE}"


def as_json(values: Mapping[str, str]) -> str:
    """The expression of a JSON object with these expressions as values."""
    return f"dict({', '.join(f'{name}={value}' for name, value in values.items())}) | to_json"
