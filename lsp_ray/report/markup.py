"""Markup: HTML and SVG put together element by element, so that text is escaped because nothing else is possible."""

from __future__ import annotations

from html import escape

Attribute = str | float | int


class Markup(str):
    """Text that is markup already; made by `element` alone."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """Return `<tag …>children</tag>`; children that are no Markup are text, and are escaped.

    In attribute names `_` stands for `-`, and a trailing one is dropped (`class_`). Numbers have two decimals at most.
    """
    listed = "".join(f' {_name(name)}="{escape(_value(value))}"' for name, value in attributes.items())
    return Markup(f"<{tag}{listed}>{joined(*children)}</{tag}>")


def joined(*parts: str) -> Markup:
    """Return the parts after each other; those that are no Markup are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def page(title: str, style: str, *body: str, script: str = "") -> Markup:
    """Return a whole document with style and script inside; these two are ours, not data's."""
    assert "<" not in style + script
    head = joined(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Markup(style)),
    )
    if script:
        body = (*body, element("script", Markup(script)))
    return Markup(f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{joined(*body)}</body></html>\n')


def _name(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _value(value: Attribute) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
