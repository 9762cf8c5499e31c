"""Routes: the targets of results, and which results go to which target. Read from the file of COUNTERPART_ROUTES."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, TypeAdapter, ValidationError, model_validator

from app.errors import InvalidSettings
from app.export.outputs import DICOM_NAMES
from app.settings import AE_TITLE

HOUR = 3600.0
Title = Annotated[str, Field(pattern=f"^({AE_TITLE.pattern})$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DimseTarget(_Table):
    """Target that takes results by C-STORE.

    Attributes
    ----------
    host, port, ae_title : str, int, str
        Address and AE title of the PACS.
    calling_ae_title : str
        AE title of this service.
    tls : bool
        Use TLS, and check the certificate of the PACS.
    ca, certificate, key : Path, optional
        PEM files: CA of the PACS, and the certificate of this service.
    """

    kind: Literal["dimse"]
    host: str
    port: int = Field(ge=1, le=65535)
    ae_title: Title
    calling_ae_title: Title = "COUNTERPART"
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _check_tls(self) -> "DimseTarget":
        if not self.tls and (self.ca or self.certificate or self.key):
            raise ValueError("ca, certificate and key need tls = true")
        return self

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"


class StowTarget(_Table):
    """Target that takes results by STOW-RS.

    Attributes
    ----------
    url : HttpUrl
        Base URL of the DICOMweb service, before /studies.
    token_file : Path, optional
        File of a bearer token. It is read for each delivery.
    ca, certificate, key : Path, optional
        PEM files: CA of the PACS, and the certificate of this service.
    """

    kind: Literal["stow"]
    url: HttpUrl
    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.url.host}:{self.url.port}"


Target = DimseTarget | StowTarget


class Route(_Table):
    """Rule that sends results to a target.

    Attributes
    ----------
    target : str
        Name of the target.
    results : tuple of str
        Names of DICOM results.
    models : tuple of str
        Names or ids of models. Empty stands for every model.
    """

    target: Name
    results: tuple[str, ...] = Field(min_length=1)
    models: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_results(self) -> "Route":
        unknown = sorted(set(self.results) - set(DICOM_NAMES))
        if unknown:
            raise ValueError(f"{unknown[0]} is no DICOM result; the DICOM results are {', '.join(DICOM_NAMES)}")
        return self

    def applies_to(self, model: str) -> bool:
        """Return whether the route takes the results of a model id such as t1-1.7.0."""
        return not self.models or any(name in {model, model.rpartition("-")[0]} for name in self.models)


class Routes(_Table):
    """Content of the file of routes.

    Attributes
    ----------
    targets : mapping of str to Target
    routes : tuple of Route
    give_up_hours : float
        Hours after which a delivery that always failed is not tried again.
    """

    targets: Mapping[Name, Annotated[Target, Field(discriminator="kind")]] = Field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    give_up_hours: float = Field(72.0, gt=0)

    @model_validator(mode="after")
    def _check_targets(self) -> "Routes":
        for route in self.routes:
            if route.target not in self.targets:
                raise ValueError(
                    f"a route names the target {route.target}, which has no table [targets.{route.target}]"
                )
        return self

    @property
    def give_up_seconds(self) -> float:
        """Seconds of `give_up_hours`."""
        return self.give_up_hours * HOUR

    def select(self, model: str, results: Sequence[str]) -> list[tuple[str, str]]:
        """Return target and name of each delivery of a job, in the order of the results."""
        wanted = {(r.target, name) for r in self.routes if r.applies_to(model) for name in r.results}
        return [(target, name) for target in self.targets for name in results if (target, name) in wanted]


def read_routes(path: Path | None) -> Routes:
    """Read a file of routes. No path gives no routes.

    Raises
    ------
    InvalidSettings
        The file cannot be read, or it contains something else.
    """
    if path is None:
        return Routes()
    try:
        return TypeAdapter(Routes).validate_python(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()]
        found = "; ".join(faults)
    except (OSError, ValueError) as error:
        found = error.strerror or type(error).__name__ if isinstance(error, OSError) else f"no valid TOML ({error})"
    raise InvalidSettings(
        f"The file of COUNTERPART_ROUTES cannot be used: {found}.",
        expected="tables [targets.NAME] and [[routes]] (see docs/pacs.md).",
        advice="Correct the file, or unset COUNTERPART_ROUTES.",
    ) from None
