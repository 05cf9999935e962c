"""The API's description: an OpenAPI 3.1 document and a page for people, both made from the routes' declarations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from http import HTTPStatus
from typing import Any, Literal, cast

from pydantic.json_schema import models_json_schema

from indexer.sidecar.middleware import InternalFailure
from indexer.sidecar.routes import HTML, Failure, Form, Model, Route

Mode = Literal["validation", "serialization"]
Schemas = dict[tuple[Model, Mode], dict[str, Any]]

_REFERENCE = "#/components/schemas/{model}"
_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "account": [{"apiKey": []}, {"bearer": []}],
    "cron": [{"cron": []}],
    "listener": [{"session": []}],
    "visitor": [],
    "none": [],
}
_SCHEMES = {
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "made by `indexer keys create`"},
    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "its sub is the account"},
    "cron": {"type": "http", "scheme": "bearer", "description": "the secret of the internal routes"},
}
_SESSION = {"type": "apiKey", "in": "cookie", "description": "a listener's; begun by GET /connect/spotify"}


def document(routes: Sequence[Route], version: str, cookie: str) -> dict[str, Any]:
    """The OpenAPI document of these routes; `cookie` is the name of a listener's session."""
    schemas, definitions = _schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for one in routes:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "indexer", "version": version, "summary": "Jobs and what they have measured"},
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {**_SCHEMES, "session": {**_SESSION, "name": cookie}},
        },
    }


def _schemas(routes: Sequence[Route]) -> tuple[Schemas, dict[str, Any]]:
    """The schema of every model as a reference, and the definitions that these lead to."""
    wanted: dict[tuple[Model, Mode], None] = {(model, "serialization"): None for model in (Failure, InternalFailure)}
    for one in routes:
        wanted.update(dict.fromkeys((model, "validation") for name, model in one.parts.items() if name == "body"))
        wanted.update(
            dict.fromkeys((model, "serialization") for model in one.answers.values() if isinstance(model, type))
        )
    found, definitions = models_json_schema(list(wanted), ref_template=_REFERENCE)
    return cast(Schemas, found), definitions.get("$defs", {})


def _operation(one: Route, schemas: Schemas) -> dict[str, Any]:
    summary, _, description = (one.function.__doc__ or "").strip().partition("\n")
    operation: dict[str, Any] = {
        "operationId": one.function.__name__,
        "summary": summary.rstrip("."),
        **({"description": _unindented(description)} if description.strip() else {}),
        "security": _SECURITY[one.access],
        "parameters": [*_parameters(one, "path"), *_parameters(one, "query")],
        "responses": {str(status): _response(one, status, schemas) for status in sorted(one.statuses)},
    }
    if "body" in one.parts:
        kind = "application/x-www-form-urlencoded" if issubclass(one.parts["body"], Form) else "application/json"
        content = {kind: {"schema": schemas[one.parts["body"], "validation"]}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _parameters(one: Route, place: Literal["path", "query"]) -> list[dict[str, Any]]:
    """The fields of a route's path or query; what they refer to is written out, since parameters name no model."""
    if place not in one.parts:
        return []
    schema = one.parts[place].model_json_schema()
    definitions, required = schema.get("$defs", {}), schema.get("required", [])
    parameters = []
    for name, field in schema.get("properties", {}).items():
        plain = _written_out(field, definitions)
        text = plain.pop("description", None)
        parameters.append(
            {
                "name": name, "in": place, "required": place == "path" or name in required, "schema": plain,
                **({"description": text} if text else {}),
            }
        )  # fmt: skip
    return parameters


def _written_out(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_written_out(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _written_out(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _written_out(value, definitions) for name, value in schema.items()}


def _response(one: Route, status: int, schemas: Schemas) -> dict[str, Any]:
    told = status in one.answers
    answer = one.answers[status] if told else (HTML if one.page else None)
    response: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if status == 429:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    if isinstance(answer, str):
        response["content"] = {answer: {"schema": {"type": "string"}}}
        return response
    if told and answer is None:
        response["headers"] = {"Location": {"schema": {"type": "string", "format": "uri-reference"}}}
        return response
    if answer is None:
        answer = InternalFailure if status == 500 else Failure
        schema = schemas[answer, "serialization"]
        if status == 500 and one.access == "cron":
            schema = {"anyOf": [schema, schemas[Failure, "serialization"]]}
    else:
        schema = schemas[answer, "serialization"]
    response["content"] = {"application/json": {"schema": schema}}
    return response


def _unindented(text: str) -> str:
    return re.sub(r"\n[ \t]+", "\n", text).strip()


# -- the page ------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>indexer: API</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
code, h2 {{ font-family: ui-monospace, monospace; }}
h2 {{ font-size: 1rem; border-top: 1px solid; padding-top: 1rem; margin-top: 2rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; }} td, th {{ text-align: left; padding: .1rem 1rem .1rem 0; vertical-align: top; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #ddd; }} a {{ color: #8bf; }} }}
</style>
<h1>API</h1>
<p>For programs: <a href="/openapi.json">openapi.json</a>. Errors are
<code>{{"status": "error", "error": "..."}}</code>.</p>
{routes}
</html>
"""
_ACCESS = {
    "account": "<code>x-api-key</code> or <code>Authorization: Bearer</code>, exactly one",
    "cron": "<code>Authorization: Bearer</code> with the cron secret",
    "listener": "the cookie of a listener's session, and nothing else",
    "visitor": "open, for one address only so often",
    "none": "open",
}


def page(routes: Sequence[Route]) -> str:
    """The routes for people: plain HTML that loads nothing."""
    return _PAGE.format(routes="\n".join(_section(one) for one in routes))


def _section(one: Route) -> str:
    rows = []
    for place, model in one.parts.items():
        for name, field in model.model_json_schema().get("properties", {}).items():
            kind = field.get("type") or field.get("$ref", "").rpartition("/")[2] or "see openapi.json"
            choices = field.get("enum")
            text = ", ".join(map(str, choices)) if choices else str(field.get("format") or kind)
            rows.append(f"<tr><td><code>{escape(name)}</code><td>{place}<td>{escape(text)}"
                        f"<td>{escape(str(field.get('description', '')))}")  # fmt: skip
    table = f"<table><tr><th>field<th>in<th>type<th>{''.join(rows)}</table>" if rows else ""
    statuses = ", ".join(map(str, sorted(one.statuses)))
    return (
        f"<h2>{one.method} {escape(one.path)}</h2>\n<p>{escape(_unindented(one.function.__doc__ or ''))}</p>\n{table}\n"
        f"<p>Access: {_ACCESS[one.access]}. Answers: {statuses}.</p>"
    )
