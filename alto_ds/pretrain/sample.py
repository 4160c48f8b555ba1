"""Let a trained model go on with a text.

.. code-block:: bash

    python -m alto_ds.pretrain.sample runs/demo --prompt "def main("
"""

from __future__ import annotations

import sys

import torch
from transformers import set_seed

from alto_ds.pretrain.options import OneLineParser
from alto_ds.pretrain.trained import Trained, load_trained


def sample(
    trained: Trained, prompt: str, max_new_tokens: int, temperature: float, top_k: int
) -> str:
    """The prompt and what the model adds to it, until end of text or as long as it may be.

    Args:
        trained: the model.
        prompt: a text, or nothing for the beginning of a document.
        max_new_tokens: added at most; fewer where the model takes no more positions.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: likeliest tokens to choose from; 0 for all.

    Raises:
        ValueError: the prompt has more tokens than the model takes.
    """
    model, tokenizer = trained.model, trained.tokenizer
    # A document begins after another's end, as in training.
    tokens = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    room = trained.length - len(tokens)
    if room < 1:
        raise ValueError(
            f"--prompt has {len(tokens) - 1} tokens; the model takes {trained.length - 2} at most"
        )
    ids = torch.tensor([tokens], device=model.device)
    options = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    with torch.inference_mode():
        (found,) = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **(options if temperature > 0 else {"do_sample": False}),
        )
    return tokenizer.decode(found[1:], skip_special_tokens=True)


def main() -> None:
    """Print the texts that the command line asks for."""
    parser = OneLineParser(
        prog="alto_ds.pretrain.sample", description="Let a trained model go on with a text."
    )
    parser.add_argument("model", help="a run's folder, a checkpoint, or a Hugging Face model")
    parser.add_argument("--tokenizer", help="hub name or folder (default: the model's own)")
    parser.add_argument("--prompt", default="", help="text to go on with (default: none)")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: no randomness")
    parser.add_argument("--top_k", type=int, default=50, help="0: all tokens")
    parser.add_argument("--seed", type=int, default=1234)
    given = parser.parse_args()
    for name, least in (
        ("num_samples", 1),
        ("max_new_tokens", 1),
        ("temperature", 0),
        ("top_k", 0),
    ):
        if not getattr(given, name) >= least:
            parser.error(f"--{name}={getattr(given, name)} must be at least {least}")
    set_seed(given.seed)
    try:
        trained = load_trained(given.model, given.tokenizer)
        print(f"{trained.source}:", file=sys.stderr)
        for _ in range(given.num_samples):
            print(
                sample(trained, given.prompt, given.max_new_tokens, given.temperature, given.top_k)
            )
            if given.num_samples > 1:
                print("---------------")
    except ValueError as error:
        parser.error(f"{error}.")


if __name__ == "__main__":
    main()
