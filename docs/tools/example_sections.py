"""An extension of Griffe: the section ``Example:`` of a docstring is read as ``Examples:``, the only name that Griffe shows as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the sections before Griffe parses a docstring; without it, examples would be quotations."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
