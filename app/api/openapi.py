"""The OpenAPI document of the service."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

# Schemas of FastAPI for invalid parameters. The service answers those with a problem of another status.
_UNUSED_SCHEMAS = ("HTTPValidationError", "ValidationError")


def remove_validation_errors(app: FastAPI) -> None:
    """Make the document of an application describe only answers that it gives.

    FastAPI adds a response with status 422 to each route with parameters, and generated clients then expect it.
    """
    create = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = create()
            for responses in _list_responses(document):
                if "HTTPValidationError" in str(responses.get("422")):
                    del responses["422"]
            for name in _UNUSED_SCHEMAS:
                document["components"]["schemas"].pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents


def _list_responses(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in document["paths"].values():
        for operation in methods.values():
            yield operation["responses"]
