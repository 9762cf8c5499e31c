"""Small bodies in JSON, with a limit on their length and on their time.

FastAPI would keep a body of any length in memory, before it checks who calls.
"""

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from app.api import upload
from app.errors import UploadTooLarge

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request that is no scan.

    Raises
    ------
    UploadTooLarge
        The body is longer than `max_bytes`. The rest of it is not read.
    UploadTooSlow
        The body did not arrive within a minute.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(upload.BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise UploadTooLarge(
                        "The body of the request is too long.",
                        expected=f"at most {max_bytes} bytes.",
                        advice="Shorten its texts. See /docs for the fields of the body.",
                    )
    except TimeoutError:
        raise upload.too_slow() from None
    return bytes(body)


def parse_body(model: type[M], body: bytes) -> M:
    """Return the JSON of a body as a model.

    Raises
    ------
    RequestValidationError
        It names the invalid fields. It does not repeat their values.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        invalid: list[Any] = [{**fault, "loc": ("body", *fault["loc"])} for fault in faults]
        raise RequestValidationError(invalid) from None
