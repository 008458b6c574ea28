"""Damaged files for fuzz tests: bytes of nobody's making, and valid files with a few bytes changed, gone or more."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """At a place (a share of the length), so many bytes are replaced by others."""

    at: float
    num_gone: int
    put: bytes

    def of(self, content: bytes) -> bytes:
        start = int(self.at * len(content))
        return content[:start] + self.put + content[start + self.num_gone :]


_PLACES = st.floats(0, 1, exclude_max=True)
_CHANGED = st.binary(min_size=1, max_size=4).flatmap(
    lambda put: st.builds(Damage, at=_PLACES, num_gone=st.just(len(put)), put=st.just(put))
)
_INSERTED = st.builds(Damage, at=_PLACES, num_gone=st.just(0), put=st.binary(min_size=1, max_size=8))
_CUT = st.builds(Damage, at=_PLACES, num_gone=st.just(1 << 30), put=st.just(b""))


def damaged(*files: bytes) -> st.SearchStrategy[bytes]:
    """Draw random bytes, or one of the files with one to three kinds of damage."""
    broken = st.tuples(st.sampled_from(files), st.lists(st.one_of(_CHANGED, _INSERTED, _CUT), min_size=1, max_size=3))
    return st.one_of(broken.map(_apply), broken.map(_apply), st.binary(max_size=200))


def _apply(drawn: tuple[bytes, list[Damage]]) -> bytes:
    content, damages = drawn
    for damage in damages:
        content = damage.of(content)
    return content
