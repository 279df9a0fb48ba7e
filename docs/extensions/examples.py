"""Docstrings here say "Example:", which the parser of the reference knows as "Examples:"."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Lets an example be set as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Before the docstring of an object is parsed."""
        if obj.docstring is not None:
            lines = obj.docstring.value.split("\n")
            obj.docstring.value = "\n".join(
                "Examples:" if line.strip() == "Example:" else line for line in lines
            )
