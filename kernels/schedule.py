"""In which order the CTAs of a persistent grid work through tiles of unequal length.

With one tile per CTA the hardware hands out the next one as an SM comes free, but nothing overlaps from tile to tile.
A persistent grid overlaps, and needs its shares to be equal. Dealt out the longest first to whoever has least (Graham,
1969), the causal tiles of the benchmark's grid leave at most three hundredths of the SMs' time idle by this count.
"""

import heapq

OVERHEAD = 1.5  # of a tile, in KV tiles: what its first scores and its last product cost while nothing overlaps them
# What putting parts of the keys together costs, in KV tiles, and for how many rows it costs one more. On an H200, the
# 16384 rows of 16 heads and 1024 positions take 41 us at head_dim 64 and 68 at 128, 60 tiles both.
COMBINING, COMBINED_ROWS = 3, 270
MAX_PARTS = 128  # of the keys
MAX_SHARE = 64  # tiles of a CTA beyond which several are dealt out at once, to bound the time that this takes


def longest_first(lengths: list[int], heads: int, section: int, ctas: int) -> list[int]:
    """Deals out the row tiles of all heads, the longest first, each to the CTA that has least to do.

    Args:
        lengths: KV tiles of each row tile; every head has the same.
        heads: counted over all batches.
        section: heads whose tiles go together, so that their keys and values stay in the L2 cache.
        ctas: no more than tiles.

    Returns:
        for CTA c, tiles[c] is how many it has, and tiles[ctas * (step + 1) + c] the one at `step`, as
        head * len(lengths) + row tile.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    bundle = max(1, -(-heads * len(lengths) // (MAX_SHARE * ctas)))
    loads = [(0.0, cta) for cta in range(ctas)]
    shares: list[list[int]] = [[] for _ in range(ctas)]
    for first in range(0, heads, section):
        last = min(first + section, heads)
        for row in rows:
            cost = lengths[row] + OVERHEAD
            for head in range(first, last, bundle):
                several = range(head, min(head + bundle, last))
                load, cta = loads[0]
                heapq.heapreplace(loads, (load + cost * len(several), cta))
                shares[cta] += (h * len(lengths) + row for h in several)
    rounds = max(map(len, shares))
    padded = [[len(share), *share, *[0] * (rounds - len(share))] for share in shares]
    return [share[step] for step in range(rounds + 1) for share in padded]


def parts_of_keys(lengths: list[int], heads: int, rows: int, sms: int) -> int:
    """Into how many parts the keys of each row tile are split, for few row tiles to keep all SMs busy.

    Args:
        lengths: KV tiles of each row tile; every head has the same.
        heads: counted over all batches; rows: of each.
    """
    combining = COMBINING + heads * rows / COMBINED_ROWS

    def time(parts: int) -> float:
        rounds = -(-len(lengths) * heads * parts // sms)
        return rounds * (-(-max(lengths) // parts) + OVERHEAD) + (combining if parts > 1 else 0)

    return min(range(1, min(max(lengths), MAX_PARTS) + 1), key=time)
