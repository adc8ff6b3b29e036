"""Width and depth growth written a second time: one scalar at a time, from the paper's rules."""

import functools

import numpy as np

# For every leaf its dimensions: "=" copied unit by unit, "<" read and divided, ">" written.
# l layers, d residual, n query heads, f hidden units of the MLP; the others do not grow.
LEAVES = {
    "token_embedder/embedding": ("v=", "d="),
    "layers/pre_attention_norm/scale": ("l=", "d="),
    "layers/attention/query": ("l=", "d<", "n>", "h="),
    "layers/attention/key": ("l=", "d<", "k=", "h="),
    "layers/attention/value": ("l=", "d<", "k=", "h="),
    "layers/attention/out": ("l=", "n<", "h=", "d>"),
    "layers/attention/query_bias": ("l=", "n>", "h="),
    "layers/attention/key_bias": ("l=", "k=", "h="),
    "layers/attention/value_bias": ("l=", "k=", "h="),
    "layers/attention/query_norm": ("l=", "h="),
    "layers/attention/key_norm": ("l=", "h="),
    "layers/pre_mlp_norm/scale": ("l=", "d="),
    "layers/mlp/gate": ("l=", "d<", "f>"),
    "layers/mlp/up": ("l=", "d<", "f>"),
    "layers/mlp/down": ("l=", "f<", "d>"),
    "final_norm/scale": ("d=",),
    "lm_head/kernel": ("d<", "v="),
}


@functools.cache
def unit_of(letter, j, source, target):
    """Which unit of the source unit `j` of the target copies, and whether it is a further copy."""
    if letter == "n":
        group, head = divmod(j, target.num_heads // target.num_kv_heads)
        heads_before = source.num_heads // source.num_kv_heads
        return group * heads_before + head % heads_before, head >= heads_before
    size = {"d": source.embed_dim, "f": source.mlp_dim}.get(letter)
    return (j, False) if size is None else (j % size, j >= size)


@functools.cache
def copies(letter, j, source, target):
    sizes = {"d": target.embed_dim, "f": target.mlp_dim, "n": target.num_heads}
    mine = unit_of(letter, j, source, target)[0]
    return sum(unit_of(letter, i, source, target)[0] == mine for i in range(sizes[letter]))


def grown_leaf(path, leaf, source, target, *, layer_of, aki):
    """The target leaf as AquilaMoE (arXiv 2408.06567) describes it.

    With `aki`, an element that belongs to a new unit of a written dimension comes from the
    source's layer above its own, and from its own where there is none above.
    """
    letters = LEAVES[path]
    sizes = {
        "l": target.num_layers,
        "d": target.embed_dim,
        "n": target.num_heads,
        "f": target.mlp_dim,
    }
    shape = [sizes.get(kind[0], n) for kind, n in zip(letters, leaf.shape, strict=True)]
    grown = np.zeros(shape)
    for place in np.ndindex(*shape):
        element, factor, is_new = [], 1.0, False
        for (letter, role), j in zip(letters, place, strict=True):
            unit, further = unit_of(letter, j, source, target)
            element.append(unit)
            if role == "<":
                factor /= copies(letter, j, source, target)
            is_new = is_new or (role == ">" and further)
        if letters[0] == "l=":
            element[0] = layer_of(place[0])
            if aki and is_new:
                element[0] = min(element[0] + 1, source.num_layers - 1)
        grown[place] = leaf[tuple(element)] * factor
    return grown
