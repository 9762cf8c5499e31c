"""Where one frame lies in space."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What tells apart images of one place that were acquired together.

    Attributes
    ----------
    component : str
        "phase", "real" or "imaginary"; empty for magnitude, and where nothing is said.
    echo_ms : float or None
    b_value : float or None
        Of diffusion, in s/mm2.
    """

    component: str = ""
    echo_ms: float | None = None
    b_value: float | None = None

    def __str__(self) -> str:
        parts = [self.component] if self.component else []
        parts += [f"echo {self.echo_ms:g} ms"] if self.echo_ms is not None else []
        parts += [f"b = {self.b_value:g}"] if self.b_value is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Plane:
    """One frame in space (PS3.3 C.7.6.2), LPS millimetres.

    Attributes
    ----------
    position : tuple of float
        Centre of the first pixel, (3,).
    orientation : tuple of float
        Direction of increasing column, then of increasing row, (6,).
    spacing : tuple of float
        Between rows, between columns.
    thickness : float or None
        Of the slice, where it is stated.
    kind : Kind
        What was acquired there.
    """

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    thickness: float | None
    kind: Kind = Kind()
