"""List of the licences in a software bill of materials (CycloneDX JSON). A licence that the service may not have fails.

    python deploy/licences.py sbom.json > licences.md

The exit status is 1 if a package can only be used under the GPL or AGPL, or states no licence. The LGPL is permitted:
psycopg, a separate package that its user can replace.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from license_expression import LicenseSymbol, LicenseWithExceptionSymbol, get_spdx_licensing

SPDX = get_spdx_licensing()
# Packages whose metadata state no licence, with the licence of their source code.
KNOWN = {"protobuf": "BSD-3-Clause"}
LESSER = re.compile(r"Lesser General Public License|LGPL", re.IGNORECASE)
GENERAL = re.compile(r"General Public License|\bA?GPL", re.IGNORECASE)


def is_permitted(licence: str) -> bool:
    """Return whether a licence (SPDX expression, or the name in a classifier) has an alternative to the GPL."""
    parsed = None if "::" in licence else SPDX.parse(licence, validate=False)
    return _is_permitted(parsed) if parsed is not None else not GENERAL.search(LESSER.sub("", licence))


def _is_permitted(expression: Any) -> bool:
    if isinstance(expression, LicenseWithExceptionSymbol):
        return True  # the exception of GCC's run-time library, which numpy and scipy contain
    if isinstance(expression, LicenseSymbol):
        return not GENERAL.search(LESSER.sub("", expression.key))
    combine = any if expression.operator.strip() == "OR" else all
    return bool(combine(_is_permitted(part) for part in expression.args))


def read_licences(component: dict[str, Any]) -> list[str]:
    """Return the licences of a component. An SPDX expression or identifier replaces the names of classifiers."""
    found = [entry.get("expression") or entry["license"].get("id") for entry in component.get("licenses", [])]
    names = [entry["license"].get("name") for entry in component.get("licenses", []) if "license" in entry]
    known = [KNOWN[component["name"]]] if component["name"] in KNOWN else []
    return [text for text in found if text] or [text for text in names if text] or known


def main() -> int:
    """Print the table and return the exit status."""
    components = json.loads(Path(sys.argv[1]).read_text())["components"]
    print("| package | version | licence |\n| --- | --- | --- |")
    refused = []
    for component in sorted(components, key=lambda component: str(component["name"]).lower()):
        licences = read_licences(component)
        print(f"| {component['name']} | {component['version']} | {'; '.join(licences) or 'not stated'} |")
        if not licences or not all(map(is_permitted, licences)):
            refused.append(f"{component['name']}: {'; '.join(licences) or 'no licence stated'}")
    for line in refused:
        print(f"{line}. Expected: a licence other than the GPL. Replace the package.", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
