"""/v1/tokens: the named tokens without their values, for operators. `counterpart token` changes them."""

from datetime import datetime

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from app.api.identity import get_identity, require
from app.api.problems import problem_responses
from app.api.tokens import SCOPES, Scope

router = APIRouter(prefix="/v1/tokens", tags=["operation"])


class TokenSummary(BaseModel):
    """A named token, without its value and its hash."""

    model_config = ConfigDict(frozen=True)

    name: str
    scopes: tuple[Scope, ...]
    created: datetime
    revoked: datetime | None = Field(description="Null if the token is valid.")


class TokenList(BaseModel):
    """The named tokens."""

    model_config = ConfigDict(frozen=True)

    tokens: tuple[TokenSummary, ...] = Field(description="The oldest first.")


@router.get("", dependencies=[Depends(require("admin"))], responses=problem_responses(401, 403, 503))
def list_tokens(request: Request) -> TokenList:
    """List the named tokens, the revoked ones included."""
    file = get_identity(request).tokens
    summaries = (
        TokenSummary(
            name=token.name,
            scopes=tuple(sorted(token.scopes, key=SCOPES.index)),
            created=token.created,
            revoked=token.revoked,
        )
        for token in (file.read() if file else ())
    )
    return TokenList(tokens=tuple(summaries))
