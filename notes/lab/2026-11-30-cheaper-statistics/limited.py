"""What the scripts of this folder share."""
from itertools import accumulate


def limit(rows, tokens):
    """The first rows that have at least this number of tokens together, or all rows."""
    return rows[: sum(seen < tokens for seen in accumulate((len(r.tokens) for r in rows), initial=0))]
