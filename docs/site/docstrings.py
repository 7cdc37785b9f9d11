"""An extension of griffe: docstrings, which hold Sphinx's roles, as the Markdown of the site."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
ADDED_ARGUMENTS = re.compile(r"^Args \((.*)\):$", re.MULTILINE)


def address(name: str, obj: griffe.Object, package: griffe.Module) -> str | None:
    """Where `name`, in the docstring of `obj`, is documented; None if nowhere."""
    if name.startswith(f"{package.path}."):
        inner = package.members.get(name.removeprefix(f"{package.path}."))
        # a function that its module is named after
        is_module = inner is not None and not inner.is_alias and inner.is_module
        return f"{name}.{inner.name}" if is_module else name
    exported = package.members.get(name)
    if exported is not None and exported.is_alias:
        return f"{package.path}.{name}"
    for place in (obj, obj.parent, obj.module):
        if place is not None and not place.is_function and name in place.members:
            return place.members[name].canonical_path
    return None


def as_markdown(obj: griffe.Object, package: griffe.Module) -> str:
    def link(match: re.Match) -> str:
        code = f"`{match[1].removeprefix(f'{package.path}.')}`"
        target = address(match[1], obj, package)
        return code if target is None else f"[{code}][{target}]"

    text = ROLE.sub(link, obj.docstring.value)
    text = ADDED_ARGUMENTS.sub(lambda match: f"Arguments {match[1]}:\n\nArgs:", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        self._rewrite(pkg, pkg)

    def _rewrite(self, obj: griffe.Object, package: griffe.Module) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj, package)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, package)
