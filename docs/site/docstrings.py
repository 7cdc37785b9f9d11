"""An extension of griffe: docstrings, which hold Sphinx's roles, as the Markdown of the site."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
ADDED_ARGUMENTS = re.compile(r"^Args \((.*)\):$", re.MULTILINE)


def exported(name: str, package: griffe.Module) -> str | None:
    """Where the package's own `name` is documented; None if it exports no such name."""
    member = package.members.get(name)
    if member is None:
        return None
    target = member.final_target if member.is_alias else member
    if not target.is_module:
        return f"{package.path}.{name}"
    # a function that its module is named after, which hides it from griffe
    return f"{target.path}.{name}" if name in target.members else None


def address(name: str, obj: griffe.Object, package: griffe.Module) -> str | None:
    """Where `name`, in the docstring of `obj`, is documented; None if nowhere."""
    inner = name.removeprefix(f"{package.path}.")
    if inner != name:
        return exported(inner, package) or name
    for place in (obj, obj.parent):
        if place is not None and place.is_class and name in place.members:
            return place.members[name].canonical_path
    found = exported(name, package)
    if found is None and name in obj.module.members:
        found = obj.module.members[name].canonical_path
    return found


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
