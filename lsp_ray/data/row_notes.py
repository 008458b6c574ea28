"""What became of rows that could not be trained as they are."""

from __future__ import annotations

from collections.abc import Sequence

from lsp_ray.data.classes import Classes, Numbers


def row_notes(given: Classes | Numbers | None, counts: Sequence[int], max_seq_length: int) -> list[str]:
    """Return lines for a person.

    Args:
        given: What a classifier's labels are.
        counts: Rows cut, dropped, dropped as they are too long; turns that the template rewrites.
        max_seq_length: Tokens kept of a row.
    """
    num_truncated, num_dropped, num_too_long, num_rewritten = counts
    notes = []
    if num_truncated > num_too_long:
        notes.append(f"{num_truncated - num_too_long} examples cut to {max_seq_length} tokens (--max_seq_length)")
    if given is not None and num_dropped:
        minus = " (-1 counts as none)" if isinstance(given, Classes) and given.minus_is_none else ""
        notes.append(f"{num_dropped} examples dropped as they had no label{minus}")
    elif num_dropped:
        reasons = [(num_too_long, f"their prompt alone has {max_seq_length} tokens")]
        reasons.append((num_dropped - num_too_long, "they had no answer to learn"))
        notes += [f"{count} examples dropped as {why}" for count, why in reasons if count]
    if isinstance(given, Classes):
        names = ", ".join(given.names[:8]) + (", …" if len(given.names) > 8 else "")
        notes.append(f"{len(given.names)} classes: {names}")
        if "-1" in given.names:
            notes.append("-1 is a class, as rows to train on have it; leave the label of unlabelled rows empty")
    if num_rewritten:
        notes.append(
            f"{num_rewritten} of the assistant's turns carry no loss: the chat template writes them differently once "
            "others follow, as templates do that leave out what was thought"
        )
    return notes
