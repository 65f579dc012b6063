"""Sort the entries of a checkpoint by name: weights of the model, and state of the training, some
of which are weights too.

Trainers flatten their state into names: `optimizer.state.layers.0.wq.weight.exp_avg` (torchtitan),
`optim.state. ...` (OLMo-core), `chained_0.optimizer.state.exp_avg.decoder. ...` and
`optimizer.state.fp32_param. ...` (Megatron). The model's names have no prefix, or `model.`, so the
state is found by its own names. The main copies of 16-bit weights that an optimizer keeps in
float32 are weights too: a trainer that resumes from them overwrites the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from merge_cli.errors import UsageError
from merge_cli.formats.dcp.metadata import Metadata
from merge_cli.formats.safetensors import DTYPES

DROP, BASE, AVERAGE = "drop", "base", "average"
TRAINING_STATES = (DROP, BASE, AVERAGE)
"""What becomes of the training state: left out; copied from the base; copied, but for moments,
which are averaged like weights.
"""

_WRAPPERS = r"(?:(?:app|state|checkpoint|ckpt|trainer|chained_\d+)\.)*"
_STATE = re.compile(
    _WRAPPERS
    + r"(?:optim(?:izer)?s?(?:_states?)?(?:_\d+)?|(?:lr|opt_param)_schedulers?|schedulers?|train(?:er)?_state|training_state"
    + r"|data_?loaders?|rngs?(?:_states?)?|iteration|epoch|(?:global_)?step|timestamp|callbacks|loggers?|rerun_state_machine)"
    + r"(?:[./]|$)"
)
_OPTIMIZER = re.compile(_WRAPPERS + r"optim(?:izer)?s?(?:_states?)?(?:_\d+)?\.")
_MAIN_WEIGHTS = re.compile(r"\.(?:fp32_param|fp32_from_fp16_params|(?:master|main)_(?:params?|weights?)|param)(?:[./]|$)")
_MOMENTS = re.compile(r"\.(?:exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|momentum|square_avg|exp_inf)(?:[./]|$)")


def is_training_state(fqn: str) -> bool:
    """Whether the entry is state of the training and not of the model."""
    return _STATE.match(fqn) is not None


def is_main_weight(fqn: str) -> bool:
    """Whether the entry is an optimizer's own copy of weights."""
    return _OPTIMIZER.match(fqn) is not None and _MAIN_WEIGHTS.search(fqn) is not None


def is_moment(fqn: str) -> bool:
    """Whether the entry is a moment of an optimizer: a mean over gradients, of the shape of the
    weights.
    """
    return _OPTIMIZER.match(fqn) is not None and _MOMENTS.search(fqn) is not None and not is_main_weight(fqn)


def treat(metadata: Metadata, training_state: str) -> Mapping[str, str]:
    """What happens to each entry that is kept: "merge" (its chunks are tensors of the plan) or
    "copy" (from the base, unopened).

    With `drop` the model's tensors are kept, and of what is no tensor only `_extra_state` (scales
    of fp8 layers).
    """
    if training_state not in TRAINING_STATES:
        raise UsageError(f"--training-state cannot be {training_state!r}", hint=f"--training-state {DROP}")
    kept: dict[str, str] = {}
    for fqn, tensor in metadata.tensors.items():
        is_float = DTYPES[tensor.dtype].kind == "float"
        if not is_training_state(fqn):
            kept[fqn] = "merge"
        elif training_state != DROP:
            merged = is_main_weight(fqn) or (training_state == AVERAGE and is_moment(fqn))
            kept[fqn] = "merge" if merged and is_float else "copy"
    for fqn in metadata.blobs:
        if training_state != DROP or ("_extra_state" in fqn and not is_training_state(fqn)):
            kept[fqn] = "copy"
    return kept
