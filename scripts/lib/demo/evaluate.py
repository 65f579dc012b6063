"""Compare checkpoints of the demo on held-out text: loads each with transformers, or as a
distributed checkpoint with torch, prints its loss, fails unless a merge wins.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoModelForCausalLM, PreTrainedModel, logging

from demo.train import make_model

WINDOW_BYTES = 128
BATCH_SIZE = 64


def load_model(folder: Path, moe: bool) -> PreTrainedModel:
    """The model in `folder`, which must load with nothing missing or left over."""
    if (folder / ".metadata").exists():
        model = make_model(moe)
        state = model.state_dict()
        load(state, checkpoint_id=folder, no_dist=True)
        return model.eval()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {key: value for key, value in report.items() if value}
    if wrong:
        sys.exit(f"{folder} does not load cleanly: {wrong}")
    return model


def held_out_loss(model: PreTrainedModel, text: torch.Tensor) -> float:
    """The mean loss in nats per byte."""
    windows = text[: len(text) // WINDOW_BYTES * WINDOW_BYTES].view(-1, WINDOW_BYTES).long()
    with torch.inference_mode():
        batches = torch.split(windows, BATCH_SIZE)
        losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches]
    return sum(losses) / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moe", action="store_true", help="the model is a mixture of experts")
    parser.add_argument("newest", type=Path)
    parser.add_argument("merges", type=Path, nargs="+")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
    text = torch.frombuffer(bytearray((args.newest.parent / "held_out.txt").read_bytes()), dtype=torch.uint8)
    newest = held_out_loss(load_model(args.newest, args.moe), text)
    print(f"\n{'checkpoint':32} held-out loss  against the newest")
    print(f"{args.newest.name:32} {newest:13.4f}")
    better = True
    for merge in args.merges:
        loss = held_out_loss(load_model(merge, args.moe), text)
        better &= loss < newest
        print(f"{merge.name:32} {loss:13.4f}  {loss - newest:+.4f}")
    if not better:
        sys.exit("a merge is not better than the newest checkpoint")
    print("\nThe merges are better than the newest checkpoint they were made from, at the cost of reading the files once.")


if __name__ == "__main__":
    main()
