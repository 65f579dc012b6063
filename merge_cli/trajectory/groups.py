"""From the name of a tensor to its layer and its kind: attention, MLP, experts and so on, by the
words that frameworks use.

A name that fits nothing is of the kind "other": a wrong guess moves a number from one row of a
table into another, no more.
"""

from __future__ import annotations

import re
from typing import NamedTuple

KINDS = ("embedding", "attention", "MLP", "experts", "router", "router bias", "norm", "head", "other")

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d{1,9})(?=\.|$)")
_WORDS = {  # the first that fits; each is matched against one part of the name between dots, or a whole name
    "router bias": re.compile(r"(?:^|\.)(?:e_score_correction_bias|(?:e_)?expert_bias(?:es)?)$"),
    "norm": re.compile(r"(?:^|[._])(?:[a-z]*norms?\d*|ln(?:_?\w)?)(?:_(?:weight|bias|\d|f))?(?=[._]|$)", re.IGNORECASE),
    "attention": re.compile(r"(?:^|[._])(?:[a-z]*attn|[a-z]*attention|att(?=[._]))", re.IGNORECASE),
    "router": re.compile(r"(?:^|\.)(?:router|gate|wg|shared_expert_gate)(?=\.|$)"),
    "experts": re.compile(r"experts?(?=[._]|$)", re.IGNORECASE),
    "MLP": re.compile(r"(?:^|[._])(?:mlp|ffn?|feed_?forward|fc\d?)(?=[._\d]|$)", re.IGNORECASE),
    "embedding": re.compile(r"emb(?:ed(?!_out)|eddings?)|(?:^|\.)w[tp]e(?=\.|$)", re.IGNORECASE),
    "head": re.compile(r"(?:^|[._])(?:lm_?head|head|embed_out|output(?:_layer)?|unembed(?:ding)?)(?=[._]|$)", re.IGNORECASE),
}


class Group(NamedTuple):
    """The tensors of one kind in one layer; `layer` is None outside the layers (embedding, head,
    the last norm).
    """

    layer: int | None
    kind: str

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"layer {self.layer} {self.kind}"


def group_of(key: str) -> Group:
    """The group of a tensor, by its name or its key "file:name"."""
    name = key.rpartition(":")[2]
    layer = _LAYER.search(name)
    kind = next((kind for kind, words in _WORDS.items() if words.search(name)), "other")
    return Group(int(layer[1]) if layer else None, kind)
