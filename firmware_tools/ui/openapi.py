"""docs/ui-openapi.json, from the types of the answers: `python -m firmware_tools.ui.openapi` prints it."""

import sys
from typing import Any

import msgspec

from edge_runtime import __version__
from firmware_tools.ui.history import FOUND, MAX_QUERY
from firmware_tools.ui.live import MAX_BROWSERS, MAX_ROWS
from firmware_tools.ui.rows import Answers, Error, Update


def _response(description: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema}}}


def _parameter(where: str, name: str, description: str, **schema: Any) -> dict[str, Any]:
    found = {"name": name, "in": where, "description": description, "schema": schema}
    return found | ({"required": True} if where == "path" else {})


def openapi() -> bytes:
    """OpenAPI 3.1, as indented JSON."""
    (update, answers, error), types = msgspec.json.schema_components(
        [Update, Answers, Error], ref_template="#/components/schemas/{name}"
    )
    errors = {
        "400": _response("The query cannot be read.", "application/json", error),
        "401": _response("There is a login, and the cookie is missing.", "application/json", error),
        "403": _response("Another site's page asks, or the host name is not known.", "application/json", error),
    }
    board = {"type": "string", "pattern": "^[a-z0-9-]{1,32}$"}
    camera = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,32}$"}
    updates = {
        "summary": "The content of the page, and each change of it",
        "description": "Server-sent events. The data of each event is an Update as JSON, with at most "
        f"{MAX_ROWS} rows. The first update has `is_first`; more of the present rows may follow.",
        "responses": {
            "200": _response("Events; they do not end.", "text/event-stream", {"type": "string"}),
            "503": _response(f"{MAX_BROWSERS} browsers are connected.", "application/json", error),
        }
        | errors,
    }
    search = {
        "summary": f"The newest {FOUND} texts with all of these words",
        "description": "A word also finds longer words that begin with it. Without words: the newest texts. "
        f"By meaning: the {FOUND} most similar texts, the most similar first, without `before`.",
        "parameters": [
            _parameter("query", "q", "Words of the text.", type="string", maxLength=MAX_QUERY),
            _parameter("query", "label", "Words of the likeliest label.", type="string", maxLength=MAX_QUERY),
            _parameter("query", "board", "Of one board only.", **board),
            _parameter("query", "by", "How; by words if it is missing.", type="string", enum=["words", "meaning"]),
            _parameter("query", "before", "Only ids below this.", type="integer", minimum=0, maximum=10**16 - 1),
        ],
        "responses": {
            "200": _response("Texts.", "application/json", answers),
            "404": _response("Search by meaning: no sentence model is loaded.", "application/json", error),
        }
        | errors,
    }
    picture = {
        "summary": "The last picture of a camera, if its board publishes pictures",
        "parameters": [
            _parameter("path", "board", "The board's id.", **board),
            _parameter("path", "camera", "The camera's name.", **camera),
        ],
        "responses": {
            "200": _response("A JPEG.", "image/jpeg", {"type": "string", "format": "binary"}),
            "404": _response("There is none.", "application/json", error),
        }
        | errors,
    }
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "The live page of aiflow-edge",
            "version": __version__,
            "description": "What `aiflow ui` answers besides the page's own files. All of it only reads.",
        },
        "paths": {
            "/api/updates": {"get": updates},
            "/api/search": {"get": search},
            "/api/picture/{board}/{camera}": {"get": picture},
        },
        "components": {
            "schemas": types | {"UpdateEvent": update},
            "securitySchemes": {"cookie": {"type": "apiKey", "in": "cookie", "name": "aiflow"}},
        },
        "security": [{}, {"cookie": []}],
    }
    return msgspec.json.format(msgspec.json.encode(document)) + b"\n"


if __name__ == "__main__":
    sys.stdout.buffer.write(openapi())
